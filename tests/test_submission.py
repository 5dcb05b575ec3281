"""Mail by SMTP, by the real process: who may send, what is answered, and what arrives."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import pytest

from tests.relay import Relay
from tests.servers import Api, House, RedisServer, eventually
from tests.submitting import LOGIN, MAIL, Submission


@pytest.fixture(scope="module")
def house(redis_server: RedisServer, far: Relay, tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    folder = tmp_path_factory.mktemp("house")
    limits = {"MAX_MESSAGE_BYTES": "100000", "MAX_RECIPIENTS": "3", "LOG_LEVEL": "INFO"}
    with House(folder, redis_server.url, **far.environment(folder), **limits) as house:
        house.environment["API_KEYS"] += "," + ",".join(
            f"{name}:{hashlib.sha256(f'{name}-key'.encode()).hexdigest()}:{rest}"
            for name, rest in (("test", "test"), ("slow", "send:1/h"), ("acme", "send::acme.example"))
        )
        house.worker()
        yield house


@pytest.fixture(scope="module")
def there(house: House) -> Submission:
    return Submission(house)


def newest(api: Api) -> dict[str, object]:
    return dict(api.get("/emails?limit=1").body["data"][0])


def test_a_mail_arrives_to_the_octet_without_what_is_only_for_us(there: Submission, api: Api, far: Relay) -> None:
    hidden = b"Bcc: carol@example.com\r\nReturn-Path: <x@example.com>\r\nX-Async-Email-Tag: kind=welcome\r\n"
    body = b".\r\n..\r\n.dot\r\nh\xc3\xa4 \xff\r\n\r\n"
    there_is = b"Date: Mon, 1 Jan 2024 00:00:00 +0000\r\nMessage-ID: <1@example.com>\r\nMIME-Version: 1.0\r\n"
    whole = MAIL.replace(b"\r\n\r\nHi Bob\r\n", b"\r\n" + there_is + b"\r\n" + body)
    reply = there.send(
        whole.replace(b"Subject", hidden + b"Subject"),
        "full-key",
        "bounce@example.com",
        "bob@example.com",
        "carol@example.com",
    )
    mail_id = reply.removeprefix("250 2.6.0 stored as ")
    mail = api.wait_for(mail_id, "sent")
    assert far.accepted[-1] == ("bounce@example.com", ["bob@example.com", "carol@example.com"], whole)
    shown = [mail[name] for name in ("from", "to", "cc", "bcc", "subject", "message_id", "key", "tags")]
    kind = [{"name": "kind", "value": "welcome"}]
    bob, carol = ["bob@example.com"], ["carol@example.com"]
    assert shown == ["Ada <ada@example.com>", bob, [], carol, "Hello", "<1@example.com>", "full", kind]


def test_the_message_id_that_is_missing_is_the_mails_own(there: Submission, api: Api, far: Relay) -> None:
    mail_id = there.send(sender="<>").split()[-1]
    mail = api.wait_for(mail_id, "sent")
    assert (far.accepted[-1].sender, far.accepted[-1].message_id) == ("", mail["message_id"])
    assert mail["message_id"] == f"<{mail_id}@example.com>"


@pytest.mark.parametrize(
    ("command", "reply"),
    [
        ("RCPT TO:<bob>", "553 5.1.3"),
        ("RCPT TO:<bob@localhost>", "553 5.1.3"),
        ("RCPT TO:<>", "553 5.1.3"),
        ("RCPT TO:<bob@example.com> NOTIFY=NEVER", "555"),
        ("MAIL FROM:<root@localhost>", "553 5.1.8"),
        ("MAIL FROM:<a@example.com> SIZE=100001", "552 5.3.4"),
        ("MAIL FROM:<a@example.com> SIZE=100000 AUTH=<>", "250"),
        ("MAIL FROM:<a@example.com> BODY=BINARYMIME", "501"),
        ("MAIL FROM:<\u00e4@example.com> SMTPUTF8", "250"),
        ("DATA", "503"),
        ("DATA now", "501"),
        ("VRFY bob", "252"),
        ("XYZ", "500"),
    ],
)
def test_commands_are_answered_by_the_standards_codes(there: Submission, command: str, reply: str) -> None:
    with there.talk() as talk:
        if command.startswith("RCPT"):
            talk.say(b"MAIL FROM:<ada@example.com>\r\n")
        assert talk.say(command.encode() + b"\r\n")[0].startswith(reply)


@pytest.mark.parametrize(
    ("mail", "reply"),
    [
        (MAIL + b"x" * 1000, "554 5.6.0 each line"),
        (b"no header\r\n", "554 5.6.0"),
        (MAIL.replace(b"To:", b"From: x@example.com\r\nTo:"), "554 5.6.0 the mail must have one header From"),
        (MAIL.replace(b"ada@", b"ada"), "554 5.6.0 the header From"),
        (b"X-Async-Email-Priority: urgent\r\n" + MAIL, "554 5.6.0 X-Async-Email-Priority: must be 'high',"),
        (
            b"X-Async-Email-Expires-At: 2001-01-01T00:00:00Z\r\n" + MAIL,
            "554 5.6.0 X-Async-Email-Expires-At: must be in",
        ),
        (b"X-Async-Email-Scheduled-At: soon\r\n" + MAIL, "554 5.6.0 X-Async-Email-Scheduled-At: must be a time"),
        (b"X-Async-Email-Tag: a b\r\n" + MAIL, "554 5.6.0 X-Async-Email-Tag: must"),
        (b"X-Async-Email-Color: red\r\n" + MAIL, "554 5.6.0 X-Async-Email-Color: is not a known field"),
        (b"X-Async-Email-Priority: bulk\r\n" * 2 + MAIL, "554 5.6.0 X-Async-Email-Priority: must be given once"),
        (b"Resend-Idempotency-Key: \r\n" + MAIL, "554 5.6.0 Resend-Idempotency-Key: must be"),
        (MAIL + b"x" * 70 + b"\r\n" + (b"y" * 70 + b"\r\n") * 1400, "552 5.3.4"),
    ],
)
def test_a_mail_that_cannot_be_taken_is_refused_and_the_reply_names_why(
    there: Submission, mail: bytes, reply: str
) -> None:
    assert there.send(mail).startswith(reply)


def test_headers_of_ours_do_what_the_fields_of_the_api_do(there: Submission, api: Api) -> None:
    ours = b"X-Async-Email-Priority: bulk\r\nX-Async-Email-Scheduled-At: in 2 days\r\nX-Async-Email-On-Doubt: hold\r\n"
    ours += b"X-Async-Email-Expires-At: 2099-01-01T00:00:00Z\r\nX-Async-Email-Tag: a=1\r\nX-Async-Email-Tag: b=2\r\n"
    mail = api.email(there.send(ours + MAIL).split()[-1])
    shown = [mail[name] for name in ("status", "priority", "on_doubt", "expires_at")]
    assert shown == ["scheduled", "bulk", "hold", "2099-01-01T00:00:00+00:00"]
    assert [tag["value"] for tag in mail["tags"]] == ["1", "2"]
    assert api.get(f"/emails/{mail['id']}/attachments").body["data"] == []


def test_nothing_is_relayed_without_a_login(there: Submission) -> None:
    with there.talk(login=False) as talk:
        said = talk.say(b"EHLO test\r\nMAIL FROM:<a@example.com>\r\nRCPT TO:<b@example.com>\r\nDATA\r\n", 5)[2:]
        assert [one[:3] for one in said] == ["530", "503", "503"]
        said = talk.say(b"AUTH PLAIN AGEAYg==\r\nAUTH LOGIN\r\nYQ==\r\nYg==\r\nAUTH CRAM-MD5\r\n", 5)
        assert [one[:3] for one in said] == ["535", "334", "334", "535", "504"]
        assert talk.say(LOGIN.replace(b"PLAIN", b"plain"))[0][:3] == "235"


@pytest.mark.parametrize("name", ["send", "full", "test"])
def test_each_scope_may_send_and_a_test_key_sends_nothing(name: str, there: Submission, api: Api, far: Relay) -> None:
    before = len(far.accepted)
    mail = api.wait_for(there.send(key=f"{name}-key").split()[-1], "sent")
    assert (mail["test"], len(far.accepted) - before) == ((True, 0) if name == "test" else (False, 1))


def test_a_key_is_held_to_its_rate_and_its_domains(there: Submission) -> None:
    assert [there.send(key="slow-key")[:9] for _ in "12"] == ["250 2.6.0", "451 4.7.0"]
    with there.client("acme-key") as client:
        assert client.mail("ada@example.com")[0] == 550
        client.mail("ada@acme.example")
        client.rcpt("bob@example.com")
        assert client.data(MAIL)[0] == 550
    for written in (
        b"x@example.com, ada@acme.example",
        b"<x @example.com>, ada@acme.example",
        b"(<x@y.z>) ada@acme.example",
    ):
        mail = MAIL.replace(b"Ada <ada@example.com>", written)
        assert there.send(mail, "acme-key", "ada@acme.example").startswith("554 5.6.0 the header From")
    at_home = MAIL.replace(b"ada@example.com", b"ada@acme.example")
    assert there.send(at_home, "acme-key", "ada@acme.example").startswith("250")


def test_recipients_beyond_the_limit_are_for_another_mail(there: Submission) -> None:
    with there.client() as client:
        client.mail("ada@example.com")
        codes = [client.rcpt(f"{name}@example.com")[0] for name in "abcda"]
    assert codes == [250, 250, 250, 452, 250]


def test_a_mail_with_the_same_idempotency_key_is_one_mail(there: Submission) -> None:
    keyed = b"Resend-Idempotency-Key: one\r\n" + MAIL
    first = there.send(keyed)
    assert there.send(keyed + b"made anew\r\n") == first
    assert there.send(keyed, "full-key") != first
    assert there.send(keyed.replace(b"Hello", b"Other")).startswith("554 5.6.0 Resend-Idempotency-Key: was used")
    assert there.send(MAIL) != there.send(MAIL)


def test_the_same_octets_are_one_mail_for_as_long_as_is_asked(house: House, there: Submission) -> None:
    other = Submission(house, SUBMISSION_DEDUPE="2s")
    first = other.send(MAIL)
    assert other.send(MAIL) == first != other.send(MAIL + b"x\r\n")
    assert other.send(MAIL, "full-key") != first != other.send(MAIL, "send-key", "ada@example.com", "c@example.com")
    eventually(lambda: other.send(MAIL) != first)


def test_a_mail_beyond_ascii_is_announced_to_the_relay_as_it_was_here(there: Submission, api: Api, far: Relay) -> None:
    for sender, options in (("ada@example.com", ""), ("\u00e4@example.com", "SMTPUTF8 ")):
        mail = MAIL.replace(b"Hello", "H\u00e4llo".encode())
        with there.talk() as talk:
            command = f"MAIL FROM:<{sender}> {options}BODY=8BITMIME\r\nRCPT TO:<bob@example.com>\r\nDATA\r\n"
            mail_id = (talk.say(command.encode(), 3) + talk.say(mail + b".\r\n"))[-1].split()[-1]
        api.wait_for(mail_id, "sent")
        assert far.accepted[-1].content.endswith(mail)
        said = [one for one in far.server.commands if one.startswith("MAIL")][-1]
        assert ("BODY=8BITMIME" in said, "SMTPUTF8" in said) == (True, bool(options))


def test_a_staging_system_sends_to_its_tester(house: House, there: Submission, api: Api, far: Relay) -> None:
    mail_id = Submission(house, MAIL_REDIRECT_TO="tester@example.com").send().split()[-1]
    mail = api.wait_for(mail_id, "sent")
    assert (far.accepted[-1].recipients, far.accepted[-1].content[-len(MAIL) :]) == (["tester@example.com"], MAIL)
    assert mail["to"] == ['"bob@example.com" <tester@example.com>']


def test_who_is_not_admitted_is_refused_at_rcpt(house: House, there: Submission) -> None:
    other = Submission(house, MAIL_ALLOWLIST="acme.example")
    with other.client() as client:
        client.mail("ada@example.com")
        assert [client.rcpt(one)[0] for one in ("bob@example.com", "bob@acme.example")] == [550, 250]


def test_no_address_and_no_word_of_a_mail_is_in_the_log(house: House, there: Submission) -> None:
    with there.talk(login=False) as talk:
        talk.say(b"EHLO test\r\nsecret@example.com\r\nAUTH PLAIN secret\r\n", 4)
    there.send(MAIL.replace(b"Hello", b"secret"))
    log = house.log("submission")
    assert "submission status=250" in log
    assert not [word for word in ("@", "secret", "Hello", "send-key", "bob", "Traceback") if word in log]
