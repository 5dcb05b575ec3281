"""What clients that are slow, broken or evil can do to mail by SMTP, and to the others: by the real process."""

from __future__ import annotations

import asyncio
import io
import signal
import smtplib
import socket
import ssl
import struct
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import redis

from mail.address import Mailbox
from mail.outbox import Outbox
from process.api_keys import ApiKey
from queues.connection import Unavailable
from queues.jobs import Accepted
from submission import handler, intake
from submission.conversation import MOST, MOST_OF_ONE, Conversations
from submission.handler import Outcome
from tests.relay import Relay
from tests.servers import Api, House, RedisServer, eventually
from tests.submitting import ENVELOPE, LOGIN, MAIL, Certified, Submission
from tests.test_structure import digest_of

FOREIGN = "conversation.network = handler.network = lambda address: 'far'"
HELLO = b"EHLO test\r\n"
EVIL = (
    b"MAIL FROM:<evil@example.com>\r\nRCPT TO:<victim@example.com>\r\nDATA\r\nFrom: evil@example.com\r\n\r\nx\r\n.\r\n"
)


@pytest.fixture(scope="module")
def house(redis_server: RedisServer, far: Relay, tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    folder = tmp_path_factory.mktemp("house")
    with House(folder, redis_server.url, LOG_LEVEL="INFO", **far.environment(folder)) as house:
        house.worker()
        yield house


@pytest.fixture(scope="module")
def there(house: House) -> Submission:
    return Submission(house)


@pytest.fixture
def client(redis_server: RedisServer) -> Iterator[redis.Redis]:
    with redis_server.client() as client:
        client.flushall()
        yield client


def accepted(client: redis.Redis) -> int:
    return int(client.hget("mail:totals", "accepted") or 0)


@pytest.mark.parametrize("end", [b"\n.\n", b"\n.\r\n", b"\r\n.\n", b"\r.\r", b"\r.\r\n", b"\r\n.\r", b"\r\n\0.\r\n"])
def test_a_mail_ends_where_the_standard_says_and_nothing_is_smuggled_in(
    there: Submission, client: redis.Redis, end: bytes
) -> None:
    with there.talk() as talk:
        talk.say(ENVELOPE, 3)
        assert talk.say(MAIL + b"x" + end + EVIL)[0].startswith("554 5.6.0")
        assert [one[:3] for one in talk.say(b"NOOP\r\nQUIT\r\n", 2)] == ["250", "221"]
    assert accepted(client) == 0


def test_nothing_is_smuggled_out(there: Submission, api: Api, far: Relay) -> None:
    body = b"\r\n.\r\n" + EVIL + b".\r\n..\r\n...\r\n"
    mail_id = there.send(MAIL + body).split()[-1]
    api.wait_for(mail_id, "sent")
    assert far.accepted[-1].content.endswith(MAIL[-8:] + body)
    assert far.accepted[-1].recipients == ["bob@example.com"]


def test_what_speaks_http_is_hung_up_on(there: Submission, client: redis.Redis) -> None:
    for line in (b"POST / HTTP/1.1\r\n", b"PRI * HTTP/2.0\r\n", b"get /\r\n"):
        with there.talk(login=False) as talk:
            talk.socket.sendall(line + HELLO + LOGIN + ENVELOPE + MAIL + b".\r\n")
            with suppress(ConnectionResetError):
                assert talk.file.read().count(b"\n") == 1
    assert accepted(client) == 0


def test_all_of_a_conversation_may_be_sent_at_once(there: Submission, client: redis.Redis) -> None:
    with there.talk(login=False) as talk:
        twice = (ENVELOPE + MAIL + b".\r\n") + ENVELOPE + b".\r\n"
        said = talk.say(HELLO + LOGIN + twice + b"RSET\r\nQUIT\r\n", 13)
    assert [one[:3] for one in said] == ["220", "250", "235", *["250", "250", "354", "250"] * 2, "250", "221"]
    assert accepted(client) == 2


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_the_end_of_a_mail_is_found_wherever_it_is_cut(there: Submission, client: redis.Redis, size: int) -> None:
    with there.talk() as talk:
        talk.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        talk.say(ENVELOPE, 3)
        octets = MAIL + b"..\r\n.\r\nNOOP\r\n"
        for start in range(0, len(octets), size):
            talk.socket.sendall(octets[start : start + size])
            time.sleep(0.001)
        assert [talk.reply()[:3] for _ in "12"] == ["250", "250"]
    assert accepted(client) == 1


def test_slow_clients_and_one_that_sends_without_end_stall_nobody(there: Submission, client: redis.Redis) -> None:
    talks = [there.talk() for _ in range(50)]
    for talk in talks:
        talk.say(ENVELOPE, 3)
        talk.socket.sendall(MAIL)
    endless = talks[0]
    endless.socket.sendall(b"x" * 70 + b"\r\n" + b"y" * 12_000_000)
    assert there.send().startswith("250")
    for talk in talks[1:]:
        assert talk.say(b".\r\n")[0].startswith("250")
    assert endless.say(b"\r\n.\r\n")[0].startswith("552 5.3.4")
    assert accepted(client) == 50
    for talk in talks:
        talk.__exit__()


def test_twenty_large_mails_at_once_take_the_memory_of_one_or_two(house: House, client: redis.Redis) -> None:
    other, large = Submission(house), MAIL + (b"x" * 76 + b"\r\n") * 130_000

    def peak() -> int:
        lines = Path(f"/proc/{other.process.pid}/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) // 1024

    other.send()
    before = peak()
    with ThreadPoolExecutor(20) as threads:
        assert {reply[:3] for reply in threads.map(lambda _: other.send(large, "full-key"), range(20))} == {"250"}
    assert peak() - before < 60  # megabytes: some copies of one


def test_a_mail_that_is_cut_off_is_not_stored_and_its_client_may_come_again(
    there: Submission, client: redis.Redis
) -> None:
    with there.talk() as talk:
        talk.say(ENVELOPE, 3)
        talk.socket.sendall(MAIL + b"\r\n.\r")
    assert there.send().startswith("250")
    assert accepted(client) == 1


def test_a_repeat_after_a_lost_reply_is_recognised(house: House, client: redis.Redis) -> None:
    other = Submission(house, SUBMISSION_DEDUPE="10m")
    for _ in range(20):
        with other.talk() as talk:
            talk.say(ENVELOPE, 3)
            talk.socket.sendall(MAIL + b".\r\n")
    assert other.send().startswith("250")
    assert accepted(client) == 1


def test_redis_may_be_away_for_a_while(there: Submission, redis_server: RedisServer, api: Api) -> None:
    with ThreadPoolExecutor(5) as threads:
        redis_server.kill()
        sent = [threads.submit(there.send) for _ in range(5)]
        time.sleep(2)
        redis_server.start()
        ids = {one.result().removeprefix("250 2.6.0 stored as ") for one in sent}
    with redis_server.client() as client:
        assert len(ids) == 5
        assert {one.decode().removeprefix("mail:") for one in client.scan_iter("mail:*-????????????")} >= ids


def test_a_try_that_redis_took_without_a_word_is_not_doubled_by_the_next(
    outbox: Outbox, client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    def took_it_without_a_word(*arguments: Any, **options: Any) -> Accepted:
        monkeypatch.undo()
        outbox.accept(*arguments, **options)
        raise Unavailable("Redis does not answer")

    async def store() -> Outcome:
        one = handler.Handler(outbox.jobs, outbox.settings)
        monkeypatch.setattr(one.outbox, "accept", took_it_without_a_word)
        envelope = intake.Envelope("ada@example.com", [Mailbox("", "bob@example.com")], False)
        return await one.store(io.BytesIO(b"\r\n" + MAIL), len(MAIL), envelope, ApiKey("shop", "", "send"))

    outcome = asyncio.run(store())
    assert (outcome.reply[:3], accepted(client)) == ("250", 1)
    assert client.exists(f"mail:{outcome.id}")


def test_a_redis_that_stays_away_or_is_full_is_named_by_its_code(house: House, tmp_path: Path) -> None:
    (tmp_path / "redis").mkdir()
    with RedisServer(tmp_path / "redis", "--maxmemory", "3mb", "--maxmemory-policy", "noeviction") as small:
        other = Submission(house, "handler.PATIENCE = 1", REDIS_URL=small.url)
        with small.client() as client:
            client.set("filler", "x" * 4_000_000) if not client.config_set("maxmemory", "1kb") else None
        assert other.send().startswith("452 4.3.1")
    assert other.send().startswith("451 4.3.0")


@pytest.mark.parametrize("login", [True, False])
def test_a_stop_lets_a_mail_in_hand_finish_and_ends_the_rest(house: House, client: redis.Redis, login: bool) -> None:
    other = Submission(house)
    with other.talk(login) as idle, other.talk() as busy:
        busy.say(ENVELOPE, 3)
        busy.socket.sendall(MAIL)
        idle.say(b"NOOP\r\n", 1 + (not login))
        other.process.send_signal(signal.SIGTERM)
        assert idle.reply().startswith("421 4.3.2")
        assert other.process.poll() is None
        assert [one[:3] for one in busy.say(b".\r\n", 2)] == ["250", "421"]
    assert other.process.wait(30) == 0
    assert accepted(client) == 1


def test_who_does_not_log_in_is_sent_away(house: House) -> None:
    other = Submission(house, "conversation.LOGIN_WITHIN = 0.5")
    with other.talk(login=False) as silent:
        assert silent.reply().startswith("220")
        assert silent.reply().startswith("421 4.3.2 log in")


def test_a_connection_ends_after_its_time_but_not_in_the_middle_of_a_mail(house: House) -> None:
    other = Submission(house, "conversation.LOGIN_WITHIN = conversation.LONGEST = 0.2")
    with other.talk() as idle, other.talk() as busy, other.talk() as undecided:
        for one in (busy, undecided):
            one.say(ENVELOPE.removesuffix(b"DATA\r\n"), 2)
        assert idle.reply().startswith("421 4.3.2 this connection has been open")
        assert [one[:3] for one in busy.say(b"DATA\r\n" + MAIL + b".\r\n", 3)] == ["354", "250", "421"]
        assert [one[:3] for one in undecided.say(b"RSET\r\n" + ENVELOPE, 2)] == ["250", "421"]


def test_what_clients_do_wrong_is_no_fault_of_ours_in_the_log(house: House, tmp_path: Path) -> None:
    other, linger = Submission(house, **Certified(tmp_path).settings), struct.pack("ii", 1, 0)
    for octets in (
        b"STARTTLS\r\nno TLS\r\n",
        b"AUTH LOGIN\r\n" + b"x" * 5000 + b"\r\n",
        b"\xff\0\r\n",
        LOGIN + ENVELOPE,
    ):
        with other.talk(login=False) as talk:
            talk.say(HELLO + octets, 3)
            talk.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)  # the close is a reset
    assert other.send().startswith("250")
    assert not {"crashed", "Traceback", "ERROR"} & set(house.log("submission").split())


def test_with_few_descriptors_it_serves_fewer_and_says_so(house: House) -> None:
    other = Submission(house, "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (140, 140))")
    talks = [other.talk(login=False) for _ in range(25)]
    assert [talk.reply()[:3] for talk in talks] == ["220"] * 20 + ["421"] * 5
    assert "few_descriptors connections=20" in house.log("submission")
    for talk in talks:
        talk.__exit__()


def test_one_address_has_so_many_connections_and_all_together_so_many() -> None:
    class One:
        def __init__(self, address: str) -> None:
            self.address = address

    def admitted(*addresses: str) -> int:
        everybody = Conversations(None, None, "")  # type: ignore[arg-type]
        return sum(everybody.admit(One(address)) for address in addresses)  # type: ignore[arg-type]

    assert admitted(*["192.0.2.1"] * 2000) == admitted(*["::ffff:192.0.2.1"] * 2000) == MOST_OF_ONE
    assert admitted(*["127.0.0.1"] * 2000) == MOST
    assert admitted(*(f"192.0.{n % 200}.2" for n in range(2000))) == MOST


def test_nobody_far_may_log_in_without_tls_and_wrong_logins_end(house: House, tmp_path: Path) -> None:
    certified = Certified(tmp_path)
    other = Submission(house, f"handler.SLOW = 0; {FOREIGN}", **certified.settings)
    with smtplib.SMTP("127.0.0.1", other.port, timeout=30) as client:
        client.ehlo()
        assert not client.has_extn("auth")
        assert client.docmd("AUTH", "PLAIN AGEAYg==")[0] == 538
        client.starttls(context=certified.context)
        client.ehlo()
        assert (client.has_extn("auth"), client.has_extn("starttls")) == (True, False)
        assert client.docmd("AUTH", "PLAIN AGEAYg==")[0] == 535
        client.login("resend", "send-key")
        assert client.sendmail("ada@example.com", ["bob@example.com"], MAIL) == {}
    with smtplib.SMTP("127.0.0.1", other.port, timeout=30) as client:
        client.starttls(context=certified.context)
        client.ehlo()
        assert [client.docmd("AUTH", "PLAIN AGEAYg==")[0] for _ in range(12)] == [535] * 9 + [454] * 3
        assert client.docmd("AUTH", LOGIN.decode().split(" ", 1)[1].strip())[0] == 454


def test_what_is_sent_ahead_of_tls_is_forgotten(house: House, tmp_path: Path) -> None:
    certified = Certified(tmp_path)
    with Submission(house, **certified.settings).talk(login=False) as talk:
        said = talk.say(HELLO + b"STARTTLS\r\n" + HELLO + LOGIN, 3)
        assert [one[:3] for one in said] == ["220", "250", "220"]
        with certified.context.wrap_socket(talk.socket, server_hostname="127.0.0.1") as inner:
            inner.sendall(b"MAIL FROM:<ada@example.com>\r\n")
            assert inner.recv(100)[:3] == b"503"  # neither EHLO nor AUTH was heard


@pytest.mark.parametrize("port", ["0", "{port}"])
def test_this_machine_is_offered_tls_on_port_587_alone(house: House, tmp_path: Path, port: str) -> None:
    other = Submission(house, f"conversation.STARTTLS_PORT = {port}", **Certified(tmp_path).settings)
    with smtplib.SMTP("127.0.0.1", other.port, timeout=30) as client:
        client.ehlo()
        assert (client.has_extn("auth"), client.has_extn("starttls")) == (True, port != "0")


def test_port_465_speaks_tls_at_once_and_a_new_certificate_is_read_on_sighup(house: House, tmp_path: Path) -> None:
    certified = Certified(tmp_path)
    other = Submission(house, "main.TLS_PORT = {port}", **certified.settings)

    def serial() -> str:
        with smtplib.SMTP_SSL("127.0.0.1", other.port, timeout=30, context=certified.context) as client:
            client.login("resend", "send-key")
            assert isinstance(client.sock, ssl.SSLSocket)
            return str((client.sock.getpeercert() or {})["serialNumber"])

    first = serial()
    assert first == serial()
    certified.issue()
    other.process.send_signal(signal.SIGHUP)
    eventually(lambda: serial() != first)


def test_systemd_brings_the_sockets_and_hears_of_each_step(house: House, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as heard, socket.create_server(("127.0.0.1", 0)) as one:
        heard.bind(str(tmp_path / "notify"))
        heard.settimeout(30)
        taken = f"import os; os.dup2({one.fileno()}, 3); os.environ.update(LISTEN_FDS='1', LISTEN_PID=str(os.getpid()))"
        patched = (
            f"{taken}; import sys; from submission import __main__ as main; main.BEAT = 0.1; sys.exit(main.main())"
        )
        environment = house.environment | {"NOTIFY_SOCKET": str(tmp_path / "notify"), "PYTHONPATH": str(house.root)}
        process = house.run("activated", "-c", patched, env=environment, pass_fds=[one.fileno()])
        assert [heard.recv(100) for _ in "12"] == [b"READY=1\nWATCHDOG=1"] * 2
        with smtplib.SMTP("127.0.0.1", one.getsockname()[1], timeout=30) as client:
            client.login("any", "send-key")
        process.send_signal(signal.SIGTERM)
        eventually(lambda: heard.recv(100) == b"STOPPING=1")
        assert process.wait(30) == 0


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"SUBMISSION_LISTEN": ""}, "SUBMISSION_LISTEN is not set"),
        ({"SUBMISSION_LISTEN": "192.0.2.1:2525"}, "SUBMISSION_LISTEN: cannot listen on 192.0.2.1:2525"),
        ({"API_KEYS": ""}, "API_KEYS is not set"),
        ({"SUBMISSION_TLS_CERT": "/dev/null"}, "SUBMISSION_TLS_CERT and SUBMISSION_TLS_KEY go together"),
        ({"SUBMISSION_TLS_CERT": "/dev/null", "SUBMISSION_TLS_KEY": "/dev/null"}, "cannot be used"),
    ],
)
def test_what_is_wrong_stops_the_start_in_one_sentence(house: House, settings: dict[str, str], told: str) -> None:
    needed = {"SUBMISSION_LISTEN": "127.0.0.1:1", "PYTHONPATH": str(house.root)}
    process = house.run("wrong", "-m", "submission", env=house.environment | needed | settings)
    assert process.wait(30) == 2
    assert told in house.log("wrong").splitlines()[-1]


LEANT_ON = {
    "aiosmtpd.smtp:SMTP.__init__": "8a9ca80f23ad9bf2",
    "aiosmtpd.smtp:SMTP.connection_made": "77a45df5065bba34",
    "aiosmtpd.smtp:SMTP.connection_lost": "d3bf6349bc3c25c1",
    "aiosmtpd.smtp:SMTP.eof_received": "baab5aaf93160933",
    "aiosmtpd.smtp:SMTP._cb_client_connected": "a73e95bb7f362ab9",
    "aiosmtpd.smtp:SMTP._handle_client": "0e4d096403af6c74",
    "aiosmtpd.smtp:SMTP.smtp_EHLO": "1d91592dd954c4cd",
    "aiosmtpd.smtp:SMTP.smtp_AUTH": "79078b308377ac48",
    "aiosmtpd.smtp:SMTP.smtp_MAIL": "80dd938e7791acfb",
    "aiosmtpd.smtp:SMTP.smtp_RCPT": "a0d6605883c0e608",
    "aiosmtpd.smtp:SMTP.smtp_STARTTLS": "6565289f4131fa13",
}


@pytest.mark.parametrize("piece", LEANT_ON)
def test_what_we_lean_on_in_aiosmtpd_is_as_it_was(piece: str) -> None:
    assert digest_of(piece) == LEANT_ON[piece]
