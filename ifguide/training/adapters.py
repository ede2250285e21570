"""Low-rank adapters (LoRA, arXiv 2106.09685), trained in place of a published model's weights: `pretrain.lora`.

    W  ->  W + alpha / rank * B A        A (rank, d_in) random, B (d_out, rank) zero at first

So the first step's loss is that of the model without adapters. Only A and B move and are saved; gradients and the
optimizer's states are of them alone. At the end they are merged into the weights, read anew in float32: what comes out
is a model like any other. Adapters are peft's.

Cost: rank * (d_in + d_out) weights a linear map, and as many products again; activations are kept as without.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ifguide.config import ConfigError
from ifguide.config.pretrain import Lora
from ifguide.models import transformer_blocks


def adapt(model: PreTrainedModel, lora: Lora) -> Any:
    """Put adapters into a model, in place, and freeze everything else; returns peft's view of it, which can merge them.

    Raises:
        ConfigError: as `adapted_modules`. ModuleNotFoundError: peft is not installed.
    """
    from peft import LoraConfig, LoraModel

    maps = adapted_modules(model, lora)
    transposed = any(isinstance(module, Conv1D) for module in maps.values())  # all of them then, as in GPT-2
    options: dict[str, Any] = {"r": lora.rank, "lora_alpha": lora.alpha, "fan_in_fan_out": transposed}
    config = LoraConfig(target_modules=list(maps), **options)
    return LoraModel(model, {"default": config}, "default")


def adapted_modules(model: nn.Module, lora: Lora) -> dict[str, nn.Module]:
    """The linear maps of a model's blocks that get an adapter, by name.

    Raises:
        ConfigError: the blocks have no map of a name in `targets`; says which they have.
    """
    name, blocks = transformer_blocks(model)
    modules = blocks.named_modules(prefix=name)
    maps = {name: module for name, module in modules if isinstance(module, nn.Linear | Conv1D)}
    kinds = {name.rpartition(".")[2] for name in maps}
    if unknown := set(lora.targets) - kinds:
        raise ConfigError(
            f"pretrain.lora.targets: the blocks have no {', '.join(sorted(unknown))}; choose among"
            f" {', '.join(sorted(kinds))}"
        )
    wanted = lora.targets or kinds
    return {name: module for name, module in maps.items() if name.rpartition(".")[2] in wanted}


def adapter_parameters(model: nn.Module, lora: Lora) -> int:
    """How many weights the adapters of a model have. Raises as `adapted_modules`."""
    weights: list[Any] = [module.weight for module in adapted_modules(model, lora).values()]
    return sum(lora.rank * sum(weight.shape) for weight in weights)


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """A model's state by name, without what is frozen."""
    frozen = frozen_names(model)
    return {name: value for name, value in model.state_dict().items() if name not in frozen}


def load_trained(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Give a model its trained state; what is frozen stays as it is.

    Raises:
        ValueError: `state` lacks something that is trained, or has something else.
    """
    missing, unexpected = model.load_state_dict(state, strict=False)
    if lacking := set(missing) - frozen_names(model):
        raise ValueError(f"the weights lack {sorted(lacking)}")
    if unexpected:
        raise ValueError(f"the weights have {unexpected} too much; were they trained without pretrain.lora?")


def frozen_names(model: nn.Module) -> set[str]:
    """The parameters that are not trained, under all their names."""
    return {name for name, value in model.named_parameters(remove_duplicate=False) if not value.requires_grad}
