"""The proxy model: loaded as factors, query and scores see it, and described to a driver by a few numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from ifguide.config import ModelSource
from ifguide.models import linearise, load_model, state_fingerprint, tracked_modules
from ifguide.shapes import require_positions
from ifguide.tokenizer import beginning_token


@dataclass(frozen=True, kw_only=True)
class ProxyFacts:
    """What a driver needs of the proxy. `fingerprint` is of its parameters, `untracked` the (name, parameters) of the
    blocks' modules that influence is not traced through, largest first, `coverage` the tracked share."""

    name: str
    fingerprint: str
    module_names: tuple[str, ...]
    untracked: tuple[tuple[str, int], ...]
    coverage: float
    vocab_size: int
    parameters: int

    def __str__(self) -> str:
        text = (
            f"proxy {self.name}: {self.parameters:,} parameters, {len(self.module_names)} tracked modules,"
            f" {self.coverage:.2%} of the blocks' parameters"
        )
        return text + (f"; untracked, largest first: {self.untracked[:3]}" if self.untracked else "")


def proxy_name(source: ModelSource) -> str:
    """What lines and errors call the proxy."""
    return source.source or "from architecture"


def beginning_note(tokenizer: Any, name: str) -> str | None:
    """What to know of a proxy that was trained with a BOS before each text, as its tokenizer puts one there."""
    if beginning_token(tokenizer) is None:
        return None
    return (
        f"the tokenizer of {name} puts a BOS before each text; factors and scores are of the corpus' blocks, which"
        " begin within texts and have none"
    )


def load_proxy(source: ModelSource, *, gpus: float) -> PreTrainedModel:
    """The proxy in fp32 on this worker's device, linearised: what factors, query, scores and its fingerprint are of."""
    return linearise(load_model(source, device="cuda" if gpus else "cpu"))


def describe_proxy(source: ModelSource, block_size: int, min_coverage: float) -> ProxyFacts:
    """Load the proxy, on the CPU, and describe it.

    Raises:
        FileNotFoundError: there is no such model. ValueError: less than `min_coverage` of it can be tracked, or it has
            fewer positions than a block has tokens.
    """
    model = load_proxy(source, gpus=0)
    require_positions(source.source or "the proxy", model.config.to_dict(), block_size)
    tracked = tracked_modules(model, min_coverage=min_coverage)
    return ProxyFacts(
        name=proxy_name(source),
        fingerprint=state_fingerprint(model),
        module_names=tracked.names,
        untracked=tracked.untracked,
        coverage=tracked.coverage,
        vocab_size=model.config.get_text_config().vocab_size,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
    )
