"""What the tests of smtp/ send, to whom, and what a relay may offer for it."""

from __future__ import annotations

import pytest

ADA, BOB, CAY = "ada@example.com", "bob@example.com", "cay@example.com"
SENDER = "sender@example.com"
MIME = b"Subject: Hello\r\nTo: ada@example.com\r\n\r\nHello, Ada.\r\n"
LARGE = MIME + (b"x" * 70 + b"\r\n") * 100_000 + b"The end.\r\n"  # 7 MB: more than sockets buffer
LOGIN = ("mailer", "planted-password")
PIPES = ["PIPELINING"]
WAYS = pytest.mark.parametrize("offers", [[], PIPES], ids=["plain", "pipelined"])
