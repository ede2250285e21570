"""Which rows of an input are taken: all, a range, or those whose numbers a file lists."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ifguide.storage import local_copy, location, stamp

ENDLESS = int(np.iinfo(np.int64).max)


@dataclass(frozen=True, kw_only=True)
class RowChoice:
    """Rows start <= row < stop; of `indices` (n,), ascending, those alone. There must be at least `wanted` rows."""

    start: int = 0
    stop: int = ENDLESS
    wanted: int = 0
    indices: NDArray[np.int64] | None = None

    @classmethod
    def of(cls, rows: tuple[int, int] | str | None) -> RowChoice:
        """What `rows` of an input says.

        Raises:
            FileNotFoundError, ValueError: it names a file that is not there, or that holds something else than the
                numbers of different rows; names it.
        """
        if rows is None:
            return cls()
        if isinstance(rows, str):
            mark = stamp(_existing(rows))
            indices = _read(rows) if mark is None else _read_once(rows, mark)
            stop = int(indices[-1]) + 1
            return cls(start=int(indices[0]), stop=stop, wanted=stop, indices=indices)
        return cls(start=rows[0], stop=rows[1], wanted=rows[1])

    @property
    def count(self) -> int:
        """How many rows are taken of an input that has them all."""
        return self.stop - self.start if self.indices is None else len(self.indices)

    def rows_from(self, first: int) -> int:
        """How many rows from row `first` on have to be read: none after the last one that is taken."""
        return max(0, self.stop - first)

    def lack_of(self, path: str, rows: int) -> str | None:
        """What to say of an input of so many rows; None where these are enough."""
        if rows >= self.wanted:
            return None
        return f"ends at {self.wanted}, but {path} has {rows} rows; lower it"

    def __contains__(self, row: int) -> bool:
        if not self.start <= row < self.stop:
            return False
        return self.indices is None or bool(self.indices[np.searchsorted(self.indices, row)] == row)


def _existing(path: str) -> Path:
    file = location(path)
    if not file.is_file():
        raise FileNotFoundError(f"{path} does not exist: name a .npy or text file of row numbers, or [start, stop]")
    return file


@lru_cache(maxsize=8)
def _read_once(path: str, _stamp: str) -> NDArray[np.int64]:
    return _read(path)


def _read(path: str) -> NDArray[np.int64]:
    file = local_copy(path)
    if file.suffix == ".npy":
        try:
            indices = np.load(file, allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise ValueError(f"{path} is no .npy file of numbers ({error}); write it anew") from error
    else:
        indices = _numbers(path, file)
    if indices.ndim != 1 or indices.dtype.kind not in "iu":
        raise ValueError(f"{path} holds {indices.dtype} of shape {indices.shape}; one list of row numbers is needed")
    if not len(indices):
        raise ValueError(f"{path} lists no row; leave `rows` out for all")
    ordered = np.sort(indices.astype(np.int64))
    if ordered[0] < 0:
        raise ValueError(f"{path} lists row {ordered[0]}; rows count from 0")
    twice = ordered[1:][ordered[1:] == ordered[:-1]]
    if len(twice):
        raise ValueError(f"{path} lists row {twice[0]} twice; a row is taken once")
    return ordered


def _numbers(path: str, file: Path) -> NDArray[np.int64]:
    """One number a line; blank lines are none."""
    numbers = []
    for place, line in enumerate(file.read_bytes().splitlines(), start=1):
        if line.strip():
            try:
                numbers.append(int(line))
            except ValueError as error:
                raise ValueError(f"{path} line {place}: {line[:40]!r} is no row number; one on each line") from error
    return np.array(numbers, np.int64)
