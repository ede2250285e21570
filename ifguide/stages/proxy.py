"""The proxy model as stages see it: loaded on workers, described to the driver by a few numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ray
from transformers import PreTrainedModel

from ifguide.config import ModelSource, to_mapping
from ifguide.distributed.session import connect
from ifguide.models import linearise, load_model, state_fingerprint, tracked_modules
from ifguide.run import Run
from ifguide.shapes import require_positions
from ifguide.telemetry import log


@dataclass(frozen=True, kw_only=True)
class ProxyFacts:
    """What the driver needs of the proxy; `fingerprint` is of its parameters."""

    fingerprint: str
    module_names: tuple[str, ...]
    untracked: tuple[tuple[str, int], ...]
    coverage: float
    vocab_size: int
    parameters: int


def describe_proxy(run: Run, verb: str) -> ProxyFacts:
    """Load the proxy in a task and describe it.

    Raises:
        FileNotFoundError: there is no such model. ValueError: too little of it can be tracked, or it has fewer
            positions than a block has tokens.
    """
    run.require_proxy()
    connect(run.config.cluster)
    task = ray.remote(num_cpus=1)(_describe)
    block_size, min_coverage = run.config.pack_corpus.block_size, run.config.fit_factors.min_coverage
    facts: ProxyFacts = ray.get(task.remote(to_mapping(run.proxy_source), block_size, min_coverage))
    log(
        verb,
        f"proxy {run.proxy_source.source or 'from architecture'}: {facts.parameters:,} parameters,"
        f" {len(facts.module_names)} tracked modules, {facts.coverage:.2%} of the blocks' parameters"
        + (f"; untracked, largest first: {facts.untracked[:3]}" if facts.untracked else ""),
    )
    return facts


def load_proxy(proxy: dict[str, Any], *, gpus: float) -> PreTrainedModel:
    """The proxy in fp32 on this worker's device, linearised: what factors, query, scores and its fingerprint are of."""
    return linearise(load_model(ModelSource(**proxy), device="cuda" if gpus else "cpu"))


def _describe(proxy: dict[str, Any], block_size: int, min_coverage: float) -> ProxyFacts:
    model = load_proxy(proxy, gpus=0)
    require_positions(proxy.get("source") or "the proxy", model.config.to_dict(), block_size)
    tracked = tracked_modules(model, min_coverage=min_coverage)
    return ProxyFacts(
        fingerprint=state_fingerprint(model),
        module_names=tracked.names,
        untracked=tracked.untracked,
        coverage=tracked.coverage,
        vocab_size=model.config.get_text_config().vocab_size,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
    )
