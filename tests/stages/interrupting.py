"""A stage that ends before one of its tasks, as if its driver had been killed there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pytest

from ifguide.distributed.tasks import run_task


@contextmanager
def interrupted_before(
    monkeypatch: pytest.MonkeyPatch, verb: ModuleType, function: Callable[..., Any]
) -> Iterator[None]:
    """Inside, the stage `verb` ends where it would run `function` as a task."""

    def run(called: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        if called is function:
            raise ZeroDivisionError
        return run_task(called, *arguments, **options)

    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):  # noqa: PT012  # what is within is the caller's
        patch.setattr(verb, "run_task", run)
        yield
