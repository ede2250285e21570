"""Which optimizer an engine has, and what is said where DeepSpeed's cannot be built."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ifguide.config import ConfigError, Pretrain
from ifguide.config.pretrain import Acceleration, check_pretrain
from ifguide.config.resources import WorkerResources
from ifguide.training.engines import TorchEngine, build_optimizer

Options = dict[str, Any]
OWN = Acceleration(deepspeed_optimizer=True)


class OnDevice(torch.optim.AdamW):
    pass


class OnCpu(torch.optim.AdamW):
    pass


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, torch.optim.AdamW),
        ({"acceleration": OWN}, OnDevice),
        ({"acceleration": OWN, "offload_optimizer": True}, OnCpu),
        ({"acceleration": OWN, "resources": WorkerResources(gpus=0)}, OnCpu),
    ],
)
def test_deepspeeds_kernel_is_that_of_where_the_state_is(
    options: Options, expected: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deepspeed.ops.adam.FusedAdam", OnDevice)
    monkeypatch.setattr("deepspeed.ops.adam.DeepSpeedCPUAdam", OnCpu)
    module: Any = torch.nn.Linear(3, 2)
    made = build_optimizer(module, Pretrain(learning_rate=0.5, weight_decay=0.1, betas=(0.8, 0.7), **options))
    assert type(made) is expected
    assert [(group["weight_decay"], group["lr"], group["betas"]) for group in made.param_groups] == [
        (0.1, 0.5, (0.8, 0.7)),
        (0.0, 0.5, (0.8, 0.7)),
    ]


def test_what_cannot_be_built_is_refused_by_its_key(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(*_: Any, **__: Any) -> None:
        raise RuntimeError("Ninja is required to load C++ extensions")

    monkeypatch.setattr("deepspeed.ops.adam.DeepSpeedCPUAdam", build)
    module: Any = torch.nn.Linear(3, 2)
    with pytest.raises(ConfigError, match=r"acceleration\.deepspeed_optimizer: .* \(Ninja is required .* unset it"):
        build_optimizer(module, Pretrain(acceleration=OWN, resources=WorkerResources(gpus=0)))


@pytest.mark.parametrize(
    ("acceleration", "engine", "message"),
    [
        ({"deepspeed_optimizer": True}, "torch", "deepspeed_optimizer: is of engine deepspeed, not torch"),
        ({"deepspeed_compile": True}, "torch", "deepspeed_compile: is of engine deepspeed, not torch"),
        ({"deepspeed_compile": True, "compiled_layers": True}, "deepspeed", "compiles the layers, too; unset"),
    ],
)
def test_switches_that_do_not_go_together_are_refused(acceleration: Options, engine: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_pretrain(Pretrain(engine=engine, acceleration=Acceleration(**acceleration)))


def test_a_gpu_that_is_not_there_is_refused_by_its_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"^pretrain\.resources\.gpus: 1 is set, and torch sees no GPU here"):
        TorchEngine(Pretrain(engine="torch"), lambda: pytest.fail("the model is built"), None)
