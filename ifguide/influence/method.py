"""How scores are computed: the presets, and what a config makes of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from ifguide.config import ConfigError, ScoreCorpus

Attribution = Literal["target", "position"]
EngineName = Literal["forward", "difference"]
Precision = Literal["float32", "bfloat16"]


@dataclass(frozen=True, kw_only=True)
class Method:
    """How scores are computed. `rank` None is full rank. `engine` is of `target`; `position` has one only.
    `precision` is of the matrix products: sums, norms, softmax and the streams between are float32.
    `fused`: compile the element-wise work of `difference` in bfloat16, where `fused.can_fuse`."""

    engine: EngineName
    precision: Precision
    rank: int | None
    fused: bool = False


PRESETS = {
    "exact": Method(engine="forward", precision="float32", rank=None),
    # Full rank: at rank 64 a V of 30M random weights kept .67 of its energy, and .88 of the top 1% (bench/LOG.md).
    "fast": Method(engine="difference", precision="bfloat16", rank=None, fused=True),
}


def chosen_method(config: ScoreCorpus) -> Method:
    """The preset with what is set alone.

    Raises:
        ConfigError: the combination does not exist.
    """
    method = PRESETS[config.preset]
    if config.engine is not None:
        method = replace(method, engine=config.engine)
        if config.engine == "forward" and config.precision is None:  # it has no other
            method = replace(method, precision="float32")
    if config.precision is not None:
        method = replace(method, precision=config.precision)
    if config.rank is not None:
        method = replace(method, rank=config.rank or None)
    if config.fused is not None:
        method = replace(method, fused=config.fused)
    if config.attribution == "position" or method.precision == "float32":  # nothing there is compiled
        method = replace(method, fused=False)
    if config.attribution == "target" and method.engine == "forward" and method.precision != "float32":
        raise ConfigError(
            "score_corpus.precision: engine forward runs in float32; set it, or score_corpus.engine: difference"
        )
    return method
