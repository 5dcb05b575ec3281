"""HTTP/1.1 as raw bytes on a socket (RFC 9110, 9112): what is read, what is refused, and what that costs."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from typing import Any

import pytest

from tests import http_api
from tests.fuzz_targets import check_http
from tests.http_api import app_with, ask, held_to_the_shape, spoken
from web import grammar, server

LIMIT = 100_000  # bytes of a body


class Echo(server.Application):
    """An application that answers with what it was asked."""

    answered = 0

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        body = environ["wsgi.input"].read().decode("latin-1")
        headers = {name[5:]: value for name, value in environ.items() if name.startswith("HTTP_")}
        start_response("200 OK", [("Content-Type", "application/json")])
        seen = {"method": environ["REQUEST_METHOD"], "uri": environ["REQUEST_URI"], "headers": headers, "body": body}
        return [json.dumps(seen).encode()]


@pytest.fixture(scope="module")
def running() -> Iterator[server.Server]:
    with http_api.running(Echo(), LIMIT) as (made, _):
        yield made


@pytest.fixture
def port(running: server.Server) -> int:
    return int(running.waitress.effective_port)


def get(*headers: str, path: str = "/") -> bytes:
    return "\r\n".join([f"GET {path} HTTP/1.1", "Host: a", *headers, "", ""]).encode("latin-1")


def post(*headers: str, body: bytes = b"", version: str = "1.1") -> bytes:
    return "\r\n".join([f"POST / HTTP/{version}", "Host: a", *headers, "", ""]).encode("latin-1") + body


# --- Expect: 100-continue ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [[], ["Content-Length: 0"]], ids=["no length", "length 0"])
def test_a_request_without_a_body_is_answered_whatever_it_expects(port: int, length: list[str]) -> None:
    first = get("Expect: 100-continue", "Authorization: Bearer secret", *length)
    one, two = spoken(port, first, get("X-Second: 1"))
    assert (one.status, one.body["headers"]["AUTHORIZATION"]) == (200, "Bearer secret")
    assert (two.status, two.body["headers"]) == (200, {"HOST": "a", "X_SECOND": "1"})


def test_what_a_proxy_would_say_of_the_client_is_not_believed(port: int) -> None:
    [seen] = spoken(port, get("X-Forwarded-For: 192.0.2.1", "X-Forwarded-Host: b", "Forwarded: host=b", "X-Other: c"))
    assert seen.body["headers"] == {"HOST": "a", "X_OTHER": "c"}


def test_a_body_that_is_announced_is_asked_for(port: int) -> None:
    head = post("Expect: 100-continue", "Content-Length: 2")
    go_on, answer, other = spoken(port, head, b"hi", get())
    assert (go_on.status, answer.status, answer.body["body"]) == (100, 200, "hi")
    assert (other.status, other.body["headers"], other.body["body"]) == (200, {"HOST": "a"}, "")


# --- what may be read in two ways is refused --------------------------------------------------------------------------

CHUNKED = "Transfer-Encoding: chunked"
EMPTY_CHUNK = b"0\r\n\r\n"
TOO_LARGE = f"Content-Length: {LIMIT + 1}"
# fmt: off
AMBIGUOUS = {
    "line that is no request": b"nonsense\r\n\r\n",
    "method in lower case": b"get" + get()[3:],
    "HTTP/0.9": b"GET /healthz\r\n\r\n",
    "HTTP/1.2": post(CHUNKED, body=EMPTY_CHUNK, version="1.2"),
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "URL that cannot be split": get(path="http://["),
    "header without a colon": get("nonsense"),
    "space before the colon": get("X : 1"),
    "NUL in a header": get("X: a\0b"),
    "bare LF in a header": get("X: a\nY: b"),
    **{f"Content-Length: {length[:9]}": post(f"Content-Length: {length}")
       for length in ("-1", "+5", "five", "1_0", "0x10", "1, 1", "", "1" * 5000, "²")},
    "two Content-Lengths": post("Content-Length: 2", "Content-Length: 3", body=b"{}x"),
    "chunk without a size": post(CHUNKED, body=b"zz\r\n{}\r\n" + EMPTY_CHUNK),
    "chunks in HTTP/1.0": post(CHUNKED, body=EMPTY_CHUNK, version="1.0"),
    "both in HTTP/1.0": post("Content-Length: 5", CHUNKED, body=EMPTY_CHUNK, version="1.0"),
    "chunked after a tab that is none": post("Transfer-Encoding: \x0bchunked"),
    "smuggled by Content-Length and chunks":
        post(f"Content-Length: {len(EMPTY_CHUNK + get())}", CHUNKED, body=EMPTY_CHUNK + get()),
    "smuggled by chunks and Content-Length": post(CHUNKED, "Content-Length: 5", body=EMPTY_CHUNK),
    "blank before the method": b" " + get(),
    "tab before the method": b"\t" + get(),
    "bare LF before the request": b"\n" + get(),
    "form feed after an empty line": b"\r\n\x0c" + get(),
    "three empty lines before the request": b"\r\n" * 3 + get(),
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    "two blanks": b"GET  / HTTP/1.1\r\nHost: a\r\n\r\n",
    "blank after the version": b"GET / HTTP/1.1 \r\nHost: a\r\n\r\n",
    "tabs for blanks": b"GET\t/\tHTTP/1.1\r\nHost: a\r\n\r\n",
    "letter that is not ASCII in the URL": get(path="/\xe9"),
    "fragment in the URL": get(path="/a#b"),
    "method of 33 letters": b"G" * 33 + get()[3:],
    "no Host": b"GET / HTTP/1.1\r\n\r\n",
    "two Hosts": get("Host: b"),
    "the same Host twice": get("Host: a"),
    "two Hosts in HTTP/1.0": b"GET / HTTP/1.0\r\nHost: a\r\nHost: b\r\n\r\n",
    "Host with a blank": b"GET / HTTP/1.1\r\nHost: a b\r\n\r\n",
    "Host with a path": b"GET / HTTP/1.1\r\nHost: a/b\r\n\r\n",
    "Host with a user": b"GET / HTTP/1.1\r\nHost: u@a\r\n\r\n",
    "folded line": get("X: 1", " 2"),
    "folded line with a tab": get("X: 1", "\t2"),
    "bare CR in a header": get("X: 1\r2"),
    "DEL in a header": get("X: \x7f"),
    "name that is empty": get(": 1"),
    "nine blanks before a value": get("X:" + 9 * " " + "1"),
    "101 headers": get(*["X: 1"] * 100),
    **{f"chunk {number}": post(CHUNKED, body=body) for number, body in enumerate([
        b"2\nhi\r\n0\r\n\r\n", b"2\r\nhi\n0\r\n\r\n", b"2\r\nhi0\r\n\r\n", b"2\r\nhix\r\n0\r\n\r\n",
        b"2;a\n\r\nhi\r\n0\r\n\r\n", b"2;a\nb\r\nhi\r\n0\r\n\r\n", b"2;\r\nhi\r\n0\r\n\r\n",
        b'2;a="b\r\nhi\r\n0\r\n\r\n', b"2 \r\nhi\r\n0\r\n\r\n", b" 2\r\nhi\r\n0\r\n\r\n", b"0x2\r\nhi\r\n0\r\n\r\n",
        b"+2\r\nhi\r\n0\r\n\r\n", b"-2\r\nhi\r\n0\r\n\r\n", b"\r\n2\r\nhi\r\n0\r\n\r\n", b"2\r\nhi\r\n\r\n0\r\n\r\n",
        b"00000000000000002\r\nhi\r\n0\r\n\r\n", b"2\r\nhi\r\n0\r\njunk\r\n\r\n", b"2\r\nhi\r\n0\r\nX: 1\n\r\n",
        b"2\r\nhi\r\n0\r\n X: 1\r\n\r\n", b"2\r\nhi\r\n0\r\n\n", b"2;" + b"a" * 2000,
        b"2\r\nhi\r\n0\r\n" + b"X: 1\r\n" * 300, b"0" * 2000,
    ])},
    "chunked, chunked": post("Transfer-Encoding: chunked, chunked", body=EMPTY_CHUNK),
    "chunked twice": post(CHUNKED, CHUNKED, body=EMPTY_CHUNK),
    "chunked and a comma": post("Transfer-Encoding: chunked,", body=EMPTY_CHUNK),
    **{f"chunked by {coding!r}": post(f"Transfer-Encoding: {coding}", body=EMPTY_CHUNK)
       for coding in ("", ",", "\t", ",,")},
}
REFUSED: list[tuple[int, str, dict[str, bytes]]] = [  # the status, the name of the error, what is answered so
    (400, "validation_error", AMBIGUOUS),
    (413, "request_too_large", {
        "Content-Length one over the limit": post(TOO_LARGE),
        "the same with Expect: 100-continue": post(TOO_LARGE, "Expect: 100-continue"),
        "chunks over the limit": post(CHUNKED, body=b"%x\r\n" % (LIMIT + 1) + b" " * LIMIT),
    }),
    (431, "request_headers_too_large", {
        "headers of 40 kB": get("X: " + "x" * 40_000),
        "headers without an end": get("X: " + "x" * 40_000).strip(),
    }),
    (501, "not_implemented", {
        "gzip": post("Transfer-Encoding: gzip"),
        "gzip, chunked": post("Transfer-Encoding: gzip, chunked"),
        "xchunked": post("Transfer-Encoding: xchunked"),
    }),
]
# fmt: on
@pytest.mark.parametrize(
    ("status", "name", "sent"),
    [pytest.param(*how, sent, id=what) for *how, requests in REFUSED for what, sent in requests.items()],
)
def test_what_is_refused_is_answered_once_in_the_one_shape_and_what_follows_is_not_read(
    port: int, status: int, name: str, sent: bytes
) -> None:
    [answer] = spoken(port, sent + get())
    held_to_the_shape(answer, status, name)
    assert answer.headers["Connection"] == "close"
    check_http(sent + get())


TAKEN = {
    "plain": (get(), ""),
    "HTTP/1.0 without a Host": (b"GET / HTTP/1.0\r\n\r\n", ""),
    "Host that is empty": (b"GET / HTTP/1.1\r\nHost:\r\n\r\n", ""),
    "Host with a port": (b"GET / HTTP/1.1\r\nhost: [::1]:8080\r\n\r\n", ""),
    "Host with an underscore": (b"GET / HTTP/1.1\r\nHost: async_email_api\r\n\r\n", ""),
    "empty line before": (b"\r\n" + get(), ""),
    "whole URL": (get(path="http://a/b?c=d%20e"), ""),
    "value that is empty": (get("X:", "Y: ", "Z:\t"), ""),
    "value with blanks around and in it": (get("X: \t a  b\t "), ""),
    "value that is not ASCII": (get("X: \xe9"), ""),
    "100 headers": (get(*["X: 1"] * 99), ""),
    "line of 30 kB": (get("X: " + "x" * 30_000), ""),
    "URL of 30 kB": (get(path="/" + "x" * 30_000), ""),
    "length": (post("Content-Length: 2", body=b"hi"), "hi"),
    "chunks": (post(CHUNKED, body=b"2\r\nhi\r\nA\r\n, \r\n0\r\n\r\n!\r\n0\r\n\r\n"), "hi, \r\n0\r\n\r\n!"),
    "chunked in capitals": (post("TRANSFER-ENCODING:  Chunked\t", body=b"02\r\nhi\r\n00\r\n\r\n"), "hi"),
    "extensions": (post(CHUNKED, body=b'2;a;b=c;d="e f"\r\nhi\r\n0;a\r\n\r\n'), "hi"),
    "trailers": (post(CHUNKED, body=b"2\r\nhi\r\n0\r\nX: 1\r\nHost: b\r\n\r\n"), "hi"),
    "no chunk": (post(CHUNKED, body=b"0\r\n\r\n"), ""),
}


@pytest.mark.parametrize(("sent", "body"), TAKEN.values(), ids=TAKEN)
def test_what_can_be_read_in_one_way_is_taken(port: int, sent: bytes, body: str) -> None:
    one, two = (
        spoken(port, sent, get("X-Next: 1")) if b"HTTP/1.0" not in sent else spoken(port, sent) + spoken(port, get())
    )
    assert (one.status, one.body["body"]) == (200, body)
    assert (two.status, two.body["body"]) == (200, "")
    check_http(sent)


# --- time in proportion to what is read -------------------------------------------------------------------------------

LONG: dict[str, Callable[[int], bytes]] = {  # a request with a part of about so many bytes
    "method": lambda n: b"A" * n + b" / HTTP/1.1\r\nHost: a\r\n\r\n",
    "path": lambda n: get(path="/" * n),
    "path of escapes": lambda n: get(path="/" + "%41" * (n // 3)),
    "query": lambda n: get(path="/?" + "a=b&" * (n // 4)),
    "scheme": lambda n: get(path="a" * n + "://b"),
    "host of the URL": lambda n: b"GET a://" + b"1" * n + b" X\r\nHost: a\r\n\r\n",
    "host of the URL that is taken": lambda n: get(path="a://" + "1" * n),
    "version": lambda n: b"GET / HTTP/" + b"1" * n + b"\r\nHost: a\r\n\r\n",
    "request line of blanks": lambda n: b"GET" + b" " * n + b"\r\nHost: a\r\n\r\n",
    "request line without an end": lambda n: b"GET /" + b"a" * n,
    "empty lines before": lambda n: b"\r\n" * (n // 2) + get(),
    "name": lambda n: get("X" * n + ": 1"),
    "name without a colon": lambda n: get("X" * n),
    "value": lambda n: get("X: " + "x" * n),
    "value with a NUL": lambda n: get("X: " + "x" * n + "\0"),
    "blanks": lambda n: get("X:" + " " * n),
    "blanks before a value": lambda n: get("X:" + " " * n + "x"),
    "blanks after a value": lambda n: get("X: x" + " " * n),
    "blanks in a value": lambda n: get("X: x" + " " * n + "x"),
    "blanks and a NUL": lambda n: get("X: x" + " " * n + "\0"),
    "words": lambda n: get("X: " + "x " * (n // 2) + "\x7f"),
    "headers": lambda n: get(*["X: 1"] * (n // 6)),
    "headers of 200 bytes": lambda n: get(*["X: " + "x" * 195] * (n // 200)),
    "folded lines": lambda n: get("X: 1", *[" 2"] * (n // 4)),
    "Host": lambda n: b"GET / HTTP/1.1\r\nHost: " + b"a." * (n // 2) + b"\r\n\r\n",
    "Connection": lambda n: get("Connection: " + "close, " * (n // 7)),
    "Expect": lambda n: get("Expect: " + "100-continue" * (n // 12)),
    "Content-Length": lambda n: post("Content-Length: " + "1" * n),
    "Transfer-Encoding": lambda n: post("Transfer-Encoding: " + "chunked," * (n // 8)),
    "Transfer-Encoding of blanks": lambda n: post("Transfer-Encoding: chunked" + " " * n, body=b"0\r\n\r\n"),
    "chunks": lambda n: post(CHUNKED, body=b"1\r\nx\r\n" * (n // 6) + b"0\r\n\r\n"),
    "chunk": lambda n: post(CHUNKED, body=b"%x\r\n%b\r\n0\r\n\r\n" % (n, b"x" * n)),
    "size": lambda n: post(CHUNKED, body=b"0" * n + b"\r\n"),
    "size without an end": lambda n: post(CHUNKED, body=b"0" * n),
    "extension": lambda n: post(CHUNKED, body=b"1;" + b"a" * n + b"\r\n"),
    "extensions": lambda n: post(CHUNKED, body=b"1" + b";a" * (n // 2) + b"\0\r\n"),
    "extensions with values": lambda n: post(CHUNKED, body=b"1" + b";a=b" * (n // 4) + b"\0\r\n"),
    "quoted extension": lambda n: post(CHUNKED, body=b'1;a="' + b"\\a" * (n // 2) + b"\r\n"),
    "trailers": lambda n: post(CHUNKED, body=b"0\r\n" + b"X: 1\r\n" * (n // 6)),
    "trailer": lambda n: post(CHUNKED, body=b"0\r\nX: " + b"x" * n),
    "trailer of blanks": lambda n: post(CHUNKED, body=b"0\r\nX:" + b" " * n + b"x\r\n\r\n"),
}
SIZES = (480, 1_920, 7_680, 30_720)


def seconds_to_parse(adj: Any, request: bytes) -> float:
    """Of this thread, in packets of the size in which Waitress reads."""
    parser = grammar.Parser(adj)
    packets = [request[at : at + adj.recv_bytes] for at in range(0, len(request), adj.recv_bytes)]
    started = time.thread_time()
    for packet in packets:
        while packet and not parser.completed:
            packet = packet[parser.received(packet) :]
    return time.thread_time() - started


def assert_linear(measure: Callable[[int], float]) -> None:
    """Four times as much takes about four times as long at most. Half a millisecond is noise."""
    times = [min(measure(size) for _ in range(5)) for size in SIZES]
    for short, long in pairwise(times):
        assert long < 8 * short + 0.0005, times


@pytest.mark.parametrize("request_of", LONG.values(), ids=LONG)
def test_four_times_as_much_http_takes_at_most_about_four_times_as_long(
    running: server.Server, request_of: Callable[[int], bytes]
) -> None:
    assert_linear(lambda size: seconds_to_parse(running.waitress.adj, request_of(size)))


@pytest.mark.parametrize("filling", ["x", " ", "x ", ";", "a,", "é", "%", "\0"])
@pytest.mark.parametrize(
    "name",
    [
        *("PATH_INFO", "QUERY_STRING", "REQUEST_METHOD", "CONTENT_TYPE", "HTTP_AUTHORIZATION"),
        *("HTTP_IDEMPOTENCY_KEY", "HTTP_X_REQUEST_ID", "HTTP_X_BATCH_VALIDATION", "HTTP_COOKIE", "HTTP_ACCEPT"),
    ],
)
def test_four_times_as_much_in_a_field_takes_the_application_at_most_about_four_times_as_long(
    name: str, filling: str
) -> None:
    app = app_with("redis://127.0.0.1:1")  # nobody is there

    def seconds(size: int) -> float:
        value = {"PATH_INFO": "/emails/", "HTTP_AUTHORIZATION": "Bearer "}.get(name, "") + filling * (
            size // len(filling)
        )
        started = time.thread_time()
        ask(app, "POST", "/emails/batch", [], **{name: value.encode().decode("latin-1")})
        return time.thread_time() - started

    assert_linear(seconds)
