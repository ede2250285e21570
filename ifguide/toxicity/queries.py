"""The two query sets that say what behaviour to find.

IF-Guide (arXiv 2506.01790) describes a behaviour by two sets of queries (prompt, completion): the direction V is the
mean gradient over the positive set, which shows the behaviour, minus the mean over the negative set, which does not. A
classifier scores the continuations of a prompt table; at or above one threshold a row is a positive query, at or below
the other a negative one, and of each at most a set number is taken. Rows between the thresholds are in neither set.
Where no classifier knows the behaviour, the sets come as tables: one for each, or pairs of completions.

It does not tokenise, and it does not judge the classifier: its errors are the query sets' errors.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from ifguide.config import BuildQuery
from ifguide.toxicity.classifiers import Classifier, LabelClassifier, make_classifier
from ifguide.toxicity.prompts import PromptRow, read_completions, read_pairs, read_prompt_rows

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class QuerySets:
    """The chosen rows, ascending by row, the score of each continuation in the primary class, and its weight in the
    mean of its set. `paired`: rows of one number in both sets are the completions of a pair.

    Every row of the table is in one count: positive_rows + negative_rows + undecided + unusable.
    """

    positive: list[PromptRow]
    negative: list[PromptRow]
    positive_scores: list[float]
    negative_scores: list[float]
    positive_weights: list[float]
    negative_weights: list[float]
    positive_rows: int
    negative_rows: int
    undecided: int
    unusable: int
    paired: bool = False

    def hold_out(self, count: int, seed: int, *, differential: bool = True) -> tuple[QuerySets, QuerySets]:
        """All but `count` queries of each set, and those: the last in the order of the draw, so that where there are
        rows enough V has the same queries whether some are held out or not. V has no completion of a pair whose other
        one is held out, as it may be where the maxima of the sets differ. Without `differential` V is made of positive
        queries alone: all negative ones may then be held out.

        Raises:
            ValueError: a set that V is made of would be left empty.
        """
        used: list[list[int]] = []
        held_out: list[list[int]] = []
        for name, rows in (("positive", self.positive), ("negative", self.negative)):
            if 0 < len(rows) <= count and (name == "positive" or differential):
                raise ValueError(f"build_query.held_out: {count} of {len(rows)} {name} queries leave none; take fewer")
            draws = [_draw(row, seed) for row in rows]
            order = sorted(range(len(rows)), key=draws.__getitem__)
            last = len(order) - min(count, len(order))
            used.append(sorted(order[:last]))
            held_out.append(sorted(order[last:]))
        if self.paired:
            held_pairs = {rows[i].row for rows, own in zip(self._rows, held_out, strict=True) for i in own}
            used = [
                [i for i in own if rows[i].row not in held_pairs] for rows, own in zip(self._rows, used, strict=True)
            ]
            if not all(used if differential else used[:1]):
                raise ValueError(f"build_query.held_out: {count} pairs leave a set without queries; take fewer")
        return self._part(*used), self._part(*held_out)

    @property
    def _rows(self) -> tuple[list[PromptRow], list[PromptRow]]:
        return self.positive, self.negative

    def _part(self, positive: Sequence[int], negative: Sequence[int]) -> QuerySets:
        return replace(
            self,
            positive=[self.positive[i] for i in positive],
            negative=[self.negative[i] for i in negative],
            positive_scores=[self.positive_scores[i] for i in positive],
            negative_scores=[self.negative_scores[i] for i in negative],
            positive_weights=[self.positive_weights[i] for i in positive],
            negative_weights=[self.negative_weights[i] for i in negative],
        )


def _continuation_scores(rows: Sequence[PromptRow], classifier: Classifier) -> list[float]:
    """Primary-class score of each continuation; NaN where the text is empty or its label is missing."""
    primary = classifier.classes[0]
    usable = [bool(row.continuation.strip()) for row in rows]
    if isinstance(classifier, LabelClassifier):
        # Labels stay float64: 0.9 as float32 would fall below a threshold of 0.9.
        labels = (row.continuation_scores.get(primary, math.nan) for row in rows)
        return [score if ok else math.nan for score, ok in zip(labels, usable, strict=True)]
    texts = [row.continuation for row, ok in zip(rows, usable, strict=True) if ok]
    scored = iter(classifier.score(texts)[primary].tolist())
    return [next(scored) if ok else math.nan for ok in usable]


def _choose(indices: list[int], rows: Sequence[PromptRow], maximum: int, seed: int) -> list[int]:
    """At most `maximum` of the `indices` of rows, ascending by row. A larger maximum adds rows, removes none."""

    drawn = sorted(indices, key=lambda index: _draw(rows[index], seed))[:maximum]
    return sorted(drawn, key=lambda index: rows[index].row)


def _draw(row: PromptRow, seed: int) -> bytes:
    # A hash per row, not a generator's stream: the same choice in every version of every library.
    return hashlib.sha256(f"{seed}:{row.row}".encode()).digest()


def choose_queries(options: BuildQuery, seed: int) -> QuerySets:
    """The query sets that the config names: of prompts, by the classifier, as `select_queries`; or of plain tables.
    Of each set there are `held_out` more than the maximum, where there are as many rows."""
    if options.prompts is None:
        return _given_queries(options, seed)
    rows = read_prompt_rows(options.prompts, "build_query.prompts")
    return select_queries(
        rows,
        make_classifier(options.classifier, gpus=options.resources.gpus, dotted_key="build_query.classifier"),
        positive_threshold=options.positive_threshold,
        negative_threshold=options.negative_threshold,
        max_positive=options.max_positive + options.held_out,
        max_negative=options.max_negative + options.held_out,
        seed=seed,
        weigh=options.weigh,
        differential=options.differential,
    )


def _given_queries(options: BuildQuery, seed: int) -> QuerySets:
    """The sets of tables that are of one set each, or of pairs. Rows with an empty completion, and pairs with
    margin 0, are `unusable`."""
    if options.pairs is not None:
        tables = dict(zip(("positive", "negative"), read_pairs(options.pairs, "build_query.pairs"), strict=True))
    else:
        given = {"positive": options.positive, "negative": options.negative}
        tables = {
            name: [] if source is None else read_completions(source, f"build_query.{name}")
            for name, source in given.items()
        }
    usable = {
        name: [i for i, row in enumerate(rows) if row.continuation.strip() and row.margin > 0]
        for name, rows in tables.items()
    }
    unusable = sum(len(rows) - len(usable[name]) for name, rows in tables.items())
    if unusable:
        logger.warning("%d completions are empty, or of a pair with margin 0, and no queries", unusable)
    for name, rows in usable.items():
        if not rows and (name == "positive" or options.differential):
            raise ValueError(f"build_query.{name}: no table gives a completion for this set, of a margin above 0")
    chosen = {
        name: [tables[name][i] for i in _choose(usable[name], tables[name], maximum + options.held_out, seed)]
        for name, maximum in (("positive", options.max_positive), ("negative", options.max_negative))
    }
    return QuerySets(
        positive=chosen["positive"],
        negative=chosen["negative"],
        positive_scores=[1.0] * len(chosen["positive"]),
        negative_scores=[0.0] * len(chosen["negative"]),
        positive_weights=[row.margin for row in chosen["positive"]],
        negative_weights=[row.margin for row in chosen["negative"]],
        positive_rows=len(usable["positive"]),
        negative_rows=len(usable["negative"]),
        undecided=0,
        unusable=unusable,
        paired=options.pairs is not None,
    )


def select_queries(
    rows: Sequence[PromptRow],
    classifier: Classifier,
    *,
    positive_threshold: float,
    negative_threshold: float,
    max_positive: int,
    max_negative: int,
    seed: int,
    weigh: Literal["equally", "confidence"] = "equally",
    differential: bool = True,
) -> QuerySets:
    """Split rows by the score of the continuation: positive if >= one threshold, negative if <= the other. A weight is
    1, or how far the score is from the threshold of the other set.

    Of each set at most `max_positive` / `max_negative` are drawn, by `seed`. Rows whose continuation is empty,
    or has no label for `labels`, are `unusable`. Raises ValueError where a set would be empty that V is made of:
    without `differential` it needs no negative one.
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
    positive = [index for index, score in enumerate(scores) if score >= positive_threshold]
    negative = [index for index, score in enumerate(scores) if score <= negative_threshold]
    if not positive:
        raise ValueError(
            f"no continuation scores {positive_threshold} or more, the highest of {len(rows)} is "
            f"{np.nanmax(scores):.6g} by {classifier.name}: lower build_query.positive_threshold"
        )
    if not negative and differential:
        raise ValueError(
            f"no continuation scores {negative_threshold} or less, the lowest of {len(rows)} is "
            f"{np.nanmin(scores):.6g} by {classifier.name}: raise build_query.negative_threshold"
        )
    by_score = weigh == "confidence"
    chosen_positive = _choose(positive, rows, max_positive, seed)
    chosen_negative = _choose(negative, rows, max_negative, seed)
    return QuerySets(
        positive=[rows[index] for index in chosen_positive],
        negative=[rows[index] for index in chosen_negative],
        positive_scores=[scores[index] for index in chosen_positive],
        negative_scores=[scores[index] for index in chosen_negative],
        positive_weights=[scores[i] - negative_threshold if by_score else 1.0 for i in chosen_positive],
        negative_weights=[positive_threshold - scores[i] if by_score else 1.0 for i in chosen_negative],
        positive_rows=len(positive),
        negative_rows=len(negative),
        undecided=len(rows) - len(unusable) - len(positive) - len(negative),
        unusable=len(unusable),
    )
