"""The `analyse` section of the config: logit lens, linear probes and adversarial suffixes of trained models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from ifguide.config.resources import RESOURCES, Resources, moved
from ifguide.config.sources import LabelledTexts
from ifguide.config.typed_yaml import option


@dataclass(frozen=True, kw_only=True)
class Gcg:
    """The budget of adversarial suffixes: `targets` toxic completions of the query, cut at `target_tokens`."""

    targets: int = option(8, at_least=1)
    target_tokens: int = option(8, at_least=1)
    suffix_tokens: int = option(16, at_least=1)
    steps: int = option(100, at_least=1)
    candidates: int = option(128, at_least=1)
    top_k: int = option(64, at_least=1)


@dataclass(frozen=True, kw_only=True)
class Analyse:
    """What `analyse` looks at in the models that `evaluate` compares.

    The lens takes the first `max_prompts` of `evaluate.prompts` and the first tokens of `evaluate.word_list`, or the
    `lens_tokens` most over-represented in the query's toxic completions. Probes take `texts`, or the completions of the
    query's two sets, at most `max_texts`, as many of one kind as of the other, in `folds`."""

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
