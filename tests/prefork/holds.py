"""Holds processes where a test wants to find them: what it does meanwhile comes at the same place on any machine.

A test asks for a hold by the environment of what it starts, or calls it in the process that is to be held.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import time
from collections.abc import Callable, Collection
from types import ModuleType
from typing import Any

STEPS = "IFGUIDE_TESTS_HOLD_STEPS"  # "20,40": a training waits after these steps until it is asked to stop
ATTEMPTS = "IFGUIDE_TESTS_HOLD_ATTEMPTS"  # a worker on shards waits for ever in its first one


def settle() -> None:
    """Hold what the environment names, in modules that may not be imported yet."""
    if STEPS in os.environ:
        steps = {int(step) for step in os.environ[STEPS].split(",")}
        when_imported("ifguide.training.loop", lambda module: hold_steps(module.TrainingLoop, steps))
    if ATTEMPTS in os.environ:
        when_imported("ifguide.distributed.ledger", lambda module: hold_attempts(module.Attempts, module.ACTORS))


def hold_steps(loop: Any, steps: Collection[int], released: Callable[[], bool] = lambda: False) -> None:
    """Rank 0 takes no step after these, until it is asked to stop or `released`; other ranks wait for it in theirs."""
    take = loop._train_step

    def hold_and_take(self: Any) -> Any:
        while self.rank == 0 and self.step in steps and not (self.stopping() or released()):
            time.sleep(0.02)
        return take(self)

    loop._train_step = hold_and_take


def hold_attempts(attempts: Any, actors: str) -> None:
    """An attempt at a shard never goes further than that it has begun."""
    begin = attempts.begin

    def begin_and_hold(self: Any) -> None:
        begin(self)
        while self.path.parent.name != actors:
            time.sleep(1)

    attempts.begin = begin_and_hold


def when_imported(name: str, change: Callable[[ModuleType], None]) -> None:
    """Change a module: now, or as soon as it is imported."""
    if name in sys.modules:
        change(sys.modules[name])
        return

    class Finder:
        @staticmethod
        def find_spec(wanted: str, *_: Any) -> Any:
            if wanted != name:
                return None
            sys.meta_path.remove(Finder)
            spec: Any = importlib.util.find_spec(name)
            run = spec.loader.exec_module

            def run_and_change(module: ModuleType) -> None:
                run(module)
                change(module)

            spec.loader.exec_module = run_and_change
            return spec

    sys.meta_path.insert(0, Finder)
