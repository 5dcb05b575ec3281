"""AUTH as relays really hold it: a dialog by their questions, in UTF-8, with the next mechanism where one is not taken.

The kinds of relay are from reports about other projects, named beside them.
"""

from __future__ import annotations

import base64
import hmac
import socket
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smtp.auth import NotOffered, log_in, log_in_by_token
from smtp.relay import own_name
from tests.conversations import at, attempt
from tests.scripted_relay import ScriptedRelay

USER, PASSWORD = "mailer", "Grüße-€5"
Dialog = Callable[[list[str]], str]  # what has been said so far -> the reply to it


def encoded(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def decoded(line: str) -> str:
    return base64.b64decode(line).decode()


PLAIN = f"AUTH PLAIN {encoded(f'{chr(0)}{USER}{chr(0)}{PASSWORD}')}"
OK, WRONG = "235 2.7.0 ok", "535 5.7.8 no"


def logged_in(replies: list[str], offered: list[str], password: str = PASSWORD) -> tuple[int, list[str]]:
    """Returns the code that decided, and what was said, for a relay that replies with these in turn."""
    said: list[str] = []

    def say(line: str) -> tuple[int, bytes]:
        said.append(line)
        code, _, text = replies[len(said) - 1].partition(" ")
        return int(code), text.encode()

    code, _ = log_in(say, offered, USER, password)
    assert len(said) == len(replies)
    return code, said


USERNAME, FOR_PASSWORD = f"334 {encoded('Username:')}", f"334 {encoded('Password:')}"


@pytest.mark.parametrize(
    "replies",
    [
        [USERNAME, FOR_PASSWORD, OK],
        ["334 VXNlciBOYW1lAA==", "334 UGFzc3dvcmQA", OK],  # Exchange: "User Name\0", nodemailer#1049
        ["334 ", "334 ", OK],  # go-simple-mail#119: no question at all
        ["334 Username:", "334 Password:", OK],  # MailKit#216: not in base64
        [f"334 {encoded('login name:')}", f"334 {encoded('PASSPHRASE')}", OK],
    ],
)
def test_login_answers_what_is_asked(replies: list[str]) -> None:
    assert logged_in(replies, ["LOGIN"]) == (235, ["AUTH LOGIN", encoded(USER), encoded(PASSWORD)])


def test_login_does_not_tell_the_password_to_who_asks_for_the_name_twice() -> None:
    """cpython's smtplib counts challenges, and a server that ignores an initial response then logs the password."""
    _, said = logged_in([USERNAME, USERNAME, WRONG], ["LOGIN"])
    assert said == ["AUTH LOGIN", encoded(USER), encoded(USER)]


@pytest.mark.parametrize("code", [500, 501, 502, 503, 504])
def test_a_mechanism_that_is_announced_and_not_taken_gives_way_to_the_next(code: int) -> None:
    """Postfix in front of another server (gitlab#16812), Exchange without PLAIN (mailcow#1734)."""
    replies = [f"{code} 5.5.4 no", USERNAME, FOR_PASSWORD, OK]
    assert logged_in(replies, ["LOGIN", "PLAIN"]) == (235, [PLAIN, "AUTH LOGIN", encoded(USER), encoded(PASSWORD)])


@pytest.mark.parametrize("reply", [WRONG, "454 4.7.0 later", "535 5.7.139 off", "421 bye", "534 5.7.9 app password"])
def test_a_login_that_is_refused_is_tried_once(reply: str) -> None:
    """Three mechanisms would be three wrong passwords: fail2ban (nextcloud/mail#2310)."""
    assert logged_in([reply], ["LOGIN", "CRAM-MD5", "PLAIN"]) == (int(reply[:3]), [PLAIN])


def test_plain_is_said_again_to_a_relay_that_asks_for_it() -> None:
    assert logged_in(["334 ", OK], ["PLAIN"]) == (235, [PLAIN, PLAIN.removeprefix("AUTH PLAIN ")])


def test_a_long_password_does_not_stand_in_the_command() -> None:
    assert logged_in(["334 ", OK], ["PLAIN"], "p" * 600)[1] == ["AUTH PLAIN", encoded(f"\0{USER}\0{'p' * 600}")]


def test_cram_md5_answers_the_challenge() -> None:
    challenge = "<1896.697170952@postoffice.example.net>"
    _, said = logged_in([f"334 {encoded(challenge)}", OK], ["CRAM-MD5"])
    assert decoded(said[1]) == f"{USER} {hmac.new(PASSWORD.encode(), challenge.encode(), 'md5').hexdigest()}"


def test_a_dialog_that_does_not_end_is_canceled() -> None:
    assert logged_in([USERNAME, FOR_PASSWORD, USERNAME, "501 canceled"], ["LOGIN"])[1][-1] == "*"


@pytest.mark.parametrize("offered", [[], ["XOAUTH2", "GSSAPI"]])
def test_a_relay_without_a_mechanism_that_is_known_here_is_told_apart(offered: list[str]) -> None:
    with pytest.raises(NotOffered, match="offers no AUTH PLAIN, LOGIN or CRAM-MD5"):
        log_in(lambda _: (235, b""), offered, USER, PASSWORD)


# By token


XOAUTH2 = encoded(f"user={USER}\1auth=Bearer t0ken\1\1")
BEARER = encoded("n,a=mai=2Cl=3Der,\1auth=Bearer t0ken\1\1")
LONG, LONG_XOAUTH2 = "t" * 2000, encoded(f"user={USER}\1auth=Bearer {'t' * 2000}\1\1")
EXPIRED = encoded('{"status":"401","schemes":"bearer"}')
# fmt: off
BY_TOKEN = {  # what is offered, the token and the name; the replies -> what is said, and the reply that decides
    "in the command": (
        ["PLAIN", "OAUTHBEARER", "XOAUTH2"], "t0ken", USER, [OK], [f"AUTH XOAUTH2 {XOAUTH2}"], (235, "2.7.0 ok")),
    "asked for once more": (
        ["XOAUTH2"], "t0ken", USER, ["334 ", OK], [f"AUTH XOAUTH2 {XOAUTH2}", XOAUTH2], (235, "2.7.0 ok")),
    "too long for a command": (
        ["XOAUTH2"], LONG, USER, ["334 ", OK], ["AUTH XOAUTH2", LONG_XOAUTH2], (235, "2.7.0 ok")),
    "ended": (
        ["XOAUTH2"], LONG, USER, ["334 ", f"334 {EXPIRED}", WRONG], ["AUTH XOAUTH2", LONG_XOAUTH2, ""],
        (535, "5.7.8 no [XOAUTH2 401]")),
    "ended, in one step": (
        ["XOAUTH2"], "t0ken", USER, [f"334 {EXPIRED}", WRONG], [f"AUTH XOAUTH2 {XOAUTH2}", ""],
        (535, "5.7.8 no [XOAUTH2 401]")),
    "refused": (["XOAUTH2"], "t0ken", USER, [WRONG], [f"AUTH XOAUTH2 {XOAUTH2}"], (535, "5.7.8 no [XOAUTH2]")),
    "by RFC 7628": (
        ["OAUTHBEARER"], "t0ken", "mai,l=er", [f"334 {EXPIRED}", WRONG], [f"AUTH OAUTHBEARER {BEARER}", "AQ=="],
        (535, "5.7.8 no [OAUTHBEARER 401]")),
    "not taken": (
        ["XOAUTH2", "OAUTHBEARER"], "t0ken", "mai,l=er", ["504 5.5.4 no", OK],
        [f"AUTH XOAUTH2 {encoded(f'user=mai,l=er{chr(1)}auth=Bearer t0ken{chr(1)}{chr(1)}')}",
         f"AUTH OAUTHBEARER {BEARER}"], (235, "2.7.0 ok")),
    "no end of questions": (
        ["XOAUTH2"], "t0ken", USER, ["334 !{garbage", "334 more", "501 canceled"],
        [f"AUTH XOAUTH2 {XOAUTH2}", "", "*"], (501, "canceled [XOAUTH2]")),
}
# fmt: on


@pytest.mark.parametrize("case", BY_TOKEN)
def test_a_token_is_given_as_the_mechanism_wants_it_and_an_error_answered(case: str) -> None:
    offered, token, username, replies, expected, decided = BY_TOKEN[case]
    said: list[str] = []

    def say(line: str) -> tuple[int, bytes]:
        said.append(line)
        code, _, text = replies[len(said) - 1].partition(" ")
        return int(code), text.encode()

    code, text = log_in_by_token(say, offered, username, token)
    assert (said, (code, text.decode())) == (expected, decided)


@given(st.lists(st.tuples(st.sampled_from([235, 334, 454, 504, 535]), st.binary(max_size=40)), min_size=12))
def test_a_dialog_by_token_ends_whatever_is_said(replies: list[tuple[int, bytes]]) -> None:
    code, _ = log_in_by_token(lambda _: replies.pop(0), ["XOAUTH2", "OAUTHBEARER"], USER, "t")
    assert code in (235, 334, 454, 504, 535)


def test_a_relay_that_takes_no_token_is_told_apart() -> None:
    with pytest.raises(NotOffered, match="offers no AUTH XOAUTH2 or OAUTHBEARER"):
        log_in_by_token(lambda _: (235, b""), ["PLAIN", "LOGIN"], USER, "t")


# EHLO


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        ("500 5.5.1 what?", ["EHLO", "helo"]),
        ("502 5.5.1 what?", ["EHLO", "helo"]),
        ("421 4.7.0 Try again later, closing connection. (EHLO)", ["EHLO"]),  # smtp-relay.gmail.com: overseerr#1887
        ("550 5.7.1 your name is not known", ["EHLO"]),
        ("504 5.5.2 <localhost>: Helo command rejected: need fully-qualified hostname", ["EHLO"]),  # Postfix
    ],
)
def test_helo_is_for_relays_that_do_not_know_ehlo(reply: str, said: list[str]) -> None:
    with ScriptedRelay({"EHLO": reply}) as there:
        outcome = attempt(at(there.port))
    assert [one.split()[0] for one in there.commands if one.split()[0] in ("EHLO", "helo")] == said
    if said == ["EHLO"]:
        assert outcome.reply.code == int(reply[:3])


def test_the_relay_is_told_the_name_that_is_set() -> None:
    with ScriptedRelay({}) as there:
        attempt(at(there.port, ehlo_name="mailer.acme.example"))
    assert there.commands[0] == "EHLO mailer.acme.example"


@pytest.mark.parametrize("machine", ["localhost", "localhost.localdomain", "web1"])
def test_a_machine_without_a_full_name_calls_itself_by_its_address(
    machine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket, "getfqdn", lambda: machine)
    name = own_name.__wrapped__()
    assert name.startswith("[")
    assert name.endswith("]")
    monkeypatch.setattr(socket, "getfqdn", lambda: "web1.acme.example")
    assert own_name.__wrapped__() == "web1.acme.example"
