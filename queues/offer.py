"""`@task`: offers a function of tasks.py, or of TASKS_FILE, to `POST /jobs`.

Checks the arguments against the function's type hints in the API (422 with the field) and again in the worker.
"""

from __future__ import annotations

import asyncio
import importlib.util
import inspect
import json
import sys
import traceback
from collections.abc import Callable
from functools import partial, wraps
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

from pydantic import BaseModel, ConfigDict, PydanticUserError, create_model
from rq import get_current_job

from process.log import emit
from queues.jobs import JobFailed, Policy
from queues.running import Retry, allow_exceptions
from queues.table import JOBS, QUEUES
from settings import Settings, SettingsError


class NotATask(ValueError):
    """The function cannot be offered. The text says what must be true of it."""


class Task(NamedTuple):
    """A function that `POST /jobs` offers, with the model of its arguments. Times in seconds."""

    function: Callable[..., Any]
    arguments: type[BaseModel]
    queue: str
    timeout: int
    retry_in: tuple[int, ...]
    concurrency: int
    cron: str | None
    needs: str = ""  # a setting without which it is not queued

    def policy(self, settings: Settings) -> Policy:
        kept = KEPT_OF_OURS if self.needs else settings.retain_sent, settings.retain_failed
        return Policy(self.timeout, self.retry_in, *kept, self.concurrency)


OFFERED: dict[str, Task] = {}
OURS: dict[str, Task] = {}  # of the service itself: cron alone queues them
SHORT = 90  # seconds that one of these may take: the queue has other jobs; the next minute tries again
KEPT_OF_OURS = 3600  # seconds for which a job of these is kept: there is one each minute


def offered_on(queue: str) -> dict[str, Callable[..., Any]]:
    """Returns the functions that a queue's worker may run, by the name that is in a job."""
    return {f"tasks.{name}": task.function for name, task in {**OURS, **OFFERED}.items() if task.queue == queue}


def with_cron(queue: str, settings: Settings) -> dict[str, tuple[str, Policy]]:
    """Returns the cron line of each function of a queue that has one, and how its jobs are run."""
    ours = {name: task for name, task in OURS.items() if getattr(settings, task.needs)}
    mine = {name: task for name, task in {**ours, **OFFERED}.items() if task.queue == queue}
    return {f"tasks.{name}": (task.cron, task.policy(settings)) for name, task in mine.items() if task.cron}


def load_file(path: Path) -> None:
    """Imports a file of tasks that lives outside the project, and which may import what is beside it. Raises
    `SettingsError` with the line that is wrong."""
    path = path.absolute()
    spec = importlib.util.spec_from_file_location("own_tasks", path)
    if not spec or not spec.loader:
        raise SettingsError(["TASKS_FILE: must be the path of a file that ends in .py"])
    sys.path.append(str(path.parent))
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)  # dataclasses look themselves up there
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise SettingsError([f"TASKS_FILE: {_place(error, path)}: {_cause(error)}"]) from None


def _place(error: Exception, path: Path) -> str:
    """Returns the line that is wrong, or the last one of `path` on the way there."""
    if isinstance(error, SyntaxError) and error.lineno:
        return f"{error.filename}, line {error.lineno}"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    return f"{path}, line {lines[-1]}" if lines else str(path)


def _cause(error: Exception) -> str:
    """Returns what is wrong. The text of an exception is shown where it is about code: another may quote a secret."""
    if isinstance(error, (NotATask, SyntaxError)):
        return getattr(error, "msg", str(error))
    telling = isinstance(error, (ImportError, NameError, AttributeError, TypeError, KeyError, OSError))
    return f"{type(error).__name__}: {error}" if telling else f"{type(error).__name__} was raised"


def task(
    function: Callable[..., Any] | None = None,
    /,
    *,
    queue: str = JOBS,
    timeout: int = 60,
    retry_in: tuple[int, ...] = (60, 300),
    concurrency: int = 0,
    cron: str | None = None,
) -> Callable[..., Any]:
    """Offers a function to `POST /jobs`, and to `cron`; to run on a queue of queues.table; times in seconds. Raises
    `NotATask`.

    RQ raises JobTimeoutException in it after `timeout`, and kills its process a minute later. After an exception it is
    tried again after each pause in `retry_in`, which must have at least one: else a worker killed at the wrong moment
    fails a job that never ran. No more than `concurrency` jobs of it run at the same time, on all machines together; 0:
    as many as there are workers. With `cron`, five fields as in a crontab, in the machine's time zone, it is queued by
    itself, with the defaults of its arguments. A pooled queue takes no task: nothing could interrupt it there.
    """
    if function is None:
        given = partial(task, queue=queue, timeout=timeout, retry_in=retry_in)
        return partial(given, concurrency=concurrency, cron=cron)
    _check_policy(queue, timeout, retry_in, concurrency)
    arguments = _arguments(function)
    _check_cron(cron, arguments)

    checked = _checked(function, arguments)
    OFFERED[function.__name__] = Task(checked, arguments, queue, timeout, retry_in, concurrency, cron)
    return checked


def each_minute(needs: str) -> Callable[[Callable[[], Any]], Callable[..., Any]]:
    """Lets cron queue a function of the service itself, one at a time, where the setting `needs` is set."""

    def offer(function: Callable[[], Any]) -> Callable[..., Any]:
        arguments = _arguments(function)
        checked = _checked(function, arguments)
        OURS[function.__name__] = Task(checked, arguments, JOBS, SHORT, (30,), 1, "* * * * *", needs)
        return checked

    return offer


def _checked(function: Callable[..., Any], arguments: type[BaseModel]) -> Callable[..., Any]:
    """Returns what a job calls: the function, once its arguments are checked."""

    @wraps(function)
    def checked(**given: Any) -> Any:
        valid = arguments.model_validate_json(json.dumps(given))
        job = get_current_job()
        try:
            result = _called(function, {name: getattr(valid, name) for name in arguments.model_fields})
        except Exception as error:
            emit("task_failed", id=job and job.id, task=function.__name__, error=type(error).__name__)
            raise
        emit("task_finished", id=job and job.id, task=function.__name__)
        return result

    return checked


def _check_policy(queue: str, timeout: int, retry_in: tuple[int, ...], concurrency: int) -> None:
    queues = [row.name for row in QUEUES.values() if not row.pooled]
    if queue not in queues:
        raise NotATask(f"queue must be one that is not pooled: {' or '.join(queues)}")
    if type(timeout) is not int or timeout < 1:
        raise NotATask("timeout must be a whole number of seconds, such as 300 for five minutes")
    if not isinstance(retry_in, (tuple, list)) or not all(type(pause) is int and pause >= 0 for pause in retry_in):
        raise NotATask("retry_in must be a tuple of pauses in whole seconds, such as (60, 300)")
    if type(concurrency) is not int or concurrency < 0:
        raise NotATask("concurrency must be a whole number: how many jobs may run at the same time, such as 1")


def _check_cron(cron: str | None, arguments: type[BaseModel]) -> None:
    if cron is None:
        return
    from queues.cron import next_time  # here, since croniter and dateutil take 0.7 MB, and few have a task with `cron`

    try:
        next_time(cron)
    except (ValueError, AttributeError):
        raise NotATask('cron must be five fields as in a crontab that are due some day, such as "0 7 * * *"') from None
    for name, field in arguments.model_fields.items():
        if field.is_required():
            raise NotATask(f"{arguments.__name__}: its argument {name} must have a default: cron gives it none")


def _arguments(function: Callable[..., Any]) -> type[BaseModel]:
    """Returns the model of a function's arguments, made from its type hints. Raises `NotATask`."""
    if not inspect.isfunction(function):
        raise NotATask("must stand before a function, as @task or with names: @task(timeout=300)")
    hints, fields = get_type_hints(function, include_extras=True), dict[str, Any]()
    for name, argument in inspect.signature(function).parameters.items():
        if argument.kind not in (argument.POSITIONAL_OR_KEYWORD, argument.KEYWORD_ONLY) or name.startswith("_"):
            raise NotATask(
                f"{function.__name__}: its argument {name} must be a plain one, without * or / or _ before it"
            )
        if name not in hints:
            raise NotATask(f"{function.__name__}: its argument {name} must have a type hint, such as {name}: str")
        fields[name] = (hints[name], ... if argument.default is argument.empty else argument.default)
    config = ConfigDict(extra="forbid", strict=True, hide_input_in_errors=True)
    try:
        return create_model(function.__name__, __config__=config, **fields)
    except PydanticUserError as error:
        raise NotATask(f"{function.__name__}: its arguments cannot be read: {str(error).splitlines()[0]}") from None


def _called(function: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    """Returns the result. Raises `JobFailed` for one that nobody could read, and not to run again: the task has run."""
    result = function(**arguments)
    if inspect.iscoroutine(result):
        result = asyncio.run(result)
    try:
        if not isinstance(result, Retry):
            json.dumps(result, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        allow_exceptions(0)
        raise JobFailed(f"the task has run, but what it returns must be JSON: {error}") from None
    return result
