"""How a run scores, decided once before its first shard: method, steps, micro-batch, and the self-check.

The decision is published as `scores/method.json` and every actor follows it, so that a resumed run goes on as it
began, whatever memory its new machine has free. The self-check scores a few blocks of the corpus by the exact method
as well: a fast path that went wrong stops here instead of filling a corpus with plausible numbers.
"""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from safetensors.torch import load_file

from ifguide import schemas
from ifguide.artifacts import write_json
from ifguide.config import ConfigError, ScoreCorpus
from ifguide.influence.agreement import Agreement, compare
from ifguide.influence.fused import can_fuse
from ifguide.influence.memory import MemoryEstimate, available_bytes, estimate_memory
from ifguide.influence.products import bfloat16_pays
from ifguide.influence.scorer import PRESETS, Method, TokenScorer
from ifguide.models import predicted_positions
from ifguide.stages.proxy import load_proxy
from ifguide.storage import local_copy, location
from ifguide.telemetry import log

METHOD = "method.json"
VERB = "score_corpus"


def chosen_method(config: ScoreCorpus) -> Method:
    """The preset with what is set alone.

    Raises:
        ConfigError: the combination does not exist.
    """
    method = PRESETS[config.preset]
    if config.engine is not None:
        method = replace(method, engine=config.engine)
    if config.precision is not None:
        method = replace(method, precision=config.precision)
    if config.rank is not None:
        method = replace(method, rank=config.rank or None)
    if config.fused is not None:
        method = replace(method, fused=config.fused)
    if config.attribution == "position" or method.precision == "float32":  # nothing there is compiled
        method = replace(method, fused=False)
    if config.attribution == "target" and method.engine == "forward" and method.precision != "float32":
        raise ConfigError("score_corpus.precision: engine forward runs in float32; set score_corpus.engine: difference")
    return method


def decide(
    folder: Path,
    config: ScoreCorpus,
    *,
    proxy: dict[str, Any],
    directions: dict[str, str],
    first_shard: Path,
) -> dict[str, Any]:
    """`method`, `steps`, `micro_batch_blocks`, `energy`, `check` of this run: read from `folder`, or made there.

    Raises:
        ValueError: the chosen method does not agree with the exact one on the first blocks.
    """
    path = folder / METHOD
    if path.is_file():
        decision: dict[str, Any] = json.loads(path.read_text())
        return decision
    task = ray.remote(num_cpus=config.resources.cpus, num_gpus=config.resources.gpus)(_decide)
    decision = ray.get(task.remote(config, chosen_method(config), proxy, directions, str(first_shard)))
    log(VERB, _describe(config, decision))
    check = decision["check"]
    if check is not None and min(check["correlation"], check["top"]) < config.min_agreement:
        raise ValueError(
            f"self-check: correlation {check['correlation']:.4f} and agreement of the top 1% {check['top']:.3f} with"
            f" the exact method on {check['tokens']:,} tokens; score_corpus.min_agreement is {config.min_agreement}."
            f" The directions keep {decision['energy']['least']:.3f} of their energy or more: raise score_corpus.rank"
            " (0 is full), or set score_corpus.precision: float32, or preset: exact"
        )
    del decision["memory"]  # of this machine now, not of the scores
    write_json(path, decision)
    return decision


def _describe(config: ScoreCorpus, decision: dict[str, Any]) -> str:
    method, memory, check = decision["method"], decision["memory"], decision["check"]
    text = (
        f"{config.attribution}, {decision['engine']} engine, {method['precision']},"
        f"{' fused,' if method['fused'] else ''} rank {method['rank'] or 'full'}"
        f" (energy kept {decision['energy']['mean']:.3f} on average, {decision['energy']['least']:.3f} at least);"
        f" {decision['micro_batch_blocks']} blocks at a time, about {memory['total'] / 1e9:.2f} GB per actor"
        f" of {memory['available'] / 1e9:.1f} free"
    )
    if check is None:
        return f"{text}; no self-check (score_corpus.check_blocks: 0)"
    return (
        f"{text}; self-check on {check['tokens']:,} tokens: correlation {check['correlation']:.5f}, Spearman"
        f" {check['spearman']:.5f}, top 1% {check['top']:.3f} the same"
    )


def _decide(
    config: ScoreCorpus, method: Method, proxy: dict[str, Any], directions: dict[str, str], first_shard: str
) -> dict[str, Any]:
    torch.set_num_threads(max(1, int(config.resources.cpus)))
    model = load_proxy(proxy, gpus=config.resources.gpus)
    if config.precision is None and method.precision == "bfloat16" and not bfloat16_pays(model.device):
        method = replace(method, precision="float32", fused=False)
    if method.fused and not can_fuse(model.device):
        if config.fused:
            raise ConfigError(
                f"score_corpus.fused: nothing here compiles kernels for {model.device.type}; install g++"
                " (Triton on a GPU), or leave it null"
            )
        method = replace(method, fused=False)
    loaded = [load_file(local_copy(path)) for path in directions.values()]
    table = schemas.read_table(location(first_shard), columns=["block_id", "length", "tokens"])
    table = table.slice(0, max(config.check_blocks, 1))
    tokens_BT = torch.from_numpy(schemas.per_token_array(table, "tokens").astype(np.int64))
    lengths_B = torch.from_numpy(table.column("length").to_numpy().astype(np.int64))
    scorer = TokenScorer(model, loaded, attribution=config.attribution, method=method)
    engine = "backward" if config.attribution == "position" else method.engine
    estimate = estimate_memory(
        model,
        list(scorer.energy),
        engine=engine,
        precision=method.precision,
        rank=method.rank,
        behaviours=len(loaded),
        block_size=tokens_BT.shape[1],
    )
    available = available_bytes(model.device)
    micro_batch = config.micro_batch_blocks or estimate.micro_batch(tokens_BT.shape[1], model.device, available)
    check = _check(config, method, scorer, loaded, tokens_BT, lengths_B) if config.check_blocks else None
    energy = list(scorer.energy.values())
    return {
        "method": asdict(method),
        "engine": engine,
        "steps": scorer.steps,
        "threads": torch.get_num_threads(),
        "micro_batch_blocks": micro_batch,
        "memory": _memory(estimate, micro_batch, available),
        "energy": {"least": min(energy), "mean": sum(energy) / len(energy), "of_module": scorer.energy},
        "check": None if check is None else asdict(check),
    }


def _memory(estimate: MemoryEstimate, micro_batch: int, available: int) -> dict[str, int]:
    return {**asdict(estimate), "total": estimate.fixed + micro_batch * estimate.per_block, "available": available}


def _check(
    config: ScoreCorpus,
    method: Method,
    scorer: TokenScorer,
    directions: list[dict[str, torch.Tensor]],
    tokens_BT: torch.Tensor,
    lengths_B: torch.Tensor,
) -> Agreement:
    """The least agreement over the behaviours; block by block, so that the exact method fits in memory too."""
    exact = TokenScorer(scorer.model, directions, attribution=config.attribution, method=PRESETS["exact"])
    each: list[list[torch.Tensor]] = [[], []]
    for b in range(len(tokens_BT)):
        for found, one in zip(each, (scorer, exact), strict=True):
            found.append(one.score(tokens_BT[b : b + 1], lengths_B[b : b + 1]).cpu())
    scores_KBT, exact_KBT = (torch.cat(found, dim=1) for found in each)
    predicted = predicted_positions(tokens_BT, lengths_B)
    agreements = [compare(a, b, predicted) for a, b in zip(scores_KBT, exact_KBT, strict=True)]
    return min(agreements, key=lambda agreement: agreement.least)
