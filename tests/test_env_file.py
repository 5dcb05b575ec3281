"""Files of settings: what people write into them is read as it was meant, or refused with its line.

The samples are from reports about other projects, named beside them.
"""

from __future__ import annotations

from pathlib import Path

import pytest

import settings
from process.env_file import FORM, Unreadable, read

SECRET = "hunter2"


def faults(path: Path, content: bytes) -> list[str]:
    path.write_bytes(content)
    with pytest.raises(Unreadable) as caught:
        read(path)
    return caught.value.faults


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ('ON_DOUBT="hold', FORM),  # python-dotenv#266: a quote that is not closed
        ("RETAIN_SENT='30d", FORM),
        ('SMTP_RATE="14/s" ,2000/d', FORM),  # python-dotenv#544: text behind the closing quote
        ('MAIL_FROM="Acme, Inc." <hello@example.com>', FORM),  # python-dotenv#356
        ('SMTP_PASSWORD="C:\\temp"', "must have no backslash within quotes"),  # symfony#29129: \t becomes a tab
        ("SMTP_PASSWORD='it\\'s'", "must have no backslash within quotes"),
        ('ON_DOUBT="hold\nSMTP_RATE=14/s"', "must have its closing quote on the same line"),
        ("SMTP_PASSWORD=a\0b", "must have no control character"),
    ],
)
def test_a_line_that_is_not_what_it_was_meant_to_be_is_named(tmp_path: Path, line: str, fault: str) -> None:
    found = faults(tmp_path / ".env", f"# a comment\n\nLOG_LEVEL=INFO\n\n{line}\nLISTEN=127.0.0.1:80\n".encode())
    assert len(found) == 1
    assert found[0].startswith(f".env line 5: {line.partition('=')[0]} {fault}")


def test_a_line_of_capitals_alone_may_be_a_secret_and_is_not_shown(tmp_path: Path) -> None:
    assert "AKIAIOSFODNN7EXAMPLE" not in faults(tmp_path / ".env", b"SMTP_PASSWORD=\nAKIAIOSFODNN7EXAMPLE\n")[0]


NAMES = [  # what a file says, and what is said of it
    ("MAIL_FORM=a@b.co", [".env line 1: MAIL_FORM is not a setting; did you mean MAIL_FROM?"]),
    ("\nsmtp_port=25", [".env line 2: smtp_port is not a setting; did you mean SMTP_PORT?"]),
    ("SMTP_PASS=hunter2", [".env line 1: SMTP_PASS is not a setting; did you mean SMTP_PASSWORD?"]),
    ("DEBUG=1", [".env line 1: DEBUG is not a setting; see .env.example for the names"]),
    ("RQ_KEY_PREFIX=x", [".env line 1: RQ_KEY_PREFIX must be in the environment: see docs/scale.md"]),
    ("SMTP_PORT=25\nSMTP_PORT=26", [".env line 2: SMTP_PORT has another value in line 1; only one may stay"]),
    ("ON_DOUBT=hold\n\nexport ON_DOUBT=", [".env line 3: ON_DOUBT has another value in line 1; only one may stay"]),
    ("X=1\nSMTP_HOST=a\nSMTP_HOST=b", [".env line 1: X is not", ".env line 3: SMTP_HOST has another"]),
    ("SMTP_PORT=25\nSMTP_PORT=25\nON_DOUBT=\nON_DOUBT=hold\nNOTHING=", []),  # can be read in one way only
]


@pytest.mark.parametrize(("text", "told"), NAMES)
def test_a_name_that_is_none_or_has_two_values_is_a_fault(tmp_path: Path, text: str, told: list[str]) -> None:
    (tmp_path / ".env").write_text(text)
    found: list[str] = []
    try:
        assert settings.from_file(tmp_path / ".env") == {"smtp_port": "25", "on_doubt": "hold"}
    except settings.SettingsError as error:
        found = error.faults
    assert [fault[: len(begin)] for fault, begin in zip(found, told, strict=True)] == told


@pytest.mark.parametrize(
    "line",
    [f"SMTP PASSWORD={SECRET}", f'SMTP_PASSWORD="{SECRET}', SECRET, f"SMTP_PASSWORD: {SECRET}", f"'{SECRET}\\'' = 1"],
)
def test_no_fault_shows_what_may_be_a_secret(tmp_path: Path, line: str) -> None:
    assert SECRET not in " ".join(faults(tmp_path / ".env", line.encode()))


def test_a_name_without_a_value_is_a_fault(tmp_path: Path) -> None:
    """docker/compose#4189."""
    assert faults(tmp_path / ".env", b"SMTP_HOST\n") == [f".env line 1: it {FORM}"]


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ("pa#ss$w0rd", "pa#ss$w0rd"),
        ("${HOME}$x`y`", "${HOME}$x`y`"),  # vaultwarden#2402, python-dotenv#92: `$` in a password
        ("'a #b'", "a #b"),
        ('"a #b"  # the shop', "a #b"),
        ("it's", "it's"),
        ("C:\\temp\\", "C:\\temp\\"),
        ("'\"Acme, Inc.\" <hello@example.com>'", '"Acme, Inc." <hello@example.com>'),
        ("", ""),
    ],
)
@pytest.mark.parametrize("prefix", ["", "export "])
def test_a_value_is_taken_to_the_letter(tmp_path: Path, line: str, value: str, prefix: str) -> None:
    (tmp_path / ".env").write_text(f"{prefix}NAME={line}\n")
    assert [(one.name, one.value) for one in read(tmp_path / ".env")] == [("NAME", value)]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_every_encoding_of_an_editor_is_read(tmp_path: Path, encoding: str, end: str) -> None:
    (tmp_path / ".env").write_bytes(f"SMTP_USERNAME=Grüße€{end}SMTP_PORT=25{end}".encode(encoding))
    assert [one.value for one in read(tmp_path / ".env")] == ["Grüße€", "25"]


def test_another_encoding_is_named_with_its_line(tmp_path: Path) -> None:
    assert faults(tmp_path / ".env", "A=1\nB=Grüße".encode("latin-1")) == [".env line 2: it must be UTF-8 text"]


def test_all_faults_are_told_at_once_and_stop_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".env").write_text("ON_DOUBT='hold\nLOG_LEVEL=INFO\nSMTP_RATE=\"14/s\n")
    with pytest.raises(settings.SettingsError) as caught:
        settings.load()
    assert [one.partition(" must")[0] for one in caught.value.faults] == [
        ".env line 1: ON_DOUBT",
        ".env line 3: SMTP_RATE",
    ]


@pytest.mark.parametrize("name", settings.VERBATIM)
def test_a_hash_that_would_cut_a_value_is_a_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".env").write_text(f"ON_DOUBT=hold  # as agreed\n{name.upper()}={SECRET} #1\n")
    with pytest.raises(settings.SettingsError) as caught:
        settings.load()
    assert caught.value.faults == [f".env line 2: {settings.CUT.format(name.upper())}"]


def test_no_file_is_no_settings(tmp_path: Path) -> None:
    assert read(tmp_path / ".env") == []


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_blank_lines_of_any_kind_are_counted(tmp_path: Path, end: str) -> None:
    assert faults(tmp_path / ".env", f"A=1{end * 3}SMTP_HOST{end}".encode())[0].startswith(".env line 4: it ")
