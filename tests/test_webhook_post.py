"""One POST to an endpoint: to no private address, over verified TLS, and whatever comes back, an answer in time."""

from __future__ import annotations

import random
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from typing import Any

import pytest
import trustme

from tests.conversations import server_context
from tests.receiver import Receiver
from webhooks import post
from webhooks.post import Answer, Poster, is_public, judged, seconds_of

PUBLIC = ["93.184.216.34", "2606:2800:220:1::1", "::ffff:93.184.216.34", "64:ff9b::5db8:d822", "2002:5db8:d822::1"]
# fmt: off
PRIVATE = [
    "127.0.0.1", "127.9.9.9", "0.0.0.0", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1",
    "224.0.0.1", "239.255.255.250", "255.255.255.255", "240.0.0.1", "192.0.2.1", "198.18.0.1", "::", "::1", "fe80::1",
    "fe80::1%eth0", "fc00::1", "fd12::1", "fec0::1", "ff02::1", "::ffff:127.0.0.1", "::ffff:169.254.169.254",
    "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "2002:7f00:1::", "2002:a00:1::1", "2001:db8::1", "100::1",
]
# fmt: on


@pytest.mark.parametrize("address", PUBLIC + PRIVATE)
def test_an_address_of_this_network_is_not_public_in_whatever_form(address: str) -> None:
    assert is_public(address) == (address in PUBLIC)


def ask(url: str, **how: Any) -> Answer:
    poster = Poster(url, **how)
    try:
        return poster.post(b"{}", {})
    finally:
        poster.close()


def leads_to(monkeypatch: pytest.MonkeyPatch, *addresses: str) -> None:
    """Makes each name lead to these addresses, one after the other at each look."""
    left = list(addresses)
    asked = socket.getaddrinfo

    def found(host: str, port: int, **how: Any) -> Any:
        return asked(left.pop(0) if len(left) > 1 else left[0], port, **how)

    monkeypatch.setattr(socket, "getaddrinfo", found)


def test_a_name_that_leads_here_is_refused_unless_that_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    with Receiver() as receiver:
        leads_to(monkeypatch, "127.0.0.1")
        url = receiver.url.replace("127.0.0.1", "hooks.example.com")
        answer = ask(url)
        assert (answer.status, answer.trouble) == (0, True)
        assert "private = true" in answer.said
        assert receiver.got == []
        assert ask(url, private=True).is_good
        assert ask(receiver.url).is_good  # it names the address itself
        assert [one.path for one in receiver.got] == ["/hooks?token=very-secret"] * 2


def test_what_is_asked_for_is_a_path_whatever_the_url_leaves_out() -> None:
    for rest, target in (("", "/"), ("/", "/"), ("?a=b", "/?a=b"), ("/x?a=b#c", "/x?a=b"), ("//x", "//x")):
        assert Poster(f"https://hooks.example.com{rest}").target == target


def test_a_deadline_that_passes_before_there_is_a_connection_holds_too(monkeypatch: pytest.MonkeyPatch) -> None:
    said, answer = [], b"HTTP/1.1 200 OK\r\nA: b\r\n\r\n"

    def trickle(sock: socket.socket) -> None:
        for letter in answer:
            time.sleep(0.1)
            sock.sendall(bytes([letter]))
            said.append(letter)

    asked = socket.getaddrinfo

    def slow(*args: Any, **how: Any) -> Any:
        time.sleep(0.2)
        return asked(*args, **how)

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    with speaking(trickle) as url:
        assert ask(url, deadline=0.1) == Answer(0, post.TOO_LATE)
    assert len(said) < len(answer)


def test_a_connection_is_kept_and_opened_anew_once_it_was_closed() -> None:
    with Receiver() as receiver:
        poster = Poster(receiver.url)
        assert [poster.post(b"{}", {}).status for _ in range(3)] == [200, 200, 200]
        kept = poster.own.connection.sock
        assert kept is not None
        socket.socket.shutdown(kept, socket.SHUT_RDWR)
        assert poster.post(b"{}", {}).status == 200
        poster.close()


@contextmanager
def speaking(speak: Callable[[socket.socket], None], tls: ssl.SSLContext | None = None) -> Iterator[str]:
    """Listens, and lets `speak` answer each connection."""

    def take() -> None:
        while True:
            try:
                sock, _ = listening.accept()
            except OSError:
                return
            with sock:
                try:
                    one = tls.wrap_socket(sock, server_side=True) if tls else sock
                    one.settimeout(5)
                    asked = b""
                    while not asked.endswith(b"{}") and (more := one.recv(65536)):  # all of it, or close() would reset
                        asked += more
                    speak(one)
                    one.close()
                except OSError:
                    pass

    listening = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=take, daemon=True)
    thread.start()
    try:
        yield f"http{'s' if tls else ''}://localhost:{listening.getsockname()[1]}/"
    finally:
        socket.socket.shutdown(listening, socket.SHUT_RDWR)
        listening.close()
        thread.join(10)


def drip(first: bytes) -> Callable[[socket.socket], None]:
    def speak(sock: socket.socket) -> None:
        sock.sendall(first)
        for _ in range(200):
            time.sleep(0.05)
            sock.sendall(b"x")

    return speak


@pytest.mark.parametrize(
    "first",
    [
        b"",
        b"HTTP/1.1 2",
        b"HTTP/1.1 200 OK\r\nX-",
        b"HTTP/1.1 200 OK\r\nContent-Length: 60000\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
    ],
)
def test_an_answer_that_comes_drop_by_drop_is_cut_off(first: bytes) -> None:
    with speaking(drip(first)) as url:
        answer = ask(url, deadline=0.5)
        assert (answer.status, answer.said) == (0, post.TOO_LATE)


def test_an_answer_without_end_is_not_read_to_its_end() -> None:
    def speak(sock: socket.socket) -> None:
        sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n" + bytes(200_000))

    with speaking(speak) as url:
        assert ask(url).status == 200


def test_garbage_is_trouble_and_nothing_is_raised_or_repeated(caplog: pytest.LogCaptureFixture) -> None:
    chance = random.Random(16)
    whole = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nRetry-After: secret\r\n\r\n{}"
    texts = [whole[: chance.randrange(len(whole))] for _ in range(40)]
    for _ in range(160):
        text = bytearray(whole)
        for _ in range(chance.randrange(1, 8)):
            text[chance.randrange(len(text))] = chance.randrange(256)
        texts.append(bytes(text))
    left = [*texts, b"HTTP/1.1 999 \r\n\r\n", b"HTTP/1.1 100 Continue\r\n\r\n" * 50, b"\x00" * 70000, b"X" * 70000]
    with speaking(lambda sock: sock.sendall(left.pop())) as url:
        while left:
            answer = ask(url, deadline=2)
            assert answer.trouble or answer.is_good or answer.status in post.THIS_EVENT
            assert "secret" not in answer.said
    assert caplog.text == ""


def test_a_certificate_must_be_valid(authority: trustme.CA, monkeypatch: pytest.MonkeyPatch) -> None:
    with speaking(lambda sock: None, server_context(authority)) as url:
        poster = Poster(url)
        assert poster.post(b"{}", {}).said == "its certificate is not valid"
        leads_to(monkeypatch, "127.0.0.1")
        poster = Poster(url.replace("localhost", "hooks.example.com"), private=True)
        assert poster.context is not None
        authority.configure_trust(poster.context)
        assert poster.post(b"{}", {}).said == "its certificate is not valid"


def test_a_valid_certificate_is_taken_for_its_own_name(authority: trustme.CA) -> None:
    def speak(sock: socket.socket) -> None:
        sock.sendall(b"HTTP/1.1 204 No Content\r\n\r\n")

    with speaking(speak, server_context(authority, "localhost")) as url:
        poster = Poster(url)
        assert poster.context is not None
        authority.configure_trust(poster.context)
        assert poster.post(b"{}", {}).status == 204
        poster.close()


def test_nobody_there_is_said_in_a_word() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    assert ask(f"http://localhost:{port}/very-secret").said == "Connection refused"
    assert ask("https://nowhere.invalid/very-secret").said == "its name has no address"


@pytest.mark.parametrize(
    ("status", "retry_after", "good", "trouble", "pause"),
    [
        (200, "60", True, False, 0),
        (204, "", True, False, 0),
        (302, "", False, True, 0),  # no redirect is followed
        (400, "60", False, False, 0),
        (401, "", False, True, 0),
        (404, "", False, True, 0),
        (410, "", False, True, 3600),
        (422, "", False, False, 0),
        (429, "60", False, True, 60),
        (500, "60", False, True, 0),
        (503, "9" * 400, False, True, 36000),
        (503, "-1", False, True, 0),
        (503, "Fri, 31 Feb 2026 99:00:00 GMT", False, True, 0),
        (503, "٣", False, True, 0),
    ],
)
def test_what_a_status_means(status: int, retry_after: str, good: bool, trouble: bool, pause: float) -> None:
    answer = judged(status, retry_after)
    assert (answer.is_good, answer.trouble, answer.pause) == (good, trouble, pause)


def test_a_pause_may_be_a_date() -> None:
    at = datetime.fromtimestamp(time.time() + 100, timezone.utc)
    assert 95 < seconds_of(f"{at:%a, %d %b %Y %H:%M:%S} GMT") <= 100
