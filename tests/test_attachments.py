"""GET /emails/{id}/attachments: the files of a stored mail, and never what is in them."""

from __future__ import annotations

import json
import zlib
from base64 import b64decode, b64encode
from typing import Any

import pytest
import redis
from hypothesis import given
from hypothesis import strategies as st

from mail.attachments import unpacked, with_sizes
from mail.draft import compose
from mail.request import parse
from tests import sample_mails as samples
from tests.http_api import MAIL, UNKNOWN_ID, held_to_the_shape
from tests.servers import Api

FILES = [
    {"filename": "a.txt", "content": "aGVsbG8="},
    {"filename": 'a ","content":"b".png', "content": "", "content_id": "logo"},
    {"filename": "large.bin", "content": b64encode(bytes(2_000_000)).decode()},
]
HTML = "<p>" + ',"attachments":[{"content":"aGVsbG8="}]' * 9


def test_the_files_of_a_mail_are_listed_until_its_content_is_dropped(api: Api, client: redis.Redis) -> None:
    mail_id = api.submit({**MAIL, "html": HTML, "headers": {"content": '"', "attachments": "["}, "attachments": FILES})
    path = f"/emails/{mail_id}/attachments"
    answer = api.get(path).body
    assert (answer["object"], answer["has_more"]) == ("list", False)
    shown = [(one["filename"], one["size"], one["content_disposition"], one["content_id"]) for one in answer["data"]]
    assert shown == [
        ("a.txt", 5, "attachment", None),
        (FILES[1]["filename"], 0, "inline", "logo"),
        ("large.bin", 2_000_000, "attachment", None),
    ]
    assert len({one["id"] for one in answer["data"]}) == 3
    assert api.get(path).body == answer
    client.hset(f"mail:{mail_id}", "content", b"damaged")
    held_to_the_shape(api.get(path), 404, "not_found")
    api.call("DELETE", f"/jobs/{mail_id}")
    assert api.get(path).body["data"] == []
    assert "all but what is in the file" in api.get(f"{path}/{UNKNOWN_ID}").body["message"]


@samples.WHOLE
@given(samples.requests(), st.sampled_from([1, 7, 100]))
def test_whatever_a_mail_says_its_files_are_found(asked: tuple[dict[str, Any], Any], piece: int) -> None:
    message = compose(parse(asked[0], default_sender=None, max_recipients=50))
    whole = "".join(message.to_json()[1]).encode()
    found = with_sizes(whole[start : start + piece] for start in range(0, len(whole), piece))
    sizes = [{**one, "content": len(b64decode(one["content"]))} for one in message.attachments]
    assert json.loads(found) == {"attachments": sizes}


def test_what_is_packed_is_unpacked_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mail.attachments.PIECE", 1000)
    pieces = list(unpacked(zlib.compress(bytes(10**6) + b"end")))
    assert (max(map(len, pieces)), b"".join(pieces)) == (1000, bytes(10**6) + b"end")
