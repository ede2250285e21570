"""The `fit_student` section."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ifguide.config.typed_yaml import option


@dataclass(frozen=True, kw_only=True)
class FitStudent:
    """A student of the token scores, fitted on a random sample of the corpus that is scored exactly. Made only where
    `score_corpus.scorer` is not `exact`.

    Attributes:
        kind: `head` reads the proxy's hidden states in one ordinary forward pass; `ngram` looks the last tokens up, and
            wants no model.
        sample_fraction: share of the corpus' blocks that are scored exactly, the same of every source.
        held_out: share of these that the student's options are chosen on.
        partitions: parts of the sample. A part is one piece of work, and the unit of resuming. Its worker has
            `score_corpus.resources`.
    """

    kind: Literal["head", "ngram"] = "head"
    sample_fraction: float = option(0.01, above=0, at_most=1)
    held_out: float = option(0.25, above=0, at_most=0.9)
    partitions: int = option(1, at_least=1)
