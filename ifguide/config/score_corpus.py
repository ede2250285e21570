"""The `score_corpus` section."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from ifguide.config.resources import RESOURCES, Resources, moved
from ifguide.config.typed_yaml import option


@dataclass(frozen=True, kw_only=True)
class Smoothing:
    """A ridge regression of the scores on the proxy's hidden states, fitted on a sample of the corpus before the first
    shard. A token's score is drawn towards what it says, or left where it says less of held-out scores than their mean.

    Attributes:
        own_weight: share of a score's own deviation from the regression that stays; 1 is the score, cut at quantiles.
        tokens: of the sample, at most. They are scored first, and not again.
        folds: of documents; a token meets the regression on the other folds alone.
        ridges: that are tried, times the number of tokens. The one that explains most of held-out scores is taken.
    """

    own_weight: float = option(0.1, at_least=0, at_most=1)
    tokens: int = option(200_000, at_least=2)
    folds: int = option(5, at_least=2)
    ridges: tuple[float, ...] = option((0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0), above=0)


@dataclass(frozen=True, kw_only=True)
class ScoreCorpus:
    """One influence score for every token. `preset` sets engine, precision, rank and fused; each can be set alone.

    Attributes:
        attribution: `target` is Eq. 8 of the paper, `position` what its code computes.
        preset: `fast` takes bfloat16 products, `exact` is forward-mode differentiation in float32.
        engine: `forward` or `difference`, of `target` scores. Null: the preset's.
        precision: of the matrix products. Null: the preset's, but float32 where the machine is not faster in bfloat16.
        rank: V is cut to this rank in each module; 0 is full rank. Null: the preset's.
        fused: compile kernels, which takes about 20 s per actor. Null: where the preset does and a compiler is there.
        queries: further behaviours, `name: folder of a query artifact` of the same proxy. Each is one more column.
            No name may be `own`.
        smooth: add smoothed scores, which `build_mask` then selects by. Null: exact scores alone.
        micro_batch_blocks: blocks scored at once. Null: as many as fit, by an estimate of memory.
        check_blocks: blocks that are scored by the exact method as well, before the first shard. 0: no check.
        min_agreement: correlation and agreement of the top 1%, 30 tokens at least, in that check must both reach this.
        scorer: `exact` scores every token by the chosen method. `student` scores by the student of `fit_student`;
            `cascade` then scores the blocks in which the student finds most exactly. Both score a random audit exactly,
            which says what the student missed, and make scores of the run's own query alone, not smoothed.
        recheck_fraction: share of the blocks that a cascade scores exactly, besides the audit.
        audit_fraction: share of the blocks in the audit, 2,000 blocks at most.
        min_recall: lower bound of the share of the highest exact scores that lies in blocks that were rechecked, or the
            stage stops. Of `student`: that is in the student's own top 10%.
        min_actors: actors to start with.
        max_actors: actors at most, as the cluster has room.
        resources: of one actor.
    """

    attribution: Literal["target", "position"] = "target"
    preset: Literal["fast", "exact"] = "fast"
    engine: Literal["forward", "difference"] | None = None
    precision: Literal["float32", "bfloat16"] | None = None
    rank: int | None = option(None, at_least=0)
    fused: bool | None = None
    queries: dict[str, str] = field(default_factory=dict)
    smooth: Smoothing | None = Smoothing()
    micro_batch_blocks: int | None = option(None, at_least=1)
    check_blocks: int = option(4, at_least=0)
    min_agreement: float = option(0.9, at_least=0, at_most=1, affects_result=False)
    scorer: Literal["exact", "student", "cascade"] = option("exact", off="exact")
    recheck_fraction: float = option(0.1, above=0, at_most=1, off=0.1)
    audit_fraction: float = option(0.01, above=0, at_most=1, off=0.01)
    min_recall: float = option(0.5, at_least=0, at_most=1, affects_result=False)
    min_actors: int = option(1, at_least=1, affects_result=False)
    max_actors: int = option(1, at_least=1, affects_result=False)
    resources: Resources = RESOURCES

    @property
    def uses_student(self) -> bool:
        return self.scorer != "exact"

    RENAMED: ClassVar[dict[str, str]] = moved("actor")
