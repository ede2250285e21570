"""The `score_corpus` section."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from ifguide.config.resources import RESOURCES, Resources, moved
from ifguide.config.typed_yaml import option


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
        micro_batch_blocks: blocks scored at once. Null: as many as fit, by an estimate of memory.
        check_blocks: blocks that are scored by the exact method as well, before the first shard. 0: no check.
        min_agreement: correlation and agreement of the top 1% in that check must both reach this.
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
    micro_batch_blocks: int | None = option(None, at_least=1)
    check_blocks: int = option(4, at_least=0)
    min_agreement: float = option(0.9, at_least=0, at_most=1)
    min_actors: int = option(1, at_least=1, affects_result=False)
    max_actors: int = option(1, at_least=1, affects_result=False)
    resources: Resources = RESOURCES

    RENAMED: ClassVar[dict[str, str]] = moved("actor")
