"""Which prompts are sampled from for preference methods, and how: those of `build_query`, as `evaluate` samples.

A prompt that is evaluated too teaches nothing.
"""

from __future__ import annotations

from dataclasses import replace

from ifguide.config import Config, ConfigError
from ifguide.config.methods import classifier_of
from ifguide.evaluation.prompts import chosen_prompts, chosen_sets
from ifguide.toxicity import PromptRow


def sampling_config(config: Config, run_dir: str) -> Config:
    """That of an evaluation in `run_dir` which samples training prompts, scores them, and measures nothing else; with
    other random numbers than the run's own."""
    options = replace(
        config.evaluate,
        prompts=config.build_query.prompts,
        continuations=config.compare.samples.continuations,
        max_prompts=config.compare.samples.max_prompts,
        balanced=False,
        prompt_sets={},
        classifier=classifier_of(config),
        classifiers={},
        heldout=(),
        annotated=(),
        cloze=None,
        lm_eval=(),
        models={},
        report="ratings",
    )
    return replace(config, run_dir=run_dir, seed=config.seed + 1, evaluate=options)


def drawn_prompts(config: Config) -> tuple[list[PromptRow], tuple[PromptRow, ...]]:
    """The prompts of `build_query` that are sampled from, and those of them that are in no evaluated set and may be
    learnt from, both in the order of their rows.

    Raises:
        ConfigError: all of them are evaluated. FileNotFoundError, ValueError: a table cannot be read.
    """
    sampling = sampling_config(config, config.run_dir)
    drawn = chosen_prompts(sampling.evaluate, sampling.seed)
    evaluated = {prompt.prompt for prompts in chosen_sets(config.evaluate, config.seed).values() for prompt in prompts}
    kept = tuple(prompt for prompt in drawn if prompt.prompt not in evaluated)
    if not kept:
        raise ConfigError("build_query.prompts: all of them are evaluated too; DPO and RAD need others to learn from")
    return drawn, kept
