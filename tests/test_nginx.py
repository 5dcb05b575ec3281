"""The nginx site in front of the real service: what it lets through, what it refuses, and in which words.

nginx runs as whoever runs the tests, on a free port, with the site as it stands but for the places named in `written`.
127.0.0.1 is what it is on a server; 127.0.0.2 stands for the address at which the public reaches it.
"""

from __future__ import annotations

import base64
import http.client
import ipaddress
import json
import re
import signal
import socket
import ssl
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import pytest

from settings import Settings
from tests.http_api import MAIL, UNKNOWN_ID, WELCOME
from tests.operations import block
from tests.programs import program
from tests.servers import ROOT, Answer, Api, House, eventually, free_port, heard
from web import app, body, octets

SITE = (ROOT / "nginx" / "async-email.conf").read_text()
HERE, OUTSIDE = "127.0.0.1", "127.0.0.2"
SETTINGS = {"DASHBOARD_PASSWORD": "open"}


def at_home(front: Api) -> Api:
    """The site, as this machine itself reaches it."""
    return Api(front.port, front.key, HERE)


def written(directory: Path, **places: str) -> Path:
    """A whole configuration around the site, for an nginx without root, in one process that stays in the foreground.

    The site has other places; each must stand there exactly as often as it is known to.
    """
    site = SITE
    for old, new, times in (
        ("listen 80 default_server;", f"listen {OUTSIDE}:{places['port']} default_server;", 1),
        ("listen 127.0.0.1:80;", f"listen {HERE}:{places['port']};", 1),
        ("    listen [::]:80 default_server;\n", "", 1),  # not every machine that runs tests has IPv6
        ("unix:/run/async-email/api.sock", places["api"], 1),
        ("http://127.0.0.1:9181", f"http://127.0.0.1:{places.get('dashboard', '1')}", 1),
        ("proxy_read_timeout 30s", f"proxy_read_timeout {places.get('patience', '30s')}", 2),
        ("    100.64.0.0/10 0;", f"    {places.get('private', '100.64.0.0/10')} 0;", 1),
        ("burst=200", f"burst={places.get('burst', '200')}", 1),
        ("rate=100r/s", f"rate={places.get('rate', '100r/s')}", 1),
    ):
        assert site.count(old) == times, old
        site = site.replace(old, new)
    (directory / "site.conf").write_text(site)
    temporary = "".join(f"{kind}_temp_path tmp;\n" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
    (directory / "nginx.conf").write_text(
        f"daemon off; master_process off; pid pid; error_log error.log;\nevents {{}}\nhttp {{\naccess_log access.log;\n"
        f"{temporary}include site.conf;\n}}\n"
    )
    return directory / "nginx.conf"


def nginx(directory: Path, *arguments: str) -> list[str]:
    return [program("REQUIRE_NGINX", "nginx"), "-p", str(directory), "-c", "nginx.conf", "-e", "error.log", *arguments]


@contextmanager
def serving(directory: Path, **places: str) -> Iterator[Api]:
    directory.mkdir(exist_ok=True)
    port = free_port()
    written(directory, port=str(port), **places)
    process = subprocess.Popen(nginx(directory), stderr=subprocess.DEVNULL)
    try:
        front = Api(port, host=OUTSIDE)
        eventually(lambda: front.answers("/nothing", 404))
        yield front
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


@pytest.fixture(scope="module")
def front(house: House, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    program("REQUIRE_NGINX", "nginx")
    dashboard = free_port()
    house.environment |= {"DASHBOARD_LISTEN": f"127.0.0.1:{dashboard}", "PYTHONPATH": str(ROOT)}
    house.run("dashboard", "-m", "ops.dashboard")
    api = house.api()
    with serving(tmp_path_factory.mktemp("nginx"), api=f"{HERE}:{api.port}", dashboard=str(dashboard)) as front:
        yield front


def is_ours(answer: Answer, status: int, type_: str) -> bool:
    """Whether it is the one error shape."""
    assert answer.status == status, answer
    assert set(answer.body) == {"statusCode", "name", "type", "message", "request_id"}
    assert answer.body["request_id"] == answer.headers["X-Request-Id"]
    return (answer.body["statusCode"], answer.body["type"]) == (status, type_)


# --- the file ---------------------------------------------------------------------------------------------------------


def test_nginx_takes_it(tmp_path: Path) -> None:
    written(tmp_path, port=str(free_port()), api="unix:/run/async-email/api.sock")
    ran = subprocess.run(nginx(tmp_path, "-t"), capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert "[warn]" not in ran.stderr


def test_a_certificate_of_ones_own_takes_one_command_and_closes_port_80(tmp_path: Path) -> None:
    """The page's own."""
    port, tls = free_port(), free_port()
    written(tmp_path, port=str(port), api=f"{HERE}:1")
    (tmp_path / "site.conf").write_text(SITE)
    edit = next(one for one in block("#tls: ").splitlines() if "sed -i" in one).removeprefix("sudo ")
    subprocess.run(
        edit.replace("/etc/nginx/sites-available/async-email", "site.conf"), shell=True, cwd=tmp_path, check=True
    )
    site = (tmp_path / "site.conf").read_text()
    assert re.findall(r"^    listen (.*);$", site, re.MULTILINE) == [
        "443 ssl default_server",
        "[::]:443 ssl default_server",
        "127.0.0.1:80",
    ]
    for old, new in (
        ("    listen [::]:443 ssl default_server;\n", ""),
        ("listen 443 ssl", f"listen {OUTSIDE}:{tls} ssl"),
        ("127.0.0.1:80;", f"127.0.0.1:{port};"),
        ("/etc/ssl/async-email.crt", "site.crt"),
        ("/etc/ssl/private/async-email.key", "site.key"),
        ("unix:/run/async-email/api.sock", f"{HERE}:1"),
    ):
        site = site.replace(old, new)
    (tmp_path / "site.conf").write_text(site)
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=x", "-days", "2"]
    subprocess.run([*command, "-keyout", "site.key", "-out", "site.crt"], check=True, capture_output=True, cwd=tmp_path)
    with subprocess.Popen(nginx(tmp_path), stderr=subprocess.DEVNULL) as process:
        try:
            eventually(lambda: Api(port, host=HERE).answers("/nothing", 502))
            context = ssl._create_unverified_context()
            with closing(http.client.HTTPSConnection(OUTSIDE, tls, timeout=10, context=context)) as connection:
                connection.request("GET", "/nothing")
                answer = heard(connection.getresponse())
            assert is_ours(answer, 404, "not_found")
            assert answer.headers["Strict-Transport-Security"] == "max-age=31536000"
            plain = Api(tls, host=OUTSIDE).get("/nothing")
            assert is_ours(plain, 400, "validation_error")
        finally:
            process.terminate()


def test_gixy_finds_nothing_unsafe(tmp_path: Path) -> None:
    """Of medium or higher severity, in the site as it stands."""
    configuration = written(tmp_path, port="80", api="unix:/run/async-email/api.sock")
    (tmp_path / "site.conf").write_text(SITE)
    gixy = [str(Path(sys.executable).with_name("gixy")), "-ll", "--format=json", str(configuration)]
    ran = subprocess.run(gixy, capture_output=True, text=True)
    assert json.loads(ran.stdout) == [], ran.stdout
    assert ran.returncode == 0


def test_it_knows_what_the_newest_nginx_has_renamed() -> None:
    """Ubuntu 22.04 has nginx 1.18."""
    assert not re.search(r"^\s*(http2|ssl_reject_handshake|quic|http3)\b", SITE, re.MULTILINE)


def test_its_limits_are_the_services_own() -> None:
    sizes = re.findall(r"client_max_body_size ([0-9]+)([km]);", SITE)
    found = {int(number) * {"k": 1024, "m": 2**20}[unit] for number, unit in sizes}
    whole = Settings().max_message_bytes
    assert found == {body.SMALL_BODY, whole, octets.ON_THE_WIRE * whole}


# --- what passes ------------------------------------------------------------------------------------------------------


def test_a_mail_is_accepted(front: Api) -> None:
    bodies = {"/start-job": WELCOME, "/emails": MAIL, "/emails/batch": [MAIL, MAIL]}
    assert [front.post(path, body).status for path, body in bodies.items()] == [202, 200, 200]


@pytest.mark.parametrize("path", ["/emails", "/emails/batch"])
def test_attachments_pass_where_they_may_come(front: Api, path: str) -> None:
    content = base64.b64encode(bytes(2**20)).decode()
    mail = MAIL | {"attachments": [{"filename": "zeros", "content": content}]}
    assert front.post(path, [mail] if path.endswith("batch") else mail).status == 200


@pytest.mark.parametrize(("method", "rule", "scope"), [(route[0], route[1], route[3]) for route in app.ROUTES])
def test_each_route_is_public_and_wants_a_key_or_is_for_this_machine(
    front: Api, method: str, rule: str, scope: str | None
) -> None:
    path = re.sub(r"<\w+>", UNKNOWN_ID, rule)
    outside, here = (one.call(method, path, headers={"Authorization": ""}) for one in (front, at_home(front)))
    assert here.status == outside.status or not scope
    if scope:
        assert (outside.status, outside.body["name"]) == (401, "missing_api_key")
    elif rule.startswith(("/healthz", "/openapi.json", "/docs")):
        assert outside.status == here.status == (404 if "<" in rule else 200)
    else:
        assert is_ours(outside, 404, "not_found")
        assert here.status in (200, 503)


@pytest.mark.parametrize("path", ["/metrics", "/readyz", "/rq/", "/mail/", "/mail", "/rq/static/css/main.css"])
@pytest.mark.parametrize("claim", ["X-Forwarded-For", "X-Real-IP", "Forwarded"])
def test_what_is_for_this_machine_is_refused_whatever_a_client_claims(front: Api, path: str, claim: str) -> None:
    assert is_ours(front.call("GET", path, headers={"Host": "localhost", claim: "127.0.0.1"}), 404, "not_found")


def test_the_dashboard_is_there_for_this_machine_and_asks_who_it_is(front: Api) -> None:
    here, login = at_home(front), "Basic " + base64.b64encode(b"admin:open").decode()
    eventually(lambda: here.get("/rq/").status == 401)
    for page in ("/rq", "/mail"):
        assert here.get(page).headers["Location"] == f"{page}/"
    assert here.call("GET", "/mail/activity", headers={"Authorization": login}).status == 200
    answer = here.call("GET", "/rq/", headers={"Authorization": login})
    assert answer.status == 200
    assert "/rq/static/" in answer.body


def test_the_services_own_errors_pass_as_they_are(front: Api) -> None:
    invalid = front.post("/emails", {"to": "nobody", "subject": "s", "text": "t"})
    assert (invalid.status, invalid.body["errors"][0]["field"]) == (422, "to[0]")
    method = front.get("/start-job")
    assert (method.status, method.body["message"]) == (405, "the method must be one of POST")
    unknown = front.get(f"/emails/{UNKNOWN_ID}")
    assert (unknown.status, unknown.body["name"]) == (404, "not_found")


def test_one_request_id_goes_all_the_way(front: Api, house: House) -> None:
    answer = front.post("/start-job", WELCOME, X_Request_Id="shop.4711")
    assert answer.headers["X-Request-Id"] == "shop.4711"
    assert "request_id=shop.4711" in house.log("api")
    made = front.post("/start-job", WELCOME, X_Request_Id="not an id")
    assert re.fullmatch("[0-9a-f]{32}", made.headers["X-Request-Id"])
    assert front.call("GET", "/nothing", headers={"X-Request-Id": "shop.4712"}).body["request_id"] == "shop.4712"


# --- what nginx refuses -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/", "/index.php", "/emailsx", "/start-job/", "/.env"])
def test_what_does_not_exist_is_not_found(front: Api, path: str) -> None:
    answer = front.get(path)
    assert is_ours(answer, 404, "not_found")
    assert answer.headers["Server"] == "nginx"  # without its version
    assert "Strict-Transport-Security" not in answer.headers  # this is plain HTTP


@pytest.mark.parametrize(
    ("path", "size"),
    [("/start-job", 70_000), ("/jobs", 70_000), (f"/jobs/{UNKNOWN_ID}/requeue", 70_000), ("/emails", 41 * 2**20)],
)
def test_a_body_over_the_limit_is_refused_before_it_is_sent(front: Api, path: str, size: int) -> None:
    answer = front.call("POST", path, headers={"Content-Length": str(size)})
    assert is_ours(answer, 413, "request_too_large")


def test_what_is_no_request_is_refused_in_the_same_shape(front: Api) -> None:
    assert is_ours(front.call("GET", "/", headers={"Host": "a b"}), 400, "validation_error")


HOST = b"Host: x\r\n"
NO_REQUESTS = [  # bytes -> status and name
    (b"GET  HTTP/1.1\r\n" + HOST, 400, "validation_error"),
    (b"GET foo HTTP/1.1\r\n" + HOST, 400, "validation_error"),
    (b"get / HTTP/1.1\r\n" + HOST, 400, "validation_error"),
    (b"GET / HTTP/1.2.3\r\n" + HOST, 400, "validation_error"),
    (b"GET / HTTP/2.0\r\n" + HOST, 400, "validation_error"),
    (b"PRI * HTTP/2.0\r\n", 400, "validation_error"),  # HTTP/2 with prior knowledge
    (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n", 400, "validation_error"),  # TLS where there is none
    (b"OPTIONS * HTTP/1.1\r\n" + HOST, 400, "validation_error"),
    (b"CONNECT mail.example.com:25 HTTP/1.1\r\n" + HOST, 400, "validation_error"),
    (b"GET /%zz HTTP/1.1\r\n" + HOST, 400, "validation_error"),
    (b"GET /%00 HTTP/1.1\r\n" + HOST, 400, "validation_error"),
    (b"GET /../../etc/passwd HTTP/1.1\r\n" + HOST, 400, "validation_error"),
    (b"GET / HTTP/1.1\r\n", 400, "validation_error"),
    (b"GET / HTTP/1.1\r\n" + HOST + HOST, 400, "validation_error"),
    (b"GET / HTTP/1.1\r\n" + HOST + b"A B: c\r\n", 400, "validation_error"),
    (b"GET / HTTP/1.1\r\n" + HOST + b"A: \0\r\n", 400, "validation_error"),
    (b"POST /emails HTTP/1.1\r\n" + HOST + b"Content-Length: x\r\n", 400, "validation_error"),
    (b"POST /emails HTTP/1.1\r\n" + HOST + b"Content-Length: 1\r\nContent-Length: 2\r\n", 400, "validation_error"),
    (b"POST /emails HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: gzip\r\n", 501, "not_implemented"),
    (b"TRACE / HTTP/1.1\r\n" + HOST, 405, "method_not_allowed"),
    (b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\n" + HOST, 414, "validation_error"),
    (b"GET /emails?" + b"a" * 40_000 + b" HTTP/1.1\r\n" + HOST, 414, "validation_error"),
    (b"GET / HTTP/1.1\r\n" + HOST + b"X: " + b"a" * 9000 + b"\r\n", 431, "request_headers_too_large"),
    (b"GET / HTTP/1.1\r\n" + HOST + (b"X: " + b"a" * 900 + b"\r\n") * 60, 431, "request_headers_too_large"),
]


@pytest.mark.parametrize("at", [HERE, OUTSIDE])
@pytest.mark.parametrize(("sent", "status", "name"), NO_REQUESTS)
def test_whatever_is_no_request_is_answered_in_the_same_shape(
    front: Api, at: str, sent: bytes, status: int, name: str
) -> None:
    """nginx answered 500 in HTML: what has no path cannot be led to a named location."""
    with socket.create_connection((at, front.port), 10) as connection:
        with suppress(OSError):
            connection.sendall(sent + b"\r\n")
        answer = http.client.HTTPResponse(connection)
        answer.begin()
        assert is_ours(heard(answer), status, name)


def test_an_application_server_on_the_same_network_is_not_limited(tmp_path: Path) -> None:
    """Of 1,000 requests a second, 900 were refused. A stranger's limits stay."""
    neighbour, stranger = "127.0.0.3", "127.0.0.4"
    with serving(tmp_path, api=f"{HERE}:1", private=f"{neighbour}/32", rate="1r/m", burst="5") as front:
        seen = {
            who: Counter(ask_from(who, front.port, "/healthz") for _ in range(300 if who == neighbour else 10))
            for who in (neighbour, stranger)
        }
    assert seen[neighbour] == {502: 300}
    assert seen[stranger][429] >= 4


def ask_from(address: str, port: int, path: str) -> int:
    with closing(http.client.HTTPConnection(OUTSIDE, port, timeout=10, source_address=(address, 0))) as connection:
        connection.request("GET", path)
        return connection.getresponse().status


@pytest.mark.parametrize(
    ("address", "limited"),
    [
        ("10.1.2.3", False),
        ("172.31.255.254", False),
        ("192.168.1.10", False),
        ("100.100.0.1", False),
        ("fd12:3456::1", False),
        ("172.32.0.1", True),
        ("203.0.113.7", True),
        ("2001:db8::1", True),
        ("11.0.0.1", True),
    ],
)
def test_private_networks_are_those_of_the_rfcs(address: str, limited: bool) -> None:
    networks = re.findall(r"^    (\S+/\d+) 0;$", SITE, re.MULTILINE)
    assert len(networks) == 6
    assert all(ipaddress.ip_network(one).is_private or one == "100.64.0.0/10" for one in networks)
    assert any(ipaddress.ip_address(address) in ipaddress.ip_network(one) for one in networks) is not limited


def test_too_many_requests_are_told_when_to_come_again(tmp_path: Path) -> None:
    with serving(tmp_path, api=f"{HERE}:1", rate="1r/m", burst="5") as front:
        seen = [front.get("/healthz") for _ in range(10)]
    assert is_ours(seen[-1], 429, "rate_limit_exceeded")
    assert seen[-1].headers["Retry-After"] == "1"
    [rate] = re.findall(r"rate=(\d+)r/s;", SITE)
    told = {name: value for name, value in seen[-1].headers.items() if name.startswith("ratelimit-")}
    assert told == {
        **{"ratelimit-limit": rate, "ratelimit-policy": f"{rate};w=1"},
        **{"ratelimit-remaining": "0", "ratelimit-reset": "1"},
    }


@pytest.mark.parametrize("at", [HERE, OUTSIDE])
def test_a_service_that_is_away_is_said_in_the_same_shape(tmp_path: Path, at: str) -> None:
    with serving(tmp_path, api=f"unix:{tmp_path}/nobody.sock") as front:
        answer = Api(front.port, host=at).post("/emails", {})
    assert is_ours(answer, 502, "service_unavailable")
    assert answer.headers["Retry-After"] == "5"
    assert not [name for name in answer.headers if name.startswith("ratelimit-")]


@pytest.mark.parametrize("at", [HERE, OUTSIDE])
def test_an_address_in_a_path_is_in_no_log_whatever_becomes_of_the_request(tmp_path: Path, at: str) -> None:
    with serving(tmp_path, api=f"unix:{tmp_path}/nobody.sock") as front:
        there = Api(front.port, host=at)
        assert is_ours(there.get("/suppressions/ada@example.com"), 502, "service_unavailable")
        assert is_ours(there.post("/suppressions/ada@example.com", "x" * 41 * 2**20), 413, "request_too_large")
        there.get("/suppressions")
    access, errors = ((tmp_path / name).read_text() for name in ("access.log", "error.log"))
    for log in (access, errors):
        assert "GET /suppressions HTTP" in log
        assert "ada" not in log


def test_a_request_without_an_answer_is_not_sent_a_second_time(tmp_path: Path) -> None:
    with socket.create_server((HERE, 0)) as silent:
        api = f"{HERE}:{silent.getsockname()[1]}"
        with serving(tmp_path, api=api, patience="1s") as front:
            answer = front.post("/emails", MAIL)
        assert is_ours(answer, 504, "service_unavailable")
        silent.settimeout(1)
        silent.accept()[0].close()
        with pytest.raises(TimeoutError):
            silent.accept()
