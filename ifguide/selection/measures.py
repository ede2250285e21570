"""What a selection ranks tokens by: a column of the scores, or z-scores of it against its nulls."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ifguide import schemas
from ifguide.artifacts import verified_files
from ifguide.config import BuildMask, ConfigError
from ifguide.selection.fdr import Spread, standardise


@dataclass(frozen=True, kw_only=True)
class Measure:
    """`column` of a table of scores as it is; with a `spread`, its z-scores against the columns `nulls`."""

    column: str
    nulls: tuple[str, ...] = ()
    spread: Spread | None = None

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that `of` wants, in order."""
        return (self.column, *self.nulls)

    def of(self, arrays_BT: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
        """(1, B, T) the scores, or (1 + K, B, T) z-scores of them and of their nulls."""
        if self.spread is None:
            return arrays_BT[0][None]
        shape = arrays_BT[0].shape
        flat = [array.reshape(-1) for array in arrays_BT]
        return standardise(flat[0], np.stack(flat[1:]), self.spread).reshape(-1, *shape)


def column_of(behaviour: str, smoothed: bool | None, scores: Path, columns: Collection[str]) -> str:
    """The column of a folder of scores that tokens are ranked by, of those that it has: the smoothed one, where
    `smoothed` is None and it is there.

    Raises:
        ConfigError: smoothed scores are wanted, and there are none.
    """
    of_smoothed = schemas.smoothed_column(behaviour)
    if smoothed and of_smoothed not in columns:
        raise ConfigError(
            f"build_mask.smoothed: {scores} has no smoothed scores; unset it, or set score_corpus.smooth and score the"
            " corpus again"
        )
    return of_smoothed if of_smoothed in columns and smoothed is not False else schemas.score_column(behaviour)


def measure_of(options: BuildMask, scores: Path) -> Measure:
    """What the options rank tokens by in a folder of scores, or of an ensemble where they name others; the spread of
    z-scores is not known yet.

    Raises:
        ConfigError: z-scores or smoothed scores are wanted, and the folder of scores holds none.
    """
    columns = schemas.read_schema(next(verified_files(scores)))
    if options.others:  # the ensemble's own, of mean ranks
        return Measure(column=schemas.score_column(options.behaviour))
    if not options.standardise and options.fdr is None:
        return Measure(column=column_of(options.behaviour, options.smoothed, scores, columns.names))
    nulls = schemas.null_columns(columns, options.behaviour)
    if not nulls:
        key = "standardise" if options.fdr is None else "fdr"
        raise ConfigError(
            f"build_mask.{key}: {scores} has no null scores of {options.behaviour!r}; unset it, or set"
            " build_query.nulls (4, say), build the query and score the corpus again"
        )
    return Measure(column=schemas.score_column(options.behaviour), nulls=nulls)
