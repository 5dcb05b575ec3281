"""Says which version this is: the latest heading of CHANGELOG.md.

In a file of its own, since the dashboard shows it and must not load the API for it.
"""

from __future__ import annotations

import re
from pathlib import Path

VERSION = re.findall(r"^## (\S+)", (Path(__file__).parent.parent / "CHANGELOG.md").read_text(), re.MULTILINE)[0]
