"""The `build_query` section."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from ifguide.config.resources import RESOURCES, Resources, moved
from ifguide.config.sources import (
    ClassifierSource,
    Completions,
    Pairs,
    Prompts,
    check_classifier,
    check_queries,
)
from ifguide.config.typed_yaml import ConfigError, option


@dataclass(frozen=True, kw_only=True)
class BuildQuery:
    """The direction V = (EK-FAC + damping)^-1 [mean positive - mean negative completion gradient].

    Attributes:
        prompts: prompts with completions, which `classifier` parts into two sets.
        pairs: in place of `prompts`: rows with a completion of either set.
        positive: in place of `prompts`: the queries that show the behaviour.
        negative: those that do not.
        classifier: scores the completions of `prompts`.
        positive_threshold: a completion with at least this score shows the behaviour.
        negative_threshold: a completion with at most this score does not.
        max_positive: positive queries at most.
        max_negative: negative queries at most.
        weigh: `equally`; by `confidence`, a query counts in the mean of its set by how far its score is from where the
            other set begins, or by the margin of its pair (`pairs.margin_column`).
        held_out: queries of each set that V is not made of; the manifest says how well scores tell them apart.
        differential: subtract the negative mean. False is plain influence, which also finds what is merely common.
        max_tokens: of prompt and completion together, and at most the proxy's positions; longer queries are cut.
        batch_tokens: tokens of one backward pass.
        partitions: tasks that share the queries.
        factors: folder of factors that kronfluence fitted elsewhere. Null: the run's own.
        damping: absolute damping. Null: `damping_scale` times the mean eigenvalue of each module.
        damping_scale: see `damping`; 0.1 is kronfluence's own choice.
        nulls: null directions, of halves of the queries, that tokens are scored along too, for `build_mask.standardise`
            and `fdr`. Each costs most of a further behaviour's scores.
        refine_steps: conjugate gradient steps on the Gauss-Newton product, from EK-FAC's V. 0: V is EK-FAC's.
        refine_blocks: corpus blocks of that product, drawn by seed. Null: those that the factors were fitted on.
        reliability_queries: queries of each set, at most, whose halves are compared: 2 or more, or 0 for none.
        resources: of one task.
    """

    prompts: Prompts | None = None
    pairs: Pairs | None = option(None, off=None)  # noqa: RUF009
    positive: Completions | None = option(None, off=None)  # noqa: RUF009
    negative: Completions | None = option(None, off=None)  # noqa: RUF009
    classifier: ClassifierSource = ClassifierSource()  # noqa: RUF009  # frozen
    positive_threshold: float = option(0.5, at_least=0, at_most=1)
    negative_threshold: float = option(0.1, at_least=0, at_most=1)
    max_positive: int = option(10_000, at_least=1)
    max_negative: int = option(10_000, at_least=1)
    weigh: Literal["equally", "confidence"] = option("equally", off="equally")
    held_out: int = option(0, at_least=0, off=0)
    differential: bool = True
    max_tokens: int = option(512, at_least=2)
    batch_tokens: int = option(4096, at_least=1)
    partitions: int = option(1, at_least=1)
    factors: str | None = option(None, affects_result=False)  # their digest is among the artifact's inputs
    damping: float | None = option(None, at_least=0)
    damping_scale: float = option(0.1, at_least=0)
    nulls: int = option(0, at_least=0, off=0)
    refine_steps: int = option(0, at_least=0, off=0)
    refine_blocks: int | None = option(None, at_least=1, off=None)
    reliability_queries: int = option(256, at_least=0, affects_result=False)  # a figure in the manifest alone
    resources: Resources = RESOURCES

    RENAMED: ClassVar[dict[str, str]] = moved("task") | {
        "toxic_threshold": "positive_threshold",
        "nontoxic_threshold": "negative_threshold",
        "max_toxic": "max_positive",
        "max_nontoxic": "max_negative",
    }


def check_build_query(config: BuildQuery) -> None:
    """Raises ConfigError where options exclude each other."""
    if config.negative_threshold >= config.positive_threshold:
        raise ConfigError(
            f"build_query.negative_threshold: {config.negative_threshold} is not below"
            f" build_query.positive_threshold = {config.positive_threshold}: a query would be in both sets"
        )
    check_classifier(config.classifier, "build_query.classifier")
    check_queries(config.prompts, config.pairs, config.positive, config.negative)
    if config.positive is not None and config.negative is None and config.differential:
        raise ConfigError(
            "build_query.negative: required beside build_query.positive, and not set; or set build_query.differential"
            " to false: V is then of the positive set alone"
        )
    if config.positive is not None and config.positive == config.negative:
        raise ConfigError(f"build_query.negative: {config.negative.path} is build_query.positive, too: V would be 0")
    margin = config.pairs is not None and config.pairs.margin_column is not None
    if config.weigh == "confidence" and config.prompts is None and not margin:
        raise ConfigError(
            "build_query.weigh: confidence wants scores, and tables of either set have none; name pairs.margin_column,"
            " or prompts with a classifier, or weigh equally"
        )
    if margin and config.weigh == "equally":
        raise ConfigError("build_query.pairs.margin_column: weighs by confidence; set build_query.weigh to confidence")
    if config.reliability_queries == 1:
        raise ConfigError(
            "build_query.reliability_queries: 1 query has no halves to compare; set 2 or more, or 0 for no reliability"
        )
    if config.refine_steps and config.nulls:
        raise ConfigError(
            f"build_query.refine_steps: {config.refine_steps} beside build_query.nulls = {config.nulls}; nulls are of"
            " the direction before it is refined, and say nothing of scores along the refined one; set one to 0"
        )
