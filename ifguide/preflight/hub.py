"""Whether the hub has a repository, and small files of it: one question each, and none after one without an answer.

A machine without a network loses at most `TIMEOUT_SECONDS`, one with HF_HUB_OFFLINE set or the files in its cache
nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeVar

from huggingface_hub import HfApi, constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

TIMEOUT_SECONDS = 3.0
Answer = TypeVar("Answer")


class Hub:
    """The hub, as far as this machine can see it."""

    def __init__(self) -> None:
        self.silent = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else ""  # why it is asked no more

    def unchecked(self, name: str, revision: str | None, kind: Literal["model", "dataset"] = "model") -> str | None:
        """Why it is not known whether the hub has the repository; None where it has, or the cache does.

        Raises:
            ValueError: the hub says that there is none; says what to do.
        """
        if isinstance(try_to_load_from_cache(name, "config.json", revision=revision, repo_type=kind), str):
            return None
        if self.silent:
            return f"the hub was not asked: {self.silent}"
        error = _ask(name, revision, kind)
        if error is None:
            return None
        if isinstance(error, HFValidationError):
            raise ValueError(
                f"neither a file or folder here nor a name of the hub ({error}); check the path"
            ) from error
        if isinstance(error, GatedRepoError):
            raise ValueError("the hub gives it only to some: ask for access on its page, and set HF_TOKEN") from error
        if isinstance(error, RevisionNotFoundError):
            raise ValueError(f"the hub has no revision {revision!r} of it; check `revision`") from error
        if isinstance(error, RepositoryNotFoundError):
            raise ValueError(
                f"the hub has no such {kind}, and no such folder is here; check the name (a private one needs HF_TOKEN)"
            ) from error
        self.silent = f"{type(error).__name__}: {error}".splitlines()[0]
        return f"the hub did not answer ({self.silent})"

    def file(self, name: str, file: str) -> Path | None:
        """A small file of a model that the hub has; None where it does not come in time."""
        path = try_to_load_from_cache(name, file)
        if not isinstance(path, str):
            path = None if self.silent else _fetch(name, file)
        return None if path is None else Path(path)


def _ask(name: str, revision: str | None, kind: str) -> Exception | None:
    """What came of asking; None: the hub has it."""

    def ask() -> None:
        api: Any = HfApi()
        (api.model_info if kind == "model" else api.dataset_info)(name, revision=revision, timeout=TIMEOUT_SECONDS)

    return _within_time(ask)[1]


def _fetch(name: str, file: str) -> str | None:
    """Where a file of a model is in the cache, fetched if need be; None where it does not come."""
    return _within_time(lambda: hf_hub_download(name, file, etag_timeout=TIMEOUT_SECONDS))[0]


def _within_time(call: Callable[[], Answer]) -> tuple[Answer | None, Exception | None]:
    """What a call gives or raises; in a thread, as looking up the hub's address cannot be given a time."""
    answer: list[tuple[Answer | None, Exception | None]]
    answer = [(None, TimeoutError(f"nothing within {TIMEOUT_SECONDS:g} s"))]

    def run() -> None:
        try:
            answer[0] = call(), None
        except Exception as error:  # of the client's many kinds; the caller tells them apart
            answer[0] = None, error

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(TIMEOUT_SECONDS)
    return answer[0]
