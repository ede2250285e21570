"""What preference methods learn from: continuations that a model gave to training prompts, with their scores.

They are sampled as `evaluate` samples them, from the prompts of `methods.sampling`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ifguide import schemas
from ifguide.artifacts import verified, verified_files
from ifguide.evaluation.figures import scored_file
from ifguide.evaluation.generation import encode_prompts
from ifguide.evaluation.prompts import PROMPTS
from ifguide.methods.pairs import ScoredPrompt
from ifguide.toxicity import PromptRow


@dataclass(frozen=True, kw_only=True)
class SampleFiles:
    """A model's continuations on disk: their tokens in `generations`, their scores in the report folder `ratings`; and
    the prompts that may be learnt from. `max_new_tokens` is what the sampler was asked for."""

    model: str
    generations: Path
    scores: Path
    prompts: tuple[PromptRow, ...]
    max_new_tokens: int


def read_samples(files: SampleFiles, tokenizer: Any, model: Any) -> tuple[list[ScoredPrompt], int]:
    """The scored training prompts, and how many prompts were sampled but may not be learnt from.

    Raises:
        ValueError: a file has changed since it was made, or a score is not finite; names it.
    """
    tokens: dict[int, list[tuple[int, ...]]] = {}
    values: dict[int, list[float]] = {}
    for number, path in enumerate(verified_files(files.generations)):
        generated = schemas.read_table(path, schemas.GENERATIONS).to_pylist()
        scores = scored_file(files.scores, files.model, PROMPTS, number).relative_to(files.scores)
        scored = schemas.read_table(verified(files.scores, scores.as_posix()), schemas.CONTINUATIONS)
        for row, by_class in zip(generated, scored.column("scores").to_pylist(), strict=True):
            tokens.setdefault(row["prompt_row"], []).append(tuple(row["tokens"]))
            values.setdefault(row["prompt_row"], []).append(score := float(by_class[0][1]))  # of the primary class
            if not math.isfinite(score):
                raise ValueError(f"{files.scores}: a continuation of prompt {row['prompt_row']} scores {score}")
    encoded = encode_prompts(model, tokenizer, [row.prompt for row in files.prompts], files.max_new_tokens)
    prompts = [
        ScoredPrompt(
            row=row.row, prompt=tuple(ids), continuations=tuple(tokens[row.row]), scores=tuple(values[row.row])
        )
        for row, ids in zip(files.prompts, encoded, strict=True)
    ]
    return prompts, len(tokens) - len(prompts)
