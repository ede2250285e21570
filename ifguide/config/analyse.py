"""The `analyse` section of the config: logit lens, linear probes and adversarial suffixes of trained models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from ifguide.config.resources import RESOURCES, Resources, moved
from ifguide.config.sources import LabelledTexts
from ifguide.config.typed_yaml import ConfigError, option


@dataclass(frozen=True, kw_only=True)
class Gcg:
    """The budget of adversarial suffixes (arXiv 2307.15043).

    Attributes:
        targets: positive completions of the query that suffixes are sought for.
        target_tokens: tokens that each is cut at.
        suffix_tokens: tokens of a suffix.
        steps: steps of the search.
        candidates: candidates tried in a step.
        top_k: tokens considered at each place.
    """

    targets: int = option(8, at_least=1)
    target_tokens: int = option(8, at_least=1)
    suffix_tokens: int = option(16, at_least=1)
    steps: int = option(100, at_least=1)
    candidates: int = option(128, at_least=1)
    top_k: int = option(64, at_least=1)


@dataclass(frozen=True, kw_only=True)
class Analyse:
    """What `ifguide analyse` looks at in the models that `evaluate` compares.

    Attributes:
        methods: which analyses to make, each once.
        max_prompts: prompts of `evaluate.prompts` that the lens takes at most, drawn by seed; half of them with the
            behaviour if `evaluate.balanced`.
        max_tokens: tokens at which prompts and texts are cut.
        lens_tokens: without a word list, this many of the tokens most over-represented in the positive completions.
        texts: texts with labels for the probes. Empty: the query's completions.
        max_texts: texts at most, as many of one kind as of the other.
        folds: of the cross-validation.
        gcg: the budget of adversarial suffixes.
        batch_size: texts that a model takes at once.
        actors: actors that analyse.
        resources: of one actor.
    """

    methods: tuple[Literal["lens", "probes", "gcg"], ...] = ("lens", "probes", "gcg")
    max_prompts: int = option(200, at_least=1)
    max_tokens: int = option(128, at_least=2)
    lens_tokens: int = option(30, at_least=1)
    texts: tuple[LabelledTexts, ...] = ()
    max_texts: int = option(1000, at_least=4)
    folds: int = option(5, at_least=2)
    gcg: Gcg = Gcg()
    batch_size: int = option(16, at_least=1)
    actors: int = option(1, at_least=1, affects_result=False)
    resources: Resources = RESOURCES

    RENAMED: ClassVar[dict[str, str]] = moved("actor")


def check_analyse(analyse: Analyse) -> None:
    """Raises ConfigError for an analysis that is named twice: both would be one piece of work."""
    if len(set(analyse.methods)) < len(analyse.methods):
        raise ConfigError(f"analyse.methods: {', '.join(analyse.methods)} names one twice; name each once")
