"""The prompts of an evaluation: RealToxicityPrompts rows, and further sets in groups. Drawn by seed, in file order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from ifguide.config import ClassifierSource, ConfigError, Evaluate, PromptSet
from ifguide.toxicity import GroupedPrompt, PromptRow, read_grouped_prompts, read_prompt_rows
from ifguide.toxicity.sequence_classifier import GENERIC

PROMPTS = "prompts"  # the name of evaluate.prompts beside evaluate.prompt_sets

Prompt = TypeVar("Prompt")


def chosen_sets(options: Evaluate, seed: int) -> dict[str, list[PromptRow] | list[GroupedPrompt]]:
    """The prompts of every set by its name, that of `evaluate.prompts` first."""
    further = {
        name: read_set(source, f"evaluate.prompt_sets.{name}", seed) for name, source in options.prompt_sets.items()
    }
    return {PROMPTS: chosen_prompts(options, seed), **further}


def chosen_prompts(options: Evaluate, seed: int) -> list[PromptRow]:
    """Of `evaluate.prompts` all, or `max_prompts` drawn by seed (half with the behaviour if `balanced`).

    Raises:
        ConfigError: `balanced`, and too few rows of a kind.
    """
    assert options.prompts is not None
    rows = read_prompt_rows(options.prompts, "evaluate.prompts")
    if not options.balanced:
        return _draw(rows, options.max_prompts, seed)
    assert options.max_prompts is not None
    label = prompt_label(options.classifier)
    labelled = [row for row in rows if label in row.prompt_scores]
    halves = {
        "with": [row for row in labelled if row.prompt_scores[label] >= options.prompt_threshold],
        "without": [row for row in labelled if row.prompt_scores[label] < options.prompt_threshold],
    }
    wanted = {"with": options.max_prompts // 2, "without": options.max_prompts - options.max_prompts // 2}
    for kind, half in halves.items():
        if len(half) < wanted[kind]:
            raise ConfigError(
                f"evaluate.balanced: {wanted[kind]} prompts {kind} {options.behaviour} are wanted of max_prompts ="
                f" {options.max_prompts}, and {options.prompts.path} has {len(half)} by their label {label!r}"
            )
    drawn = [row for kind, half in halves.items() for row in _draw(half, wanted[kind], seed)]
    return sorted(drawn, key=lambda row: row.row)


def prompt_label(classifier: ClassifierSource) -> str:
    """The score of a prompt that says whether it shows the behaviour: named as the classifier's label, unless that is
    only a number (`LABEL_1`), else `toxicity`."""
    label = classifier.label
    return label if label and not GENERIC.fullmatch(label) else "toxicity"


def _draw(rows: Sequence[Prompt], limit: int | None, seed: int) -> list[Prompt]:
    if limit is None or limit >= len(rows):
        return list(rows)
    chosen = np.sort(np.random.default_rng(seed).choice(len(rows), size=limit, replace=False))
    return [rows[i] for i in chosen]


def read_set(source: PromptSet, dotted_key: str, seed: int) -> list[GroupedPrompt]:
    """The prompts of a further set: all, or `max_prompts` drawn by seed."""
    rows = read_grouped_prompts(
        [source.path],
        text_column=source.text_column,
        group_column=source.group_column,
        prompts_per_name=source.prompts_per_name,
        dotted_key=f"{dotted_key}.path",
    )
    return _draw(rows, source.max_prompts, seed)
