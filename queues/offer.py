"""`@task`: offers a function of tasks.py, or of TASKS_FILE, to `POST /jobs`.

Checks the arguments against the function's type hints in the API (422 with the field) and again in the worker.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

from pydantic import BaseModel, ConfigDict, create_model
from rq import get_current_job

from process.log import emit, where
from queues.table import JOBS, QUEUES
from settings import SettingsError


class Task(NamedTuple):
    """A function that `POST /jobs` offers, with the model of its arguments. Times in seconds."""

    function: Callable[..., Any]
    arguments: type[BaseModel]
    queue: str
    timeout: int
    retry_in: tuple[int, ...]


OFFERED: dict[str, Task] = {}


def offered_on(queue: str) -> dict[str, Callable[..., Any]]:
    """Returns the functions that a queue's worker may run, by the name that is in a job."""
    return {f"tasks.{name}": task.function for name, task in OFFERED.items() if task.queue == queue}


def load_file(path: Path) -> None:
    """Imports a file of tasks that lives outside the project. Raises `SettingsError` with the line that is wrong."""
    spec = importlib.util.spec_from_file_location("own_tasks", path)
    if not spec or not spec.loader:
        raise SettingsError(["TASKS_FILE: must be the path of a file that ends in .py"])
    try:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
    except SyntaxError as error:
        raise SettingsError([f"TASKS_FILE: {path}, line {error.lineno}: {error.msg}"]) from None
    except Exception as error:
        raise SettingsError([f"TASKS_FILE: {path} cannot be imported: {where(error)}"]) from None


def task(
    *, queue: str = JOBS, timeout: int = 60, retry_in: tuple[int, ...] = (60, 300)
) -> Callable[[Callable[..., Any]], Any]:
    """Offers a function to `POST /jobs`, to run on a queue of queues.table; times in seconds.

    RQ raises JobTimeoutException in it after `timeout`, and kills its process a minute later. After an exception it is
    tried again after each pause in `retry_in`, which must have at least one: else a worker killed at the wrong moment
    fails a job that never ran. Raises `ValueError` for a pooled queue: nothing could interrupt a task there.
    """
    if QUEUES[queue].pooled:
        raise ValueError(f"a task must run on a queue that is not pooled, and {queue} is")

    def offer(function: Callable[..., Any]) -> Callable[..., Any]:
        hints = get_type_hints(function, include_extras=True)
        fields: dict[str, Any] = {
            name: (hints[name], ... if parameter.default is parameter.empty else parameter.default)
            for name, parameter in inspect.signature(function).parameters.items()
        }
        config = ConfigDict(extra="forbid", strict=True, hide_input_in_errors=True)
        arguments = create_model(function.__name__, __config__=config, **fields)

        @wraps(function)
        def checked(**given: Any) -> Any:
            valid = arguments.model_validate_json(json.dumps(given))
            job = get_current_job()
            try:
                result = function(**{name: getattr(valid, name) for name in fields})
            except Exception as error:
                emit("task_failed", id=job and job.id, task=function.__name__, error=type(error).__name__)
                raise
            emit("task_finished", id=job and job.id, task=function.__name__)
            return result

        OFFERED[function.__name__] = Task(checked, arguments, queue, timeout, retry_in)
        return checked

    return offer
