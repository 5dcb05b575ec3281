"""A list of octets is taken for the base64 of the same file, and nothing else in a body changes."""

from __future__ import annotations

import io
import json
from base64 import b64encode
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fuzz_targets import with_base64
from tests.http_api import MAIL
from tests.sample_mails import PROPERTY
from tests.servers import Api
from web import octets
from web.errors import Refusal

SETTINGS = {"MAX_MESSAGE_BYTES": "300000"}
# fmt: off
LISTS = [
    "[1,2,3,255]", "[ 0,\n 7 ]", "[]", "[256]", "[1,,2]", "[1,]", "[,1]", "[01]", "[-1]", "[1.0]", '["1"]', "[1 2]",
    "[1",
]
WORDS = ['"content":', '"data" : ', '"\\"content":', '"x\\\\"', '"[1,2]"', '"', ",", "{", "}", "[", "]", ":", "\\", "é"]
# fmt: on
DOCUMENT = st.lists(st.sampled_from([*LISTS, *WORDS]), max_size=12).map("".join)
VALUE = st.sampled_from(LISTS[:3]) | DOCUMENT.map(json.dumps)
FILE = st.sampled_from(['"content"', '"content" ', '"data"', '"a\\"content"', '"a"']).flatmap(
    lambda name: VALUE.map(lambda value: f'{{{name}:{value}, "a\\\\":{{"type":"Buffer","data":{value}}}}}')
)
MAILS = st.tuples(FILE, FILE, VALUE).map(
    lambda of: (
        f'{{"attachments":[{of[0]},{{"content":{{"type":"Buffer","data":{of[2]}}}}}],"data":{of[2]},"x":{of[1]}}}'
    )
)


def read(raw: bytes, limit: int = 10**9) -> Any:
    text, lists = octets.read(io.BytesIO(raw), len(raw), limit)
    return octets.with_files(json.loads(text), lists)


@PROPERTY
@given(MAILS | DOCUMENT | MAILS.map(lambda one: f"[{one}]"), st.sampled_from([20, 40, 70, 65536]))
def test_nothing_but_the_octets_of_a_file_changes(document: str, piece: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(octets, "PIECE", piece)
        try:
            wanted = with_base64(json.loads(document))
        except ValueError:
            with pytest.raises(ValueError, match=r"."):
                read(document.encode())
        else:
            assert read(document.encode()) == wanted


def body(name: str, value: str) -> bytes:
    return f'{{"attachments":[{{"{name}":{value}}}]}}'.encode()


def test_a_file_counts_as_its_base64_however_it_comes() -> None:
    data = bytes(range(256)) * 1000
    for form in (json.dumps(list(data)), json.dumps(list(data), indent=1), f'"{b64encode(data).decode()}"'):
        assert read(body("content", form), 341_400)["attachments"] == [{"content": b64encode(data).decode()}]
        with pytest.raises(Refusal) as refused:
            read(body("content", form), 341_336)
        assert refused.value.status == 413
        assert len(body("content", form)) < octets.ON_THE_WIRE * 341_400 or "\n" in form


@pytest.mark.parametrize(
    "raw",
    [
        body("data", "[" + "7," * 100_000 + "7]"),  # no file's
        body("content", "[" + "7," * 100_000 + "256]"),
        body("content", "[" + "7," * 100_000),
        b"[" + b'{"data":[-1]},' * 20_000,
    ],
)
def test_a_long_list_that_is_no_file_is_refused(raw: bytes) -> None:
    with pytest.raises(Refusal, match="10000 values"):
        read(raw)


@pytest.mark.parametrize("raw", [b'{"data":[' + b"1" * 150_000, b'{"data":[1,' + b" " * 300_000, b'"data":' * 99_999])
def test_what_has_no_end_is_left_to_the_parser(raw: bytes) -> None:
    with pytest.raises(ValueError, match=r"Expecting|Extra|digits"):
        read(raw)


def test_a_list_three_times_as_long_as_the_limit_is_taken(api: Api) -> None:
    data = bytes(range(256)) * 800
    files = [{"filename": "a", "content": list(data)}, {"filename": "b", "content": {"type": "Buffer", "data": [1, 2]}}]
    raw = json.dumps(MAIL | {"attachments": files}).encode()
    assert len(raw) > 3 * int(SETTINGS["MAX_MESSAGE_BYTES"])
    first, again = (api.call("POST", "/emails", raw=raw, headers={"Idempotency-Key": "list"}) for _ in range(2))
    assert (first.status, first.body, again.headers["Idempotent-Replayed"]) == (200, again.body, "true")
