"""A query direction V fitted in this process, without Ray, with its heavy parts kept on disk for other benchmarks.

    V = (EK-FAC + d)^-1 [mean over positive of grad NLL(completion | prompt) - the same mean over negative]

It calls `ifguide.influence` alone: nothing of the method is repeated here. Kept under `cache_dir`, each in a folder
named by a digest of all that decides its values (weights, modules, tokens, seed): the factors, and the mean gradient
of each query set. So another damping, another rank, no preconditioner or no differential costs no model pass.

Cost for SmolLM2-135M, all 210 modules, on two cores: about five minutes for 14k tokens of factors, two for 320
queries, half a minute to precondition; 1.3 GB on disk for the factors, 0.4 GB per gradient.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from bench.common.places import CACHE
from ifguide.artifacts import publish, remove_tree
from ifguide.corpus.packing import pack, tokenise
from ifguide.corpus.reading import RawDocument
from ifguide.influence.factor_sample import FactorSample
from ifguide.influence.factors import EkfacFit, Step
from ifguide.influence.query import load_factors, mean_completion_gradient, precondition, tokenise_queries
from ifguide.models import state_fingerprint, tracked_modules
from ifguide.telemetry import Progress, log

Query = tuple[str, str]
PARTITION_TOKENS = 2048  # of the factor sample: a partition is the unit of progress and of resume
QUERY_CHUNK = 32  # queries per progress line
BATCH_TOKENS = 1024
MAX_QUERY_TOKENS = 128


def fit_direction(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    documents: Sequence[str],
    positive: Sequence[Query],
    negative: Sequence[Query],
    *,
    block_size: int = 256,
    modules: str = "",
    cache_dir: Path = CACHE,
    damping_scale: float = 0.1,
) -> dict[str, Tensor]:
    """V (d_out, d_in [+ 1]) per tracked module whose name holds a match of the pattern `modules`; float32.

    documents: the factor sample, packed into blocks of `block_size` as a corpus is. positive, negative: (prompt,
    completion). Raises ValueError when `modules` matches none.
    """
    names = tracked_names(model, modules)
    gradient = differential(
        mean_gradient(model, tokenizer, names, positive, cache_dir=cache_dir),
        mean_gradient(model, tokenizer, names, negative, cache_dir=cache_dir),
    )
    factors = fit_factors(model, tokenizer, names, documents, block_size=block_size, cache_dir=cache_dir)
    return precondition(gradient, load_factors(factors, names), damping_scale=damping_scale)


def tracked_names(model: PreTrainedModel, pattern: str = "") -> list[str]:
    """The tracked modules whose name holds a match of `pattern`; ValueError where there is none."""
    names = [name for name in tracked_modules(model).names if re.search(pattern, name)]
    if not names:
        raise ValueError(f"no tracked module's name matches {pattern!r}")
    return names


def differential(positive: Mapping[str, Tensor], negative: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """G: the positive queries' mean gradient minus the negative ones', per module."""
    return {name: tensor - negative[name] for name, tensor in positive.items()}


def encode(tokenizer: PreTrainedTokenizerFast, documents: Sequence[str]) -> list[np.ndarray]:
    """int32 token ids of each document, EOS at the end, as the corpus has them."""
    raw = [RawDocument(row=row, text=text) for row, text in enumerate(documents)]
    return [document.tokens for document in tokenise(raw, tokenizer, annotate=False)]


def fit_factors(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    names: Sequence[str],
    documents: Sequence[str],
    *,
    block_size: int,
    cache_dir: Path = CACHE,
    seed: int = 0,
) -> Path:
    """The folder of EK-FAC factors of `documents`; fitted where the cache has none, resumed by partition."""
    sample = factor_sample(tokenizer, documents, block_size=block_size, seed=seed)
    total = int(sample.lengths_N.sum())
    folder = cache_dir / digest("factors", state_fingerprint(model), list(names), sample.identity())
    done, work = folder / "factors", folder / "work"
    if done.is_dir():
        log("factors", f"{total:,} tokens, {len(names)} modules: kept in {folder.name}")
        return done

    def watch(step: Step, pieces: range) -> Iterator[int]:
        amount, unit = (len(pieces), "modules") if step == "eigen" else (total, "tokens")
        progress = Progress(step, amount, unit)
        for index in pieces:
            yield index
            progress.advance(amount / len(pieces))

    remove_tree(folder / "factors.part")
    EkfacFit(model=model, sample=sample, module_names=names, workdir=work).run(folder / "factors.part", watch=watch)
    (folder / "factors.part").rename(done)
    shutil.rmtree(work)
    return done


def factor_sample(
    tokenizer: PreTrainedTokenizerFast, documents: Sequence[str], *, block_size: int, seed: int = 0
) -> FactorSample:
    """The documents as the blocks that factors are fitted on."""
    tokens = encode(tokenizer, documents)
    total = sum(map(len, tokens))
    blocks_NT, lengths_N = pack(
        tokens, skip=0, num_tokens=total, block_size=block_size, fill=int(tokenizer.eos_token_id)
    )
    return FactorSample(
        blocks_NT=blocks_NT,
        lengths_N=lengths_N,
        num_partitions=min(len(blocks_NT), -(-total // PARTITION_TOKENS)),
        batch_size=max(1, BATCH_TOKENS // block_size),
        seed=seed,
    )


def mean_gradient(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    names: Sequence[str],
    queries: Sequence[Query],
    *,
    cache_dir: Path = CACHE,
) -> dict[str, Tensor]:
    """The mean over `queries` of grad of the completion's summed NLL, per module; from the cache if it is there."""
    tokenised = tokenise_queries(tokenizer, queries, model, max_tokens=MAX_QUERY_TOKENS)
    identity = [[query.token_ids, query.completion_start] for query in tokenised]
    path = cache_dir / digest("gradient", state_fingerprint(model), list(names), identity) / "gradient.safetensors"
    if path.is_file():
        kept = load_file(path)
        return {name: kept[name] for name in names}
    progress = Progress("gradient", len(tokenised), "queries")
    total: dict[str, Tensor] = {}
    # Like lengths together: a batch is padded to its longest query.
    tokenised.sort(key=lambda query: len(query.token_ids))
    for begin in range(0, len(tokenised), QUERY_CHUNK):
        chunk = tokenised[begin : begin + QUERY_CHUNK]
        weights = [1 / len(tokenised)] * len(chunk)
        part = mean_completion_gradient(model, names, chunk, weights, batch_tokens=BATCH_TOKENS)
        total = {name: total[name] + tensor if total else tensor for name, tensor in part.items()}
        progress.advance(len(chunk))
    with publish(path) as unfinished:
        save_file({name: tensor.contiguous() for name, tensor in total.items()}, unfinished)
    return total


def low_rank(direction: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
    """The best approximation of each module's V of rank at most `rank`, by SVD."""
    truncated = {}
    for name, tensor in direction.items():
        U, S, Vh = torch.linalg.svd(tensor, full_matrices=False)
        truncated[name] = (U[:, :rank] * S[:rank]) @ Vh[:rank]
    return truncated


def digest(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
