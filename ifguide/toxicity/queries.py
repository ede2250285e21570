"""The two query sets that make toxicity the behaviour to find.

IF-Guide (arXiv 2506.01790) describes a behaviour by two sets of queries (prompt, completion): the direction V is the
mean gradient over the toxic set minus the mean over the non-toxic set. A classifier scores the continuations of a
prompt table; at or above one threshold a row is a toxic query, at or below the other a non-toxic one, and of each at
most a set number is taken. Rows between the thresholds are in neither set.

It does not tokenise, and it does not judge the classifier: its errors are the query sets' errors.
"""

import hashlib
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ifguide.toxicity.classifiers import Classifier, LabelClassifier
from ifguide.toxicity.prompts import PromptRow

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class QuerySets:
    """The chosen rows, ascending by row, and the score of each continuation in the primary class.

    Every row of the table is in one count: toxic_found + nontoxic_found + undecided + unusable.
    """

    toxic: list[PromptRow]
    nontoxic: list[PromptRow]
    toxic_scores: list[float]
    nontoxic_scores: list[float]
    toxic_found: int
    nontoxic_found: int
    undecided: int
    unusable: int


def _continuation_scores(rows: Sequence[PromptRow], classifier: Classifier) -> list[float]:
    """Primary-class score of each continuation; NaN where the text is empty or its label is missing."""
    primary = classifier.classes[0]
    usable = [bool(row.continuation.strip()) for row in rows]
    if isinstance(classifier, LabelClassifier):
        # Labels stay float64: 0.9 as float32 would fall below a threshold of 0.9.
        found = (row.continuation_scores.get(primary, math.nan) for row in rows)
        return [score if ok else math.nan for score, ok in zip(found, usable, strict=True)]
    texts = [row.continuation for row, ok in zip(rows, usable, strict=True) if ok]
    scored = iter(classifier.score(texts)[primary].tolist())
    return [next(scored) if ok else math.nan for ok in usable]


def _choose(found: list[int], rows: Sequence[PromptRow], maximum: int, seed: int) -> list[int]:
    """At most `maximum` of the indices `found`, ascending by row. A larger maximum adds rows, removes none."""

    def draw(index: int) -> bytes:
        # A hash per row, not a generator's stream: the same choice in every version of every library.
        return hashlib.sha256(f"{seed}:{rows[index].row}".encode()).digest()

    return sorted(sorted(found, key=draw)[:maximum], key=lambda index: rows[index].row)


def select_queries(
    rows: Sequence[PromptRow],
    classifier: Classifier,
    *,
    positive_threshold: float,
    negative_threshold: float,
    max_positive: int,
    max_negative: int,
    seed: int,
) -> QuerySets:
    """Split rows by the score of the continuation: toxic if >= one threshold, non-toxic if <= the other.

    Of each set at most `max_positive` / `max_negative` are drawn, by `seed`. Rows whose continuation is empty,
    or has no label for `labels`, are `unusable`. Raises ValueError where a set would be empty.
    """
    if negative_threshold >= positive_threshold:
        raise ValueError(
            f"build_query.negative_threshold ({negative_threshold}) must be below "
            f"build_query.positive_threshold ({positive_threshold}), or a row could be in both sets"
        )
    for key, maximum in (("max_positive", max_positive), ("max_negative", max_negative)):
        if maximum < 1:
            raise ValueError(f"build_query.{key} must be at least 1, got {maximum}")
    scores = _continuation_scores(rows, classifier)
    unusable = [row.row for row, score in zip(rows, scores, strict=True) if math.isnan(score)]
    if unusable:
        logger.warning("%d prompt rows have no scored continuation (first: %s)", len(unusable), unusable[:5])
    if len(unusable) == len(rows):
        raise ValueError(f"none of {len(rows)} prompt rows has a continuation that {classifier.name} can score")
    toxic = [index for index, score in enumerate(scores) if score >= positive_threshold]
    nontoxic = [index for index, score in enumerate(scores) if score <= negative_threshold]
    if not toxic:
        raise ValueError(
            f"no continuation scores {positive_threshold} or more, the highest of {len(rows)} is "
            f"{np.nanmax(scores):.6g} by {classifier.name}: lower build_query.positive_threshold"
        )
    if not nontoxic:
        raise ValueError(
            f"no continuation scores {negative_threshold} or less, the lowest of {len(rows)} is "
            f"{np.nanmin(scores):.6g} by {classifier.name}: raise build_query.negative_threshold"
        )
    chosen_toxic = _choose(toxic, rows, max_positive, seed)
    chosen_nontoxic = _choose(nontoxic, rows, max_negative, seed)
    return QuerySets(
        toxic=[rows[index] for index in chosen_toxic],
        nontoxic=[rows[index] for index in chosen_nontoxic],
        toxic_scores=[scores[index] for index in chosen_toxic],
        nontoxic_scores=[scores[index] for index in chosen_nontoxic],
        toxic_found=len(toxic),
        nontoxic_found=len(nontoxic),
        undecided=len(rows) - len(unusable) - len(toxic) - len(nontoxic),
        unusable=len(unusable),
    )
