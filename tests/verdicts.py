"""The verdicts by their short names, as tables of many rows need them."""

from __future__ import annotations

from smtp.policy import Verdict

ACCEPTED, TRY_AGAIN, REFUSED = Verdict.ACCEPTED, Verdict.TRY_AGAIN, Verdict.REFUSED
IN_DOUBT, TROUBLE = Verdict.IN_DOUBT, Verdict.TROUBLE
