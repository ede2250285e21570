"""How a run scores, decided once before its first shard: method, steps, micro-batch, and the self-check.

The decision is published as `scores/method.json` and every actor follows it, so that a resumed run goes on as it
began, whatever memory its new machine has free. The self-check scores a few blocks of the corpus by the exact method
as well: a fast path that went wrong stops here instead of filling a corpus with plausible numbers.
"""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ifguide import schemas
from ifguide.artifacts import verified, write_json
from ifguide.config import ConfigError, ModelSource, ScoreCorpus
from ifguide.influence.agreement import ScoreAgreement, compare, require_finite
from ifguide.influence.fused import can_fuse
from ifguide.influence.memory import available_bytes, estimate_memory
from ifguide.influence.method import PRESETS, Method, chosen_method
from ifguide.influence.products import bfloat16_pays
from ifguide.influence.proxy import Beginning, load_same_proxy
from ifguide.influence.query_file import read_direction, read_nulls
from ifguide.influence.scorer import TokenScorer
from ifguide.models import predicted_positions
from ifguide.spans.tables import PackedCorpus, document_numbers, in_blocks

METHOD, CERTIFICATE = "method.json", "certificate"


@dataclass(frozen=True, kw_only=True)
class Energy:
    """The share of V's squared norm that its low rank keeps, 0 to 1: over the modules, and of each."""

    least: float
    mean: float
    of_module: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What every actor of a run follows. `engine` is what runs; `steps` are those of the difference engine, one for
    each behaviour; `check` is the self-check's outcome, None where there was none."""

    method: Method
    engine: str
    steps: Sequence[float] | None
    threads: int
    micro_batch_blocks: int
    energy: Energy
    check: ScoreAgreement | None

    def write(self, folder: Path, *, certificate: Mapping[str, Any] | None = None) -> None:
        """Publish it in the folder of the scores, with the certificate of scores that a student made."""
        write_json(folder / METHOD, asdict(self) | ({} if certificate is None else {CERTIFICATE: dict(certificate)}))

    @classmethod
    def read(cls, folder: Path) -> Decision | None:
        """That of an interrupted run; None where none was made.

        Raises:
            ValueError: the file is damaged; names it.
        """
        path = folder / METHOD
        if not path.is_file():
            return None
        try:
            fields = json.loads(path.read_bytes(), parse_float=_finite, parse_constant=_finite)
            method, energy = Method(**fields.pop("method")), Energy(**fields.pop("energy"))
            check = fields.pop("check")
            fields.pop(CERTIFICATE, None)  # of what was scored since: it is made again
            return cls(method=method, energy=energy, check=None if check is None else ScoreAgreement(**check), **fields)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ValueError(
                f"{path} is not a scoring method ({error}); delete {folder} and score the corpus again"
            ) from error

    def require_agreement(self, least: float) -> None:
        """Raises ValueError when the self-check found less than `least` of correlation or agreement of the top."""
        if self.check is None or self.check.least >= least:
            return
        kept = f" The directions keep {self.energy.least:.3f} of their energy or more: raise score_corpus.rank"
        cut = "" if self.method.rank is None else f"{kept} (0 is full)."
        raise ValueError(
            f"self-check: correlation {self.check.correlation:.4f} and agreement of the top {self.check.top_tokens:,}"
            f" tokens {self.check.top:.3f} with the exact method on {self.check.tokens:,} tokens;"
            f" score_corpus.min_agreement is {least}.{cut}"
            " Set score_corpus.precision: float32, or preset: exact, in another run_dir or after deleting the folder of"
            " the scores, or accept it by a lower score_corpus.min_agreement. A larger score_corpus.check_blocks"
            " compares more tokens"
        )


def _finite(text: str) -> float:
    """A number of JSON. ValueError of NaN and of infinity, which Python reads from it too."""
    if not math.isfinite(float(text)):
        raise ValueError(f"{text} is no finite number")
    return float(text)


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes that an actor takes, and that are free for it: of one machine at one time, and so no part of a decision."""

    total: int
    available: int


def describe_decision(config: ScoreCorpus, decision: Decision, memory: Memory) -> str:
    """One line for people."""
    method, check = decision.method, decision.check
    text = (
        f"{config.attribution}, {decision.engine} engine, {method.precision},"
        f"{' fused,' if method.fused else ''} rank {method.rank or 'full'}"
        f" (energy kept {decision.energy.mean:.3f} on average, {decision.energy.least:.3f} at least);"
        f" {decision.micro_batch_blocks} blocks at a time, about {memory.total / 1e9:.2f} GB per actor"
        f" of {memory.available / 1e9:.1f} free"
    )
    if check is None:
        return f"{text}; no self-check (score_corpus.check_blocks: 0)"
    return (
        f"{text}; self-check on {check.tokens:,} tokens: correlation {check.correlation:.5f}, Spearman"
        f" {check.spearman:.5f}, of the top {check.top_tokens:,} {check.top:.3f} the same"
    )


def decide(
    config: ScoreCorpus,
    proxy: ModelSource,
    proxy_fingerprint: str,
    beginning: Beginning,
    queries: Sequence[Path],
    corpus: PackedCorpus,
    first_shard: str,
) -> tuple[Decision, Memory]:
    """Choose on this machine, by the first blocks of the corpus; run it where an actor will run.

    proxy_fingerprint: of the driver's proxy. queries: folders of query artifacts, one for each behaviour. first_shard:
    the corpus' first file.

    Raises:
        MismatchError: another proxy lies on this node.
        ValueError: a file has changed since it was made; names it. ConfigError: the method does not exist, or
            `score_corpus.fused` is true and nothing compiles.
    """
    torch.set_num_threads(max(1, int(config.resources.cpus)))
    model = load_same_proxy(proxy, gpus=config.resources.gpus, fingerprint=proxy_fingerprint)
    method = _method_here(config, model.device)
    directions = [*map(read_direction, queries)]
    loaded = [*directions, *itertools.chain.from_iterable(map(read_nulls, queries))]
    tokens_BT, lengths_B = _first_blocks(verified(corpus.folder, first_shard), max(config.check_blocks, 1))
    document_BT = None
    if beginning.of_documents:
        numbers = document_numbers(corpus, 0)[: tokens_BT.numel()]
        document_BT = torch.from_numpy(in_blocks(numbers, tokens_BT.numpy()))
    block_size = tokens_BT.shape[1] + beginning.length
    scorer = TokenScorer(model, loaded, attribution=config.attribution, method=method, beginning=beginning.token)
    engine = "backward" if config.attribution == "position" else method.engine
    estimate = estimate_memory(
        model,
        list(scorer.energy),
        engine=engine,
        precision=method.precision,
        rank=method.rank,
        behaviours=len(loaded),
        block_size=block_size,
    )
    held = torch.cuda.memory_allocated(model.device) if model.device.type == "cuda" else 0  # the estimate has it, too
    available = int((available_bytes(model.device) + held) * _share_of_device(config, model.device))
    micro_batch = config.micro_batch_blocks or estimate.micro_batch(block_size, model.device, available)
    energy = list(scorer.energy.values())
    decision = Decision(
        method=method,
        engine=engine,
        steps=scorer.steps,
        threads=torch.get_num_threads(),
        micro_batch_blocks=micro_batch,
        energy=Energy(least=min(energy), mean=sum(energy) / len(energy), of_module=scorer.energy),
        check=_check(scorer, directions, tokens_BT, lengths_B, document_BT) if config.check_blocks else None,
    )
    return decision, Memory(total=estimate.fixed + micro_batch * estimate.per_block, available=available)


def _method_here(config: ScoreCorpus, device: torch.device) -> Method:
    """The configured method, less what this machine cannot do or is no quicker with."""
    method = chosen_method(config)
    if config.precision is None and method.precision == "bfloat16" and not bfloat16_pays(device):
        method = replace(method, precision="float32", fused=False)
    if method.fused and not can_fuse(device):
        if config.fused:
            raise ConfigError(
                f"score_corpus.fused: nothing here compiles kernels for {device.type}; install g++"
                " (Triton on a GPU), or leave it null"
            )
        method = replace(method, fused=False)
    return method


def _share_of_device(config: ScoreCorpus, device: torch.device) -> float:
    """An actor's share of the free memory: as many actors work beside it as have room on this machine."""
    if device.type != "cpu":
        return min(1.0, config.resources.gpus)
    actors = int((os.cpu_count() or 1) / config.resources.cpus)
    return 1 / max(1, min(actors, config.max_actors))


def _first_blocks(shard: Path, count: int) -> tuple[Tensor, Tensor]:
    table = schemas.read_table(shard, columns=["block_id", "length", "tokens"]).slice(0, count)
    tokens_BT = torch.from_numpy(schemas.per_token_array(table, "tokens").astype(np.int64))
    return tokens_BT, torch.from_numpy(table.column("length").to_numpy().astype(np.int64))


def _check(
    scorer: TokenScorer,
    directions: Sequence[Mapping[str, Tensor]],
    tokens_BT: Tensor,
    lengths_B: Tensor,
    document_BT: Tensor | None,
) -> ScoreAgreement:
    """The least agreement over the behaviours, whose `directions` are the scorer's first; scores along its others, the
    nulls, must be finite. Block by block, so that the exact method fits in memory too."""
    exact = TokenScorer(
        scorer.model,
        directions,
        attribution=scorer.attribution,
        method=PRESETS["exact"],
        beginning=scorer.beginning,
    )
    scores_KBT, exact_KBT = (one.score_one_by_one(tokens_BT, lengths_B, document_BT) for one in (scorer, exact))
    predicted = predicted_positions(tokens_BT, lengths_B, document_BT)
    require_finite(scores_KBT[:, predicted])
    agreements = [compare(a, b, predicted) for a, b in zip(scores_KBT[: len(exact_KBT)], exact_KBT, strict=True)]
    return min(agreements, key=lambda agreement: agreement.least)
