"""A student that learns nothing: exact scores of the direction V in the last third of the transformer blocks alone.

    score_j = offset + slope <V_upper, grad NLL_j>

Below the first of these blocks the pass runs one stream in place of two, and has no product with V there
(`influence.paired_blocks`). Slope and offset are the least-squares line to the exact scores of the sample, so that both
can stand in one table: no labels choose anything else. With L blocks those from L - ceil(L / 3) on are taken.

Cost: 2 N FLOP a token for the N parameters below and 4 to 6 N for those above, 4 D V for the LM head.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from torch import Tensor
from transformers import PreTrainedModel

from ifguide.artifacts import publish
from ifguide.influence.paired_blocks import block_number
from ifguide.influence.scorer import TokenScorer
from ifguide.influence.scoring_worker import ScoringSettings
from ifguide.models import transformer_blocks
from ifguide.student.calibration import AS_IT_IS, Calibration


def first_of_suffix(num_blocks: int) -> int:
    """The place of the first block of the last third."""
    return num_blocks - math.ceil(num_blocks / 3)


def suffix_of(model: PreTrainedModel, direction: Mapping[str, Tensor], first: int) -> dict[str, Tensor]:
    """What of a direction is in the blocks from `first` on.

    Raises:
        ValueError: a module lies outside the blocks, or none in the last ones.
    """
    blocks_name, _ = transformer_blocks(model)
    numbers = {name: block_number(blocks_name, name) for name in direction}
    outside = [name for name, number in numbers.items() if number is None]
    if outside:
        raise ValueError(
            f"fit_student.kind: suffix takes V in the last of the blocks {blocks_name}, and {', '.join(outside)} is in"
            " none of them; choose another kind"
        )
    suffix = {name: V for name, V in direction.items() if (numbers[name] or 0) >= first}
    if not suffix:
        raise ValueError(
            f"fit_student.kind: suffix takes V in {blocks_name} from block {first} on, and V touches none of them;"
            " choose another kind"
        )
    return suffix


@dataclass(frozen=True, kw_only=True, eq=False)
class SuffixStudent:
    """Blocks from `first` on; `steps` are those of the difference engine for it, empty of another engine."""

    first: int
    steps: tuple[float, ...] = ()
    slope: float = AS_IT_IS.slope
    offset: float = AS_IT_IS.offset

    def calibrated(self, line: Calibration) -> SuffixStudent:
        """The student whose scores are on that line."""
        return replace(self, slope=line.slope, offset=line.offset)

    def scores(self, suffix: np.ndarray) -> np.ndarray:
        """Of exact scores of the suffix, float32 of any shape; what has no prediction holds anything."""
        return (self.offset + self.slope * suffix.astype(np.float64)).astype(np.float32)

    def save(self, path: Path) -> None:
        """Publish what `load` reads."""
        with publish(path) as part, part.open("wb") as file:
            np.savez(file, **{**vars(self), "steps": np.array(self.steps, np.float64)})

    @classmethod
    def load(cls, path: Path) -> SuffixStudent:
        """What `save` wrote."""
        with np.load(path) as saved:
            return cls(
                first=int(saved["first"]),
                steps=tuple(saved["steps"].tolist()),
                slope=float(saved["slope"]),
                offset=float(saved["offset"]),
            )


def suffix_scorer(
    settings: ScoringSettings, model: PreTrainedModel, direction: Mapping[str, Tensor], student: SuffixStudent
) -> TokenScorer:
    """What scores a run's blocks by the suffix of its direction, not yet on the line to exact scores: by the run's
    method, with the student's steps, or such as it finds itself where there are none.

    Raises:
        ValueError: V touches none of the last blocks, or modules outside of them.
    """
    return TokenScorer(
        model,
        suffix_of(model, direction, student.first),
        attribution=settings.attribution,
        method=settings.decision.method,
        steps=student.steps or None,
        beginning=settings.beginning.token,
    )
