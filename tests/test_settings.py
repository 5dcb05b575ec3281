"""Settings: each fault is one sentence that names its variable, and no secret is ever in one."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from process.api_keys import ApiKey
from process.values import Address
from settings import Settings, SettingsError, load

ROOT = Path(__file__).parent.parent
DIGEST = hashlib.sha256(b"a key").hexdigest()
OTHER = hashlib.sha256(b"another").hexdigest()
# fmt: off
WRONG = {  # a fault -> values of its variable that have it
    "MAIL_REDIRECT_TO: must be one address without a name, such as tester@acme.example": (
        "acme.example", "T <t@a.example>", "a@b.example,c@d.example", "a@müller.example", "a..b@c.example"),
    "MAIL_ALLOWLIST: must be addresses and domains in ASCII, such as": (
        ",", "acme.example,", "*.acme.example", "@acme.example", "a@b@c.example", "A <a@b.example>", "a b"),
    "API_KEYS: each name must be unique, or that of an old key and a new one that may do the same": [
        f"a:{DIGEST},{one}" for one in (
            f"a:{DIGEST}", f"a:{OTHER}:send", f"a:{OTHER}:full:9/s", f"b:{OTHER},a:{OTHER},a:{'c' * 64}")],
    "API_KEYS: entry 1 must be name:sha256hex[:scope[:rate[:domains]]]": [f"a:{DIGEST}:{one}" for one in (
        "send:", "send::", "send:9/s:", "send:acme.example", "send::a b", "send::a@b.example", "send::müller.example",
        "send::-a.example", "send::a..example", ":9/s", "send::a+", "send::*")],
}
# fmt: on
PLAIN = {"SMTP_USERNAME": "ada", "SMTP_PASSWORD": "hunter2", "SMTP_SECURITY": "none"}


@pytest.fixture(autouse=True)
def _empty_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    with patch.dict(os.environ, clear=True):
        yield


def given(*needed: str, **variables: str) -> Settings:
    os.environ.update(variables)
    return load(*needed)


def faults(*needed: str, **variables: str) -> list[str]:
    with pytest.raises(SettingsError) as caught:
        given(*needed, **variables)
    return caught.value.faults


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        *(
            ({"ALERT_URL": url}, "ALERT_URL must be a URL that begins with https://")
            for url in (
                "hooks.slack.com/x",
                "http://ntfy.sh/x",
                "https://",
                "https://a:b/c",
                "https://a/b c",
                "ftp://127.0.0.1/x",
            )
        ),
        ({"ALERT_TO": "Ada <ada@acme.example>"}, "ALERT_TO: must be one address without a name"),
        ({"SMTP_PORT": "no"}, "SMTP_PORT: input should be a valid integer"),
        ({"SMTP_PORT": "70000"}, "SMTP_PORT: input should be less than or equal to 65535"),
        ({"SMTP_SECURITY": "ssl"}, "SMTP_SECURITY: input should be 'starttls', 'tls' or 'none'"),
        ({"SMTP_TIMEOUT": "30"}, "SMTP_TIMEOUT: must be a number and a unit: 30s, 5m, 24h or 3d"),
        ({"SMTP_TIMEOUT": "0s"}, "SMTP_TIMEOUT: input should be greater than 0"),
        ({"RETAIN_FAILED": "36601d"}, "RETAIN_FAILED: input should be less than or equal to 3162240000"),
        ({"SMTP_RATE": "14"}, "SMTP_RATE: must be a rate per second, minute, hour or day"),
        ({"SMTP_RATE": "14/s,0/d"}, "SMTP_RATE: must be a rate per second, minute, hour or day"),
        ({"SMTP_RATE": "100000/d"}, "SMTP_RATE: must be a rate per second, minute, hour or day"),
        ({"RETRY_SCHEDULE": "1m,soon"}, "RETRY_SCHEDULE: must be a number and a unit"),
        ({"ON_DOUBT": "maybe"}, "ON_DOUBT: input should be 'retry' or 'hold'"),
        ({"LISTEN": "8000"}, "LISTEN: must be host:port"),
        ({"LISTEN": "127.0.0.1:0"}, "LISTEN: must be host:port"),
        ({"MAX_RECIPIENTS": "0"}, "MAX_RECIPIENTS: input should be greater than or equal to 1"),
        ({"LOG_LEVEL": "loud"}, "LOG_LEVEL: input should be"),
        ({"SMTP_CA_FILE": "/nowhere.pem"}, "SMTP_CA_FILE: path does not point to a file"),
        ({"SMTP_PASSWORD_FILE": "/nowhere"}, "SMTP_PASSWORD_FILE cannot be read: No such file or directory"),
        *(
            ({"SMTP_HOST": host}, "SMTP_HOST: must be a host's name or address alone")
            for host in (  # what other projects were asked about: gitea#22127, ghost#13047, nextcloud/server#1803
                "smtp.example.com:587",
                "smtp://smtp.example.com",
                "https://smtp.example.com/",
                "smtp.example.com ssl",
                "user@smtp.example.com",
                "[smtp.example.com]",
                "-relay",
                "fe80::1% eth0",
            )
        ),
        *(({fault.split(":")[0]: text}, fault) for fault, texts in WRONG.items() for text in texts),
        ({"EHLO_NAME": "web 1"}, "EHLO_NAME: must be a full name, such as mail.example.com"),
        ({"REDIS_URL": "http://x"}, "REDIS_URL must start with redis://"),
        ({"REDIS_URL": "redis://:hunter2/x@host"}, "REDIS_URL must be a URL: write / # ? : @ in its password as"),
        ({"REDIS_URL": "reddis://:hunter2@host"}, "REDIS_URL must start with redis://"),
        ({"API_KEYS": f"a:{DIGEST}:admin"}, "API_KEYS: entry 1 must be name:sha256hex"),
        ({"API_KEYS": "hunter2"}, "API_KEYS: entry 1 must be name:sha256hex"),
        ({"API_KEYS": f"a:{DIGEST},hunter2:hunter2:hunter2"}, "API_KEYS: entry 2 must be name:sha256hex"),
        ({"SMTP_PASSWORD": "hunter2", "DASHBOARD_PASSWORD": "hunter2", "SMTP_PORT": "x"}, "SMTP_PORT: input should be"),
        ({"SMTP_PASSWORD": "hunter2", "SMTP_PASSWORD_FILE": __file__}, "only one of SMTP_PASSWORD and SMTP_PASSWORD_"),
        ({"DKIM_DOMAIN": "acme.example"}, "DKIM_DOMAIN and DKIM_SELECTOR go together"),
        ({"DKIM_DOMAIN": "a b", "DKIM_SELECTOR": "s"}, "DKIM_DOMAIN: must be a domain in ASCII"),
        ({"SMTP_OAUTH": "hunter2"}, "SMTP_OAUTH: must be the JSON that bin/oauth writes"),
        (
            {
                "SMTP_PASSWORD": "hunter2",
                "SMTP_OAUTH": '{"provider": "google", "client_id": "a", "refresh_token": "b"}',
            },
            "only one of SMTP_PASSWORD and SMTP_OAUTH may be set",
        ),
        ({**PLAIN, "SMTP_HOST": "mx.example"}, "SMTP_SECURITY=none would send SMTP_PASSWORD in clear; use starttls"),
    ],
)
def test_a_fault_is_one_sentence_with_its_variable_and_no_secret(variables: dict[str, str], sentence: str) -> None:
    (found,) = faults(**variables)
    assert found.startswith(sentence)
    assert "hunter2" not in found


def test_all_faults_are_told_at_once() -> None:
    found = faults(SMTP_PORT="no", LISTEN="no", ON_DOUBT="no")
    assert [fault.split(":")[0] for fault in found] == ["SMTP_PORT", "LISTEN", "ON_DOUBT"]


@pytest.mark.parametrize("variable", ["SMTP_USERNAME", "SMTP_PASSWORD"])
def test_half_a_login_is_refused_by_who_speaks_to_the_relay(variable: str) -> None:
    found = faults("smtp_host", **{"SMTP_HOST": "smtp.example.com", variable: "ada"})
    assert [fault.split(":")[0] for fault in found] == ["SMTP_USERNAME and SMTP_PASSWORD go together"]
    load("mail_from", mail_from="a@example.com")  # the API, which has no business with the password


@pytest.mark.parametrize(
    "host", ["smtp.example.com", "relay", "mail_relay", "10.0.0.1", "fe80::1%eth0", "smtp.müller.example."]
)
def test_every_host_is_taken(host: str) -> None:
    assert given(SMTP_HOST=host).smtp_host == host


def test_what_a_process_cannot_do_without_is_named() -> None:
    found = faults("smtp_host", "mail_from", "api_keys", "dashboard_password")
    missing = ("SMTP_HOST", "MAIL_FROM", "API_KEYS", "DASHBOARD_PASSWORD")
    assert [fault.split(":")[0] for fault in found] == [f"{name} is not set" for name in missing]


def test_secrets_do_not_show_when_settings_are_printed() -> None:
    url = "redis://:hunter2@127.0.0.1/0"
    current = given(SMTP_USERNAME="ada", SMTP_PASSWORD="hunter2", REDIS_URL=url)
    assert "hunter2" not in repr(current) + str(current)


def test_a_password_may_go_to_a_relay_on_this_machine_in_clear() -> None:
    assert given(SMTP_HOST="127.0.0.1", **PLAIN).smtp_security == "none"


@pytest.mark.parametrize("listen", ["0.0.0.0:8000", "[::]:8000", "10.0.0.1:80", "example.com:80"])
def test_the_key_that_everybody_knows_is_served_on_loopback_only(listen: str) -> None:
    os.environ["API_KEYS"] = f"dev:{hashlib.sha256(b'dev').hexdigest()}"
    for local in ("127.0.0.1:8000", "[::1]:8000", "localhost:8000"):
        given(LISTEN=local)
    assert "the key 'dev', which everybody knows" in faults(LISTEN=listen)[0]


def test_a_secret_can_stand_in_a_file(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(f"shop:{DIGEST}:send\n")
    (tmp_path / "redis").write_text("redis://:pw@127.0.0.1/3\n")
    current = given(API_KEYS_FILE=str(tmp_path / "keys"), REDIS_URL_FILE=str(tmp_path / "redis"))
    assert current.api_keys == (ApiKey("shop", DIGEST, "send"),)
    assert current.redis_url.get_secret_value() == "redis://:pw@127.0.0.1/3"


# fmt: off
ADMITTED = {  # the settings -> addresses to which mail may go, and others
    "": ("a@b.example", ""),
    "MAIL_REDIRECT_TO": ("T@acme.example t@ACME.example", "a@b.example u@acme.example"),
    "MAIL_ALLOWLIST": ("x@b.example ada@C.example", "x@sub.b.example x@ab.example eve@c.example t@acme.example"),
    "MAIL_ALLOWLIST MAIL_REDIRECT_TO": ("x@b.example ada@c.example t@acme.example", "eve@c.example u@acme.example"),
}
# fmt: on


@pytest.mark.parametrize("names", ADMITTED)
def test_mail_may_go_to_all_or_to_whom_staging_names(names: str) -> None:
    given_to = {"MAIL_REDIRECT_TO": "t@acme.example", "MAIL_ALLOWLIST": "B.example, Ada@c.example"}
    current = given(**{name: given_to[name] for name in names.split()})
    admitted, others = (some.split() for some in ADMITTED[names])
    assert [one for one in admitted + others if current.admits(one)] == admitted
    assert sorted(re.findall("MAIL_[A-Z_]+", current.staging)) == names.split()


def test_what_a_key_may_is_read_and_written_back_the_same() -> None:
    may: dict[str, Any] = {
        "full": (None, ()),
        "send:9/m": ((9, 60), ()),
        "test::A.example": (None, ("a.example",)),
    }
    may |= {"send:9/m:a.example+localhost": ((9, 60), ("a.example", "localhost"))}
    written = [f"{number}:{DIGEST}:{one}" for number, one in enumerate(may)]
    read = given(API_KEYS=",".join(written)).api_keys
    assert [(key.rate, key.domains) for key in read] == list(may.values())
    assert [str(key) for key in read] == [one.lower() for one in written]


def test_an_unknown_name_in_dotenv_is_a_fault(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("SMTP_PASWORD=hunter2\n")
    assert faults() == [".env line 1: SMTP_PASWORD is not a setting; did you mean SMTP_PASSWORD?"]


def test_a_service_of_systemd_finds_its_settings_in_credentials(tmp_path: Path) -> None:
    credentials = tmp_path / "credentials"
    credentials.mkdir()
    (tmp_path / ".env").write_text("MAIL_FROM=not@example.com\n")
    (credentials / "async-email.env").write_text("SMTP_HOST=smtp.example.com\nSMTP_USERNAME=ada\n")
    (credentials / "smtp_password").write_text("hunter2\n")
    (credentials / "redis_url").write_text("")
    current = given(CREDENTIALS_DIRECTORY=str(credentials))
    assert (current.smtp_host, current.smtp_username, current.mail_from) == ("smtp.example.com", "ada", None)
    assert current.smtp_password is not None
    assert current.smtp_password.get_secret_value() == "hunter2"
    assert current.redis_url.get_secret_value() == "redis://127.0.0.1:6379/0"
    (credentials / "async-email.env").write_text("SMTP_HOTS=smtp.example.com\n")
    assert faults() == ["async-email.env line 1: SMTP_HOTS is not a setting; did you mean SMTP_HOST?"]


def test_the_environment_wins_over_dotenv_and_empty_is_unset(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("SMTP_HOST=from-file\nMAIL_FROM=a@example.com\nSMTP_PORT=\n")
    current = given(SMTP_HOST="from-environment")
    assert (current.smtp_host, current.mail_from, current.smtp_port) == ("from-environment", "a@example.com", 587)


def test_port_465_means_implicit_tls() -> None:
    assert load().smtp_security == "starttls"
    assert given(SMTP_PORT="465").smtp_security == "tls"


def test_durations_lists_addresses_and_rates_are_read() -> None:
    variables = {"RETRY_SCHEDULE": "90s, 5m,2h,1d", "LISTEN": "[::1]:8080", "SMTP_RATE": "14/s, 30/m,2000/d"}
    current = given(**variables)
    assert current.smtp_rate == ((14, 1), (30, 60), (2000, 86400))
    assert current.retry_schedule == (90, 300, 7200, 86400)
    assert current.listen == Address("::1", 8080)
    assert str(current.listen) == "[::1]:8080"


def test_env_example_the_documentation_and_the_code_list_the_same_settings_and_defaults() -> None:
    example = dict(re.findall(r"^#?([A-Z_]+)=(.*)$", (ROOT / ".env.example").read_text(), re.MULTILINE))
    rows = re.findall(r"^\| (`[A-Z_`, ]+`) \|(?: ?`([^`]*)`)?", (ROOT / "docs/settings.md").read_text(), re.MULTILINE)
    documented = {name: default for names, default in rows for name in re.findall("[A-Z_]+", names)}
    assert example == documented | {name: "" for name in documented if name.endswith("_FILE")}
    defaults = {name.upper(): value for name, value in load()}
    assert example.keys() == defaults.keys()
    assert [name for name in example if example[name]] == [name for name in example if defaults[name] not in (None, ())]
    assert {name.upper(): value for name, value in given(**example)} == defaults
