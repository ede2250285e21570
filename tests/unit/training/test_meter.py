"""The line of a logging step: rates since the last one, MFU where the peak is known, nothing where it is not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from ifguide.config import Pretrain
from ifguide.config.pretrain import Lora
from ifguide.hardware import hardware
from ifguide.shapes import shape_of_fields
from ifguide.training.meter import Meter, meter_of, training_line
from tests.tiny import ARCHITECTURES

VALUES = {
    "step": 20, "steps": 100, "loss_benign": 2.51234, "loss_masked": 7.1, "learning_rate": 6e-4,
    "gradient_norm": 0.437, "tokens_per_second": 123456.7, "mfu": 0.4123, "eta_seconds": 3725.0,
}  # fmt: skip


def test_a_logging_step_is_one_line_with_all_that_is_known() -> None:
    assert training_line("penalised", VALUES) == (
        "penalised step 20/100: loss 2.5123, masked 7.1000, lr 6.00e-04, grad norm 0.44, 123,457 tok/s, MFU 41.2%,"
        " ETA 1h02m"
    )
    unknown = {**VALUES, "loss_masked": None, "gradient_norm": None, "mfu": None}
    assert training_line("baseline", unknown) == (
        "baseline step 20/100: loss 2.5123, lr 6.00e-04, 123,457 tok/s, ETA 1h02m"
    )


def test_rates_are_those_since_the_last_logging_step(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("ifguide.training.meter.time.monotonic", lambda: now[0])
    meter = Meter(step=10, steps=100, tokens_per_step=1000, flop_per_token=2e6, flop_per_second=1e9)
    now[0] = 110.0
    first = meter.values(20)
    assert first == {"tokens_per_second": 1000.0, "mfu": 2.0, "steps": 100, "eta_seconds": 80.0}
    now[0] = 115.0
    second = meter.values(30)
    assert second["tokens_per_second"] == 2000.0
    assert second["eta_seconds"] == 35.0


@pytest.mark.parametrize("workers", [1, 8])
def test_mfu_is_of_the_data_sheets_peak_of_all_workers(workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    train, fields = Pretrain(batch_blocks=64), ARCHITECTURES["gpt_neox"]
    meter = meter_of(fields, train, block_size=32, step=0, steps=9, device=torch.device("cuda"), workers=workers)
    assert meter.tokens_per_step == 64 * 32
    assert meter.flop_per_second == workers * hardware("h100").bfloat16
    assert meter.flop_per_token == shape_of_fields("tiny", "test", fields).training_flop(32)
    adapters = meter_of(
        fields,
        replace(train, lora=Lora(rank=2)),
        block_size=32,
        step=0,
        steps=9,
        device=torch.device("cuda"),
        workers=workers,
    )
    assert adapters.flop_per_token is not None
    assert adapters.flop_per_token < meter.flop_per_token
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Abacus")
    assert (
        meter_of(fields, train, block_size=32, step=0, steps=9, device=torch.device("cuda"), workers=1).values(1)["mfu"]
        is None
    )


@pytest.mark.parametrize(
    ("changes", "known"),
    [
        ({"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}, True),  # which cannot be traced
        ({"model_type": "nobody-knows"}, False),
    ],
)
def test_a_model_that_cannot_be_a_proxy_trains_all_the_same(
    changes: dict[str, Any], known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    fields = ARCHITECTURES["llama"] | changes
    meter = meter_of(fields, Pretrain(), block_size=2048, step=0, steps=9, device=torch.device("cuda"), workers=1)
    assert (meter.values(1)["mfu"] is not None) == known


def test_a_cpu_has_no_mfu() -> None:
    meter = meter_of(
        ARCHITECTURES["llama"], Pretrain(), block_size=2048, step=0, steps=9, device=torch.device("cpu"), workers=2
    )
    assert meter.values(3)["mfu"] is None
