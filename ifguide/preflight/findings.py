"""What a preflight found: faults, and what it could not tell."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from ifguide import extras
from ifguide.config import ConfigError
from ifguide.storage import is_store_error

SHOWN = 120  # characters of a value


class Finding(NamedTuple):
    """A key of the config, its value, and what is wrong with it or not known of it, with what to do."""

    key: str
    value: Any
    text: str

    def __str__(self) -> str:
        shown = self.value if isinstance(self.value, str) else json.dumps(self.value, default=str)
        return f"{self.key} = {shown if len(shown) <= SHOWN else shown[:SHOWN] + '...'}: {self.text}"


class PreflightError(ConfigError):
    """A run that would fail; the message lists every fault, and what could not be checked."""

    def __init__(self, faults: Sequence[Finding], unchecked: Sequence[Finding] = ()):
        self.faults, self.unchecked = tuple(faults), tuple(unchecked)
        count = "one fault" if len(faults) == 1 else f"{len(faults)} faults"
        lines = [f"{count}, and nothing was started (--no-preflight goes on all the same):"]
        lines += [f"  {fault}" for fault in faults]
        lines += [f"  not checked: {finding}" for finding in unchecked]
        super().__init__("\n".join(lines))


class Findings:
    """The faults so far, and what could not be checked."""

    def __init__(self) -> None:
        self.faults: list[Finding] = []
        self.unchecked: list[Finding] = []

    def fault(self, key: str, value: Any, text: str) -> None:
        """Add a fault, once."""
        finding = Finding(key, value, text.removeprefix(f"{key}: "))
        if finding not in self.faults:
            self.faults.append(finding)

    def leave(self, key: str, value: Any, text: str) -> None:
        """Name what could not be checked, once."""
        finding = Finding(key, value, text)
        if finding not in self.unchecked:
            self.unchecked.append(finding)

    @property
    def count(self) -> int:
        """How many there are of both."""
        return len(self.faults) + len(self.unchecked)

    @contextlib.contextmanager
    def caught(self, key: str, value: Any) -> Iterator[None]:
        """Take the errors that users get within as faults of a key; one that names a longer key is of that key."""
        try:
            yield
        except ModuleNotFoundError as error:
            if (missing := extras.advice(error)) is None:
                raise
            self.fault(key, value, missing)
        except (ValueError, OSError) as error:
            self.fault(key, value, str(error))
        except Exception as error:
            if not is_store_error(error):
                raise
            self.fault(key, value, str(error))
