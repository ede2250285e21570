"""Sides of `bench/training_step.py`, each in a process of its own: what one does to its process is not the others'.

The parent asks by lines of its child's standard input; an answer is the line of its output that begins with `ANSWER`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

ANSWER = "answer: "
Ask = Callable[[str, str], Any]  # side and request


@contextmanager
def started(names: Sequence[str], command: Sequence[str]) -> Iterator[Ask]:
    """Start a process of `command` and a name for each side; they end with the context."""
    with ExitStack() as stack:
        processes = {name: stack.enter_context(_started([sys.executable, *command, name])) for name in names}

        def ask(name: str, request: str) -> Any:
            process = processes[name]
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(f"{request}\n")
            process.stdin.flush()
            for line in process.stdout:
                if line.startswith(ANSWER):
                    return json.loads(line.removeprefix(ANSWER))
            raise RuntimeError(f"the side {name} ended with {process.wait()} when it was asked for {request}")

        yield ask


@contextmanager
def _started(command: Sequence[str]) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        try:
            yield process
        finally:
            process.stdin.close()
            try:
                process.wait(90)
            finally:
                process.kill()


def serve(answer: Callable[[str], Any]) -> None:
    """Answer what is asked until there is nothing more."""
    for line in sys.stdin:
        print(f"{ANSWER}{json.dumps(answer(line.strip()))}", flush=True)
