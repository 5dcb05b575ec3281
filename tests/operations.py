"""docs/operations.md as data: its commands, for the tests that run them as they stand there."""

from __future__ import annotations

import re

from tests.servers import ROOT

PAGE = (ROOT / "docs" / "operations.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", PAGE, re.DOTALL)  # (language, text)


def block(marker: str) -> str:
    """The one block that holds the marker."""
    found = [text for _, text in BLOCKS if marker in text]
    assert len(found) == 1, (marker, len(found))
    return str(found[0])


def line(marker: str) -> str:
    """The one line of a block that holds the marker, without its comment."""
    found = [line for _, text in BLOCKS for line in text.splitlines() if marker in line]
    assert len(found) == 1, (marker, found)
    return re.sub(r"\s+#.*", "", found[0])
