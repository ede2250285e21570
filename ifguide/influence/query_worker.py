"""The work of `build_query` on workers: gradient sums of a part of the queries, V from all of them, refined or not, and
how much it depends on which queries were drawn."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from ifguide import schemas
from ifguide.artifacts import MANIFEST, publish, verified_files
from ifguide.config import BuildQuery, ModelSource
from ifguide.folds import GOLDEN, spread_bits
from ifguide.influence.factor_sample import FactorSample
from ifguide.influence.factor_worker import sampled_documents
from ifguide.influence.proxy import Beginning, load_same_proxy
from ifguide.influence.query import (
    ModuleFactors,
    TokenisedQuery,
    differential_weights,
    load_factors,
    mean_completion_gradient,
    precondition,
    tokenise_queries,
)
from ifguide.influence.query_file import DIRECTION, HELD_OUT, QueryRow, read_queries
from ifguide.influence.query_groups import counted_as, total_weights
from ifguide.influence.refinement import GaussNewton, Refinement, refine
from ifguide.influence.reliability import HALVES, Reliability, effective_number, measure_reliability, separation
from ifguide.storage import local_copy
from ifguide.tokenizer import load_tokenizer

PARTIAL = "partial"


@dataclass(frozen=True, kw_only=True)
class QuerySettings:
    """What a worker sums gradients with; `folder` is the query's, and holds its rows. `proxy_fingerprint` is of the
    driver's proxy."""

    folder: Path
    proxy: ModelSource
    proxy_fingerprint: str
    tokenizer: str
    module_names: Sequence[str]
    beginning: Beginning
    options: BuildQuery

    def model(self) -> PreTrainedModel:
        """The proxy. Raises MismatchError where another one lies on this node."""
        gpus = self.options.resources.gpus
        return load_same_proxy(self.proxy, gpus=gpus, fingerprint=self.proxy_fingerprint)

    def tokenise(
        self, tokenizer: PreTrainedTokenizerFast, rows: Sequence[QueryRow], model: PreTrainedModel
    ) -> list[TokenisedQuery]:
        """The queries as the proxy, `model`, reads them."""
        return tokenise_queries(
            tokenizer,
            [(row.prompt, row.completion) for row in rows],
            model,
            max_tokens=self.options.max_tokens,
            beginning=self.beginning.token,
        )


@dataclass(frozen=True, kw_only=True)
class QueryPart:
    """Every `build_query.partitions`-th query from number `partition` on."""

    key: str
    partition: int

    @property
    def file(self) -> str:
        """Where its sum lies in the query's folder."""
        return f"{PARTIAL}/{self.key}.safetensors"


@dataclass(frozen=True, kw_only=True)
class FactorsFolder:
    """A folder of factors; `names`: module of the proxy -> its name in the files."""

    folder: Path
    fingerprint: str
    names: Mapping[str, str]

    def load(self, modules: Iterable[str]) -> dict[str, ModuleFactors]:
        """The factors of modules of the proxy. ValueError names a file that has changed since they were fitted."""
        if (self.folder / MANIFEST).exists():  # else the digests of its files are its fingerprint
            list(verified_files(self.folder, "*.safetensors"))
        names = {module: self.names[module] for module in modules}
        loaded = load_factors(local_copy(self.folder), list(names.values()))
        return {module: loaded[name] for module, name in names.items()}


class SumGradients:
    """Worker: the weighted gradient sum of one part of the queries."""

    def __init__(self, settings: QuerySettings):
        self.settings = settings
        self.model = settings.model()
        self.tokenizer = load_tokenizer(settings.tokenizer)

    def process(self, part: QueryPart) -> dict[str, Any]:
        options = self.settings.options
        rows = read_queries(self.settings.folder)
        weights = differential_weights([row.positive for row in rows], [row.weight for row in rows])
        mine = slice(part.partition, None, options.partitions)
        queries = self.settings.tokenise(self.tokenizer, rows[mine], self.model)
        gradient = mean_completion_gradient(
            self.model, self.settings.module_names, queries, weights[mine], batch_tokens=options.batch_tokens
        )
        with publish(self.settings.folder / part.file) as path:
            save_file({name: tensor.cpu().contiguous() for name, tensor in gradient.items()}, path)
        return {"queries": len(queries), "tokens": sum(len(query.token_ids) for query in queries)}


def precondition_parts(
    folder: Path, factors: FactorsFolder, parts: Sequence[QueryPart], options: BuildQuery
) -> dict[str, float]:
    """Add the parts' sums in order, precondition, publish V; returns the norm of V per module.

    Raises:
        ValueError: a file of the factors has changed since they were fitted; names it.
    """
    total = _added(folder, parts)
    direction = precondition(total, factors.load(total), damping=options.damping, damping_scale=options.damping_scale)
    return _publish_direction(folder, direction)


def refine_parts(
    settings: QuerySettings, factors: FactorsFolder, parts: Sequence[QueryPart], blocks: Path, state: Path
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """`build_query.refine_steps` steps of `refinement.refine` on the sampled `blocks` in place of `precondition_parts`.
    Returns the norm of V per module, and what the steps did.

    After each step its state is published as `state`: a task that is begun again goes on from there.
    """
    options = settings.options
    model = settings.model()
    gradient = {name: tensor.to(model.device) for name, tensor in _added(settings.folder, parts).items()}
    sample = schemas.read_table(blocks)
    batches = FactorSample(
        blocks_NT=schemas.per_token_array(sample, "tokens"),
        lengths_N=sample.column("length").to_numpy(),
        num_partitions=1,
        batch_size=1,
        seed=0,
        beginning=settings.beginning.token,
        documents_NT=sampled_documents(sample),
    ).loader(0)
    product = GaussNewton(model, list(gradient), list(batches))
    refinement = Refinement.load(local_copy(state), model.device) if state.exists() else Refinement.begin(gradient)
    for _ in refine(
        gradient,
        factors.load(gradient),
        product,
        steps=options.refine_steps,
        damping=options.damping,
        damping_scale=options.damping_scale,
        begun=refinement,
    ):
        with publish(state) as path:
            refinement.save(path)
    direction = {name: tensor.float().cpu() for name, tensor in refinement.direction.items()}
    return _publish_direction(settings.folder, direction), refinement.summary()


def judge_queries(settings: QuerySettings, factors: FactorsFolder, blocks: Path, seed: int) -> Reliability | None:
    """The reliability of scores by the queries, on the sampled `blocks`; None where a set has a single query.

    Of each set `build_query.reliability_queries` are judged (`draw_queries`), or all where they are fewer."""
    options, rows = settings.options, read_queries(settings.folder)
    sets = [[row for row in rows if row.positive == kind] for kind in (True, False)]
    if any(len(own) == 1 for own in sets):
        return None
    drawn = [row for own in sets for row in draw_queries(own, options.reliability_queries, seed)]
    sample = schemas.read_table(blocks)
    documents_NT = sampled_documents(sample)
    model = settings.model()
    return measure_reliability(
        model,
        settings.tokenise(load_tokenizer(settings.tokenizer), drawn, model),
        [row.positive for row in drawn],
        factors.load(settings.module_names),
        torch.from_numpy(schemas.per_token_array(sample, "tokens").astype(np.int64)),
        torch.from_numpy(sample.column("length").to_numpy().astype(np.int64)),
        of=(_number(sets[0]), _number(sets[1])),
        weights=[row.weight for row in drawn],
        batch_tokens=options.batch_tokens,
        damping=options.damping,
        damping_scale=options.damping_scale,
        beginning=settings.beginning.token,
        document_NT=None if documents_NT is None else torch.from_numpy(documents_NT),
    )


def _number(rows: Sequence[QueryRow]) -> float:
    """As how many equal prompts the mean of a set is noisy."""
    counted = counted_as([row.prompt for row in rows], HALVES)
    return effective_number(total_weights(counted, [row.weight for row in rows]))


def draw_queries(rows: Sequence[QueryRow], most: int, seed: int) -> list[QueryRow]:
    """At most so many of one set's queries, in their order. Seed and row number decide, so of a pair's completions the
    two sets have both or neither: what they share cancels in V, and must in a part of the queries."""
    numbers = np.array([row.row for row in rows], np.uint64) + np.uint64(1) + np.array([seed], np.uint64) * GOLDEN
    return [rows[i] for i in np.sort(np.argsort(spread_bits(numbers * GOLDEN), kind="stable")[:most])]


def judge_held_out(settings: QuerySettings) -> float | None:
    """How well scores along V tell the sets of the queries apart that it is not made of (`reliability.separation`);
    None where a set has none of them."""
    rows = read_queries(settings.folder, HELD_OUT)
    positive = [row.positive for row in rows]
    if all(positive) or not any(positive):
        return None
    model = settings.model()
    return separation(
        model,
        settings.tokenise(load_tokenizer(settings.tokenizer), rows, model),
        positive,
        load_file(local_copy(settings.folder / DIRECTION)),
        batch_tokens=settings.options.batch_tokens,
    )


def _added(folder: Path, parts: Sequence[QueryPart]) -> dict[str, Tensor]:
    """The differential gradient: the parts' sums added in order."""
    total: dict[str, Tensor] = {}
    for part in parts:
        for name, tensor in load_file(local_copy(folder / part.file)).items():
            total[name] = total[name] + tensor if name in total else tensor
    return total


def _publish_direction(folder: Path, direction: Mapping[str, Tensor]) -> dict[str, float]:
    """Publish V; returns its norm per module."""
    with publish(folder / DIRECTION) as path:
        save_file({name: tensor.contiguous() for name, tensor in sorted(direction.items())}, path)
    return {name: float(tensor.norm()) for name, tensor in direction.items()}
