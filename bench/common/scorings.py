"""Token scores of texts along many directions of one behaviour and proxy, kept.

Directions by name: `exact` is V by EK-FAC, `cg` V refined by conjugate gradients on the first blocks of the factors'
sample, `half_N` V of one half of the queries, `null_N` a null direction (`ifguide.influence.nulls`).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from bench.common.behaviours import Behaviour, Query
from bench.common.direction import (
    MAX_QUERY_TOKENS,
    differential,
    digest,
    factor_sample,
    fit_factors,
    mean_gradient,
    tracked_names,
)
from bench.common.places import CACHE
from bench.common.scores import BATCH_TOKENS, METHOD, score_blocks
from ifguide.artifacts import publish
from ifguide.influence.nulls import null_directions
from ifguide.influence.query import load_factors, precondition, tokenise_queries
from ifguide.influence.refinement import GaussNewton, Refinement, refine
from ifguide.influence.reliability import HALVES
from ifguide.influence.scorer import TokenScorer
from ifguide.influence.smoothing import Smoother, smoothing_layers
from ifguide.models import state_fingerprint
from ifguide.telemetry import log

BLOCK_SIZE = 256  # of the factor sample
ROUNDS = 3
Block = NDArray[np.integer]
Proxy = tuple[PreTrainedModel, PreTrainedTokenizerFast]
Scores = Sequence[NDArray[np.floating]]  # (T,) of each text; entry 0 is of no token


@dataclass(kw_only=True, eq=False)
class Scorings:
    """Scores along directions by name, made where they are not kept.

    `steps` of refinement are on the first `refine_blocks` blocks of the factors' sample; there are so many `nulls`.
    `documents`: what factors are fitted on. `factors`: a folder of them that is taken in place of the proxy's own, as
    for a checkpoint near another."""

    proxy: Proxy
    behaviour: Behaviour
    documents: Sequence[str]
    steps: int
    refine_blocks: int
    factors: Path | None = None
    nulls: int = 4
    seed: int = 0
    cache: Path = CACHE
    names: list[str] = field(init=False)
    folder: Path = field(init=False)

    def __post_init__(self) -> None:
        model, tokenizer = self.proxy
        self.names = tracked_names(model)
        self.sets = self.behaviour.positive, self.behaviour.negative
        self.sample = factor_sample(tokenizer, self.documents, block_size=BLOCK_SIZE)
        of = state_fingerprint(model), self.names, self.sample.identity(), self.sets, self.seed
        self.folder = self.cache / "score_quality" / digest(*of)

    def of(self, kinds: Sequence[str], blocks: Sequence[Block]) -> dict[str, list[NDArray[np.floating]]]:
        """The scores (T,) of every block along each of the directions, which share a pass."""
        path = self.folder / f"{self._key(kinds, blocks)}.npz"
        if not path.is_file():
            directions = self.directions(kinds)
            scores = self._score([directions[kind] for kind in kinds], blocks)
            with publish(path) as part, part.open("wb") as file:
                whole: dict[str, Any] = {kind: np.concatenate(own) for kind, own in zip(kinds, scores, strict=True)}
                np.savez(file, **whole)
        ends = np.cumsum([len(block) for block in blocks])[:-1]
        with np.load(path) as kept:
            return {kind: np.split(kept[kind], ends) for kind in kinds}

    def smoothing_cost(self, smoother: Smoother, blocks: Sequence[Block]) -> float:
        """CPU time to score the blocks along V and to smooth, over that to score, in turn: the median of rounds."""
        model = self.proxy[0]
        layers = smoothing_layers(model.config.num_hidden_layers)
        scorer = TokenScorer(model, self.directions(["exact"])["exact"], attribution="target", method=METHOD)

        def exact(block: Tensor) -> None:
            scorer.score(block, torch.tensor([block.shape[1]]))

        def smoothed(block: Tensor) -> None:
            scores, states, _ = scorer.score_and_read(block, torch.tensor([block.shape[1]]), layers)
            features_TD = torch.cat([layer[0] for layer in states], dim=-1)
            folds_T = torch.zeros(len(features_TD), dtype=torch.long)
            smoother.smooth(scores[:, 0].T, smoother.predict(features_TD, folds_T))

        ratios = []
        for _ in range(ROUNDS + 1):
            seconds = []
            for score in (exact, smoothed):
                started = time.process_time()
                for block in blocks:
                    score(torch.from_numpy(block.astype(np.int64))[None])
                seconds.append(time.process_time() - started)
            ratios.append(seconds[1] / seconds[0])
        return statistics.median(ratios[1:])  # the first round warms up

    def factors_folder(self) -> Path:
        """The factors, fitted where they are not kept."""
        model, tokenizer = self.proxy
        return self.factors or fit_factors(
            model, tokenizer, self.names, self.documents, block_size=BLOCK_SIZE, cache_dir=self.cache
        )

    def directions(self, kinds: Sequence[str]) -> dict[str, dict[str, Tensor]]:
        """The directions by name; of nulls all are made at once."""
        factors = load_factors(self.factors_folder(), self.names)
        directions = {}
        for kind in kinds:
            if kind == "exact":
                directions[kind] = precondition(self._gradient(), factors)
            elif kind.startswith("half_"):
                directions[kind] = precondition(self._gradient(half=int(kind.removeprefix("half_"))), factors)
            elif kind == "cg":
                directions[kind] = self._refined(factors)
        if any(kind.startswith("null_") for kind in kinds):
            directions |= {f"null_{number}": null for number, null in enumerate(self._nulls(factors))}
        return directions

    def _key(self, kinds: Sequence[str], blocks: Sequence[Block]) -> str:
        refined = (self.steps, self.refine_blocks) if "cg" in kinds else ()
        nulls = (self.nulls,) if any(kind.startswith("null_") for kind in kinds) else ()
        return digest(list(kinds), [block.tolist() for block in blocks], refined, nulls)

    def _score(self, directions: Sequence[Mapping[str, Tensor]], blocks: Sequence[Block]) -> list[list[np.ndarray]]:
        model, tokenizer = self.proxy
        triples = [(block, None, None) for block in blocks]
        return score_blocks(model, directions, triples, "target", int(tokenizer.eos_token_id), at_once=len(directions))

    def _gradient(self, *, half: int | None = None) -> dict[str, Tensor]:
        model, tokenizer = self.proxy
        sets: list[Sequence[Query]] = [own if half is None else own[half::HALVES] for own in self.sets]
        return differential(*(mean_gradient(model, tokenizer, self.names, own, cache_dir=self.cache) for own in sets))

    def _nulls(self, factors: Any) -> list[dict[str, Tensor]]:
        model, tokenizer = self.proxy
        return null_directions(
            model,
            tokenise_queries(
                tokenizer, [query for own in self.sets for query in own], model, max_tokens=MAX_QUERY_TOKENS
            ),
            [kind for kind, own in zip((True, False), self.sets, strict=True) for _ in own],
            factors,
            count=self.nulls,
            seed=self.seed,
            batch_tokens=BATCH_TOKENS,
        )

    def _refined(self, factors: Any) -> dict[str, Tensor]:
        model, steps = self.proxy[0], self.steps
        path = self.folder / f"refinement-{self.refine_blocks}-{steps}.safetensors"
        gradient = self._gradient()
        batches = [batch for partition in range(self.sample.num_partitions) for batch in self.sample.loader(partition)]
        size = len(batches[0]["input_ids"])
        product = GaussNewton(model, self.names, batches[: -(-self.refine_blocks // size)])
        state = Refinement.load(path, model.device) if path.is_file() else Refinement.begin(gradient)
        for _ in refine(gradient, factors, product, steps=steps, begun=state):
            log("refinement", f"step {len(state.steps)} of {steps}: {state.steps[-1]}")
            with publish(path) as part:
                state.save(part)
        return state.direction
