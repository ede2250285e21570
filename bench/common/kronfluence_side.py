"""kronfluence's per-token scores of one model and one V, by its own loop: the other side of `score_throughput`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from kronfluence.arguments import FactorArguments, ScoreArguments
from kronfluence.module.tracked_module import TrackedModule
from kronfluence.module.utils import update_score_args, wrap_tracked_modules
from kronfluence.score.dot_product import compute_dot_products_with_loader
from kronfluence.task import Task
from kronfluence.utils.common.score_arguments import all_low_precision_score_arguments
from kronfluence.utils.constants import ACCUMULATED_PRECONDITIONED_GRADIENT_NAME, ALL_MODULE_NAME
from kronfluence.utils.state import State
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from ifguide.influence.directions import low_rank


def kronfluence_settings(rank: int) -> tuple[str, ...]:
    """Names of its settings: precision, and the rank of the query gradient where it is not full."""
    return ("float32", "bfloat16", f"bfloat16_rank{rank}") if rank else ("float32", "bfloat16")


class _SummedLoss(Task):
    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)

    def compute_train_loss(self, batch: dict[str, Tensor], model: nn.Module, sample: bool = False) -> Tensor:
        tokens_BT = batch["input_ids"]
        logits_BTV = model(tokens_BT, use_cache=False).logits.float()
        return F.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), tokens_BT[:, 1:].flatten(), reduction="sum")

    def compute_measurement(self, batch: dict[str, Tensor], model: nn.Module) -> Tensor:
        return self.compute_train_loss(batch, model)

    def get_influence_tracked_modules(self) -> list[str]:
        return self.names


class KronfluenceSide:
    """A context in which `score` runs; the model is wrapped only inside `active`, so that both sides can share it."""

    def __init__(self, model: PreTrainedModel, names: Sequence[str], directions: dict[str, Tensor]) -> None:
        self.model, self.names, self.directions = model, list(names), directions
        self.task = _SummedLoss(names)
        self.factors: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}

    def __enter__(self) -> KronfluenceSide:
        State._reset_state()
        self.state = State(cpu=self.model.device.type == "cpu")
        self.originals = {name: self.model.get_submodule(name) for name in self.names}
        wrap_tracked_modules(model=self.model, task=self.task)
        nn.Module.to(self.model, self.model.device)
        self.wrapped = {name: self.model.get_submodule(name) for name in self.names}
        self._use(self.originals)
        return self

    def __exit__(self, *_: object) -> None:
        self._use(self.originals)
        State._reset_state()

    @contextmanager
    def active(self, on: bool) -> Iterator[None]:
        """Inside, the model has kronfluence's modules, if `on`."""
        if on:
            self._use(self.wrapped)
        try:
            yield
        finally:
            if on:
                self._use(self.originals)

    def _use(self, modules: dict[str, nn.Module]) -> None:
        for name, module in modules.items():
            parent_name, _, child_name = name.rpartition(".")
            setattr(self.model.get_submodule(parent_name), child_name, module)

    def score(self, tokens_BT: Tensor, batch: int, setting: str) -> Tensor:
        """(B, T) label-aligned per-token scores."""
        arguments = ScoreArguments() if setting == "float32" else all_low_precision_score_arguments()
        dtype = torch.float32 if setting == "float32" else torch.bfloat16
        rank = int(setting.partition("rank")[2] or 0)
        arguments.compute_per_token_scores = True
        arguments.query_gradient_low_rank = rank or None
        # Its loop calls torch.compiler.reset(): our compiled kernels would be thrown away, and be compiled anew in each
        # round. It compiles nothing itself.
        with self.active(True), patch("torch.compiler.reset"):
            update_score_args(self.model, arguments)
            for name, module in self.wrapped.items():
                assert isinstance(module, TrackedModule)
                module.einsum_path = None
                module.storage[ACCUMULATED_PRECONDITIONED_GRADIENT_NAME] = self._query(name, rank, dtype)
            rows: Any = [{"input_ids": row} for row in tokens_BT]
            scores = compute_dot_products_with_loader(
                model=self.model,
                task=self.task,
                state=self.state,
                train_loader=DataLoader(rows, batch_size=batch),
                factor_args=FactorArguments(),
                score_args=arguments,
                tracked_module_names=self.names,
                scaler=torch.amp.GradScaler(tokens_BT.device.type, enabled=False),
                disable_tqdm=True,
            )
        return F.pad(scores[ALL_MODULE_NAME][0].float()[:, :-1], (1, 0)).to(tokens_BT.device)

    def _query(self, name: str, rank: int, dtype: torch.dtype) -> Tensor | list[Tensor]:
        direction, device = self.directions[name], self.model.device
        if not rank or rank * sum(direction.shape) >= direction.numel():
            return direction.to(device, dtype)[None]
        if (name, rank) not in self.factors:
            left, right, _ = low_rank(direction, rank)
            self.factors[name, rank] = left, right
        return [factor.to(device, dtype)[None].contiguous() for factor in self.factors[name, rank]]
