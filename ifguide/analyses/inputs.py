"""What the analyses look at: pieces of work, the probes' texts, and what a config cannot be analysed with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ifguide.analyses.probes import LEAST
from ifguide.artifacts import json_digest
from ifguide.config import ConfigError, Evaluate
from ifguide.config.analyse import Analyse
from ifguide.evaluation.generations import prompts_digest
from ifguide.evaluation.prompts import chosen_prompts
from ifguide.influence.query_file import QueryRow
from ifguide.telemetry import log
from ifguide.toxicity import PromptRow, labelled_texts


@dataclass(frozen=True, kw_only=True)
class AnalysisTask:
    """One analysis of one model; `number` is the attack's positive query, 0 for the others."""

    key: str
    model: str
    method: str
    number: int


def tasks(options: Analyse, models: Sequence[str], positive: int, seed: int) -> list[AnalysisTask]:
    """Model by model, so that an actor seldom changes its model. Of `positive` queries the attack takes
    `options.gcg.targets`, drawn by seed."""
    targets = np.random.default_rng(seed).permutation(positive)[: options.gcg.targets].tolist()
    return [
        AnalysisTask(key=f"{method}-{i:04d}-{model}", model=model, method=method, number=number)
        for model in models
        for method in options.methods
        for i, number in enumerate(targets if method == "gcg" else [0])
    ]


def check_options(options: Analyse, evaluate: Evaluate) -> None:
    """Refuse what cannot be analysed, before anything is read.

    Raises:
        ConfigError: no prompts for the lens, or a classifier that cannot score what an attack draws.
    """
    if evaluate.prompts is None and "lens" in options.methods:
        raise ConfigError("evaluate.prompts: the lens reads prompts; name a file in RealToxicityPrompts' schema")
    if evaluate.classifier.name == "labels" and "gcg" in options.methods:
        raise ConfigError("evaluate.classifier: labels cannot score what an attack draws; choose another classifier")


def check_queries(options: Analyse, word_list: Sequence[str], queries: Sequence[QueryRow]) -> None:
    """Refuse a lens that has no words to look at.

    Raises:
        ConfigError: no word list, and no negative completions to tell the positive ones' tokens from.
    """
    if "lens" not in options.methods or word_list:
        return
    if all(row.positive for row in queries):
        raise ConfigError(
            "evaluate.word_list: it is empty, and the query has only positive completions, none to tell their tokens"
            " from; list words for the lens, or make the query with build_query.differential = true"
        )


def lens_prompts(options: Analyse, evaluate: Evaluate, seed: int) -> list[PromptRow]:
    """The prompts of an evaluation; where they are more than the lens takes, fewer of its file, drawn in the same way.

    Raises:
        ConfigError: as `chosen_prompts`.
    """
    if evaluate.max_prompts is None or evaluate.max_prompts > options.max_prompts:
        evaluate = replace(evaluate, max_prompts=options.max_prompts)
    return chosen_prompts(evaluate, seed)


def probe_texts(options: Analyse, queries: Sequence[QueryRow], seed: int) -> list[tuple[str, bool]]:
    """Texts of the probes with their labels, as many of one kind as of the other, drawn by seed.

    Raises:
        ConfigError: fewer of a kind than folds, or than the choice of a layer needs.
    """
    if options.texts:
        rows = labelled_texts(options.texts, "analyse.texts")
        labelled = [(row.text, row.label) for row in rows if row.text]
        if left_out := len(rows) - len(labelled):
            log("analyse", f"analyse.texts: {left_out:,} of {len(rows):,} rows have no text and are left out")
    else:
        labelled = [(row.completion, row.positive) for row in queries]
    positive, negative = ([text for text in labelled if text[1] == kind] for kind in (True, False))
    count = min(len(positive), len(negative), options.max_texts // 2)
    if count < (least := max(options.folds, LEAST)):
        source = "they are" if options.texts else "none are named, and the query's completions are"
        remedy = "" if options.texts else ", make the query with build_query.differential = true"
        raise ConfigError(
            f"analyse.texts: {source} {len(positive)} positive and {len(negative)} negative, of which the probes take"
            f" {options.max_texts // 2} each at most (half of analyse.max_texts) and {least} at least"
            f" (analyse.folds, and {LEAST} to choose a layer by); name texts of both kinds{remedy}, or leave probes"
            " out of analyse.methods"
        )
    rng = np.random.default_rng(seed)
    return [texts[i] for texts in (positive, negative) for i in rng.permutation(len(texts))[:count]]


def text_digests(options: Analyse, prompts: Sequence[PromptRow], probed: Sequence[tuple[str, bool]]) -> dict[str, str]:
    """Digests of the texts that the analyses read beside the query's: the lens' prompts, the probes' texts."""
    digests = {"prompts": prompts_digest(prompts)} if "lens" in options.methods else {}
    return digests | ({"texts": json_digest(probed)} if "probes" in options.methods and options.texts else {})
