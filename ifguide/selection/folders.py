"""Where a mask lies, and what it was made of."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class SelectionFolders:
    """The folders of a mask and of the ranking that it follows, and of the corpus and the scores that both are of.

    `ensemble`: of the mean ranks in several runs' scores, where `build_mask.others` names some."""

    corpus: Path
    scores: Path
    ensemble: Path
    ranking: Path
    mask: Path
