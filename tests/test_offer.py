"""A task: its arguments are made from its type hints and checked."""

from __future__ import annotations

from datetime import date
from typing import Annotated

import pytest
from pydantic import Field, ValidationError

from queues import offer


def test_a_tasks_arguments_are_made_from_its_type_hints(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offer, "OFFERED", {})

    @offer.task(timeout=5)
    def plan(day: date, times: Annotated[int, Field(ge=1)] = 1) -> str:
        return f"{day:%A} {times}"

    offered = offer.OFFERED["plan"]
    assert offered.timeout == 5
    assert plan(day="2026-11-21", times=2) == "Saturday 2"  # as RQ calls it, with what JSON can carry
    for wrong in ({}, {"day": "soon"}, {"day": "2026-11-21", "times": 0}, {"day": "2026-11-21", "more": 1}):
        with pytest.raises(ValidationError):
            plan(**wrong)


def test_a_task_is_not_offered_on_a_pooled_queue_where_nothing_could_interrupt_it() -> None:
    with pytest.raises(ValueError, match="must run on a queue that is not pooled"):
        offer.task(queue="email")
