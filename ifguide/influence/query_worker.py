"""The work of `build_query` on workers: gradient sums of a part of the queries, and V from all of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

from ifguide.artifacts import MANIFEST, publish, verified_files
from ifguide.config import BuildQuery, ModelSource
from ifguide.influence.proxy import Beginning, load_proxy
from ifguide.influence.query import (
    ModuleFactors,
    TokenisedQuery,
    differential_weights,
    load_factors,
    mean_completion_gradient,
    precondition,
    tokenise_query,
)
from ifguide.influence.query_file import DIRECTION, QueryRow, read_queries
from ifguide.storage import local_copy
from ifguide.tokenizer import load_tokenizer

PARTIAL = "partial"


@dataclass(frozen=True, kw_only=True)
class QuerySettings:
    """What a worker sums gradients with; `folder` is the query's, and holds its rows."""

    folder: Path
    proxy: ModelSource
    tokenizer: str
    module_names: Sequence[str]
    beginning: Beginning
    options: BuildQuery

    def tokenise(self, tokenizer: PreTrainedTokenizerFast, rows: Sequence[QueryRow]) -> list[TokenisedQuery]:
        """The queries as the proxy reads them."""
        beginning, longest = self.beginning.token, self.options.max_tokens
        return [
            tokenise_query(tokenizer, row.prompt, row.completion, max_tokens=longest, beginning=beginning)
            for row in rows
        ]


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
        """The factors of modules of the proxy."""
        names = {module: self.names[module] for module in modules}
        loaded = load_factors(local_copy(self.folder), list(names.values()))
        return {module: loaded[name] for module, name in names.items()}


class SumGradients:
    """Worker: the weighted gradient sum of one part of the queries."""

    def __init__(self, settings: QuerySettings):
        self.settings = settings
        self.model = load_proxy(settings.proxy, gpus=settings.options.resources.gpus)
        self.tokenizer = load_tokenizer(settings.tokenizer)

    def process(self, part: QueryPart) -> dict[str, Any]:
        options = self.settings.options
        rows = read_queries(self.settings.folder)
        weights = differential_weights([row.positive for row in rows])
        mine = slice(part.partition, None, options.partitions)
        queries = self.settings.tokenise(self.tokenizer, rows[mine])
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
    total: dict[str, torch.Tensor] = {}
    for part in parts:
        for name, tensor in load_file(local_copy(folder / part.file)).items():
            total[name] = total[name] + tensor if name in total else tensor
    if (factors.folder / MANIFEST).exists():  # else the digests of its files are its fingerprint
        list(verified_files(factors.folder, "*.safetensors"))
    direction = precondition(total, factors.load(total), damping=options.damping, damping_scale=options.damping_scale)
    with publish(folder / DIRECTION) as path:
        save_file({name: tensor.contiguous() for name, tensor in sorted(direction.items())}, path)
    return {name: float(tensor.norm()) for name, tensor in direction.items()}
