"""A few hundred mails through two of ours in a row, while the line between them is cut and processes are killed.

`python -m chaos.upstream --mails 10000` plays it at length.
"""

from __future__ import annotations

from pathlib import Path

from chaos.upstream import CUTS, play


def test_each_mail_arrives_once_and_none_is_ever_in_doubt(tmp_path: Path) -> None:
    result = play(tmp_path, 300, share=0.3, every=4, seed=1, patience=300)
    assert result.is_good, str(result)
    assert set(result.cuts) == set(CUTS)
    assert all(result.cuts.values())
    assert result.kills >= 2
