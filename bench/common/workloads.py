"""The workloads of `score_throughput`: blocks to score and a fitted V, on random tokens or on real text."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from bench.common.direction import encode, fit_direction
from bench.common.places import DATA
from bench.common.proxies import load_smollm2
from bench.common.texts import read_rows
from ifguide.corpus.packing import pack
from ifguide.influence.factors import fit_factors
from ifguide.influence.query import TokenisedQuery, mean_completion_gradient, precondition
from ifguide.models import tracked_modules


def differential_gradient(model: PreTrainedModel, *, queries: int = 64) -> dict[str, Tensor]:
    """The gradient per tracked module of random completions, half of each set."""
    rng = np.random.default_rng(1)
    completions = [
        TokenisedQuery(token_ids=tuple(rng.integers(1, model.config.vocab_size, 24).tolist()), completion_start=8)
        for _ in range(queries)
    ]
    weights = [(1 if i % 2 else -1) * 2 / queries for i in range(queries)]
    return mean_completion_gradient(model, tracked_modules(model).names, completions, weights, batch_tokens=1024)


def fit_on_tokens(model: PreTrainedModel, *, blocks: int = 32, block_size: int = 256) -> dict[str, Tensor]:
    """V per tracked module: `differential_gradient`, preconditioned by factors of `blocks` random blocks."""
    rng = np.random.default_rng(0)
    tokens_NT = rng.integers(1, model.config.vocab_size, (blocks, block_size), dtype=np.int32)
    factors = fit_factors(model, tokens_NT, np.full(blocks, block_size, np.int32), batch_size=4)
    return precondition(differential_gradient(model), factors)


def smollm2_workload(blocks: int, block_size: int) -> tuple[PreTrainedModel, dict[str, Tensor], Tensor]:
    """SmolLM2-135M, V of toxic against benign continuations, and blocks of comments and articles.

    Raises FileNotFoundError where the model or the data are absent.
    """
    model, tokenizer = load_smollm2()
    comments = [row["text"] for row in read_rows(DATA / "civil_comments_spans.jsonl", 600)]
    articles = [row["text"] for row in read_rows(DATA / "wikitext2_articles.jsonl", 12)]
    queries: dict[bool, list[tuple[str, str]]] = {True: [], False: []}
    for row in read_rows(DATA / "rtp_prompts.jsonl", 5000):
        toxicity = row["continuation"]["toxicity"]
        if toxicity is not None and (toxicity >= 0.5 or toxicity < 0.1) and row["continuation"]["text"].strip():
            queries[toxicity >= 0.5].append((row["prompt"]["text"], row["continuation"]["text"]))
    directions = fit_direction(model, tokenizer, comments[:150] + articles[:2], queries[True][:96], queries[False][:96])
    tokens = encode(tokenizer, comments[300:] + articles[6:])
    num_tokens = blocks * block_size
    blocks_NT, lengths_N = pack(
        tokens, skip=0, num_tokens=num_tokens, block_size=block_size, fill=int(tokenizer.eos_token_id)
    )
    assert int(lengths_N.sum()) == num_tokens, "too few documents for that many blocks"
    return model, directions, torch.from_numpy(blocks_NT.astype(np.int64))
