"""Addresses at which mail to the catcher fails, and chaos: by SMTP, and with the service before it."""

from __future__ import annotations

import smtplib
from collections import Counter
from collections.abc import Iterator

import pytest

from ops import failing
from ops.failing import KINDS, Failures
from tests.http_api import MAIL
from tests.servers import ROOT, Api, House, RedisServer, eventually
from tests.test_catcher import compose
from tests.test_catcher_process import Catcher, running, start

__all__ = ["running"]  # the fixture


def sent(catcher: Catcher, *to: str) -> list[int]:
    """The codes of a mail to these: of each that is refused, and of the whole; 0 where there was no answer."""
    message = compose()
    message["Message-ID"] = "<1@example.com>"
    try:
        with smtplib.SMTP("127.0.0.1", catcher.smtp_port, timeout=60) as relay:
            refused = relay.sendmail("ada@example.com", to, message.as_bytes())
            return [*(code for code, _ in refused.values()), 250]
    except smtplib.SMTPRecipientsRefused as error:
        return [code for code, _ in error.recipients.values()]
    except smtplib.SMTPDataError as error:
        return [error.smtp_code]
    except smtplib.SMTPServerDisconnected:
        return [0]


@pytest.mark.parametrize(
    ("address", "first", "second"),
    [
        ("bounced@example.com", [550], [550]),
        ("Bounced+welcome@shop.example", [550], [550]),
        ("later@example.com", [451], [250]),
        ("full@example.com", [452], [452]),
        ("throttled@example.com", [450], [450]),
        ("spam@example.com", [554], [554]),
        ("doubt@example.com", [0], [250]),
        ("bouncedtoo@example.com", [250], [250]),
        ("ada+bounced@example.com", [250], [250]),
    ],
)
def test_an_address_fails_as_its_local_part_says(
    running: Catcher, address: str, first: list[int], second: list[int]
) -> None:
    assert [sent(running, address), sent(running, address)] == [first, second]
    caught = [first, second].count([250]) + [first, second].count([0])
    assert len(running.get("/messages").body["messages"]) == caught


def test_one_recipient_fails_and_the_other_gets_the_mail(running: Catcher) -> None:
    assert sent(running, "bounced@example.com", "ada@example.com") == [550, 250]
    assert running.get("/messages").body["messages"][0]["envelope_to"] == ["ada@example.com"]


def test_clearing_makes_an_address_a_new_one(running: Catcher) -> None:
    for _ in range(2):
        assert [sent(running, "later@example.com"), sent(running, "later@example.com")] == [[451], [250]]
        running.call("POST", "/clear")


def test_a_refusal_is_one_line_without_the_address(running: Catcher) -> None:
    sent(running, "bounced+secret@example.com")
    assert running.log() == "refused a recipient as bounced: 550 5.1.1 there is no such mailbox\n"


def test_what_is_put_off_for_a_minute_is_taken_after_it() -> None:
    now = 0.0
    failures = Failures(clock=lambda: now)
    assert failures.of_address("throttled@example.com") == KINDS["throttled"]
    now = 59
    assert failures.of_address("throttled@example.com") == KINDS["throttled"]
    assert failures.of_address("throttled+2@example.com") == KINDS["throttled"]
    now = 61
    assert failures.of_address("throttled@example.com") is None
    assert failures.of_address("throttled+2@example.com") == KINDS["throttled"]


def test_only_so_many_addresses_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failing, "REMEMBERED", 3)
    failures = Failures()
    for number in range(50):
        assert failures.of_address(f"later+{number}@example.com")
        assert len(failures._tried) <= 3


def test_chaos_is_a_share_of_all_mails_in_every_way() -> None:
    drawn = Counter(Failures(25).draw() for _ in range(4000))
    assert 850 < sum(drawn.values()) - drawn[None] < 1150
    assert set(drawn) == {None, *(kind for kind in KINDS.values() if "suppressed" not in kind.what)}
    assert {Failures(0).draw() for _ in range(1000)} == {None}
    assert None not in {Failures(100).draw() for _ in range(1000)}


def test_chaos_by_the_flag_meets_mail_to_anybody() -> None:
    with start("--smtp-port", "0", "--mail-port", "0", "--chaos", "100") as process:
        catcher = Catcher(process)
        answers = {code for _ in range(12) for code in sent(catcher, "full@example.com")}
        catcher.call("POST", "/chaos", raw=b"percent=0", headers={"Content-Type": "application/x-www-form-urlencoded"})
        assert sent(catcher, "ada@example.com") == [250]
        process.kill()
    assert answers & {550, 451, 450, 554}


def test_the_page_and_the_readme_list_them_all(running: Catcher) -> None:
    page, readme = running.get("/").body, (ROOT / "README.md").read_text()
    for kind in KINDS.values():
        assert f"<code>{kind.name}@</code>" in page
        assert kind.what in page
        assert f"`{kind.name}@`" in readme


@pytest.fixture
def catching(running: Catcher, redis_server: RedisServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    """The service, whose relay is the catcher."""
    settings = {"SMTP_HOST": "127.0.0.1", "SMTP_PORT": str(running.smtp_port), "SMTP_SECURITY": "none"}
    with House(tmp_path_factory.mktemp("house"), redis_server.url, **settings, RETRY_SCHEDULE="1s") as house:
        house.worker()
        yield house.api()


def test_with_the_service_mail_fails_is_tried_again_and_is_in_doubt(catching: Api, running: Catcher) -> None:
    names = ("bounced", "spam", "later", "doubt")
    ids = {name: catching.submit(MAIL | {"to": f"{name}@example.com"}) for name in names}
    for name in ("bounced", "spam"):
        catching.wait_for(ids[name], "failed")
    for name in ("later", "doubt"):
        eventually(lambda name=name: catching.email(ids[name])["status"] == "sent")  # type: ignore[misc]
        assert len(catching.email(ids[name])["attempts"]) == 2
    caught = [mail["id"] for mail in running.get("/messages").body["messages"]]
    assert sorted(caught) == sorted([ids["later"], ids["doubt"], ids["doubt"]])
