"""A step of the torch engine: nothing is read on the host, and its switches change no more than last bits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.common.step_profile import host_reads
from bench.common.step_sides import Sizes, training_loop
from ifguide.training.loop import TrainingLoop
from tests.tiny import GPT_NEOX, LLAMA

SIZES = Sizes(fields={**GPT_NEOX, "vocab_size": 320}, blocks=4, block_size=16, dtype="float32", device="cpu", threads=1)
OFF = {"compiled_layers": False, "compiled_loss": False}
Loop = Callable[..., TrainingLoop]


@pytest.fixture
def loop(tmp_path: Path) -> Loop:
    """A loop in a folder of its own, with these options of the acceleration and, by keyword, of `pretrain`."""

    def make(name: str, acceleration: dict[str, Any], sizes: Sizes = SIZES, **options: Any) -> TrainingLoop:
        tree = {"acceleration": {**OFF, **acceleration}, **options}
        return training_loop(tmp_path / name, sizes, tree, masked=True)

    return make


def weights(loop: TrainingLoop, steps: int = 3) -> dict[str, torch.Tensor]:
    for _ in range(steps):
        loop._train_step()
    return {name: value.clone() for name, value in loop.engine.module.model.state_dict().items()}


@pytest.mark.parametrize("micro_batch_blocks", [4, 2])
@pytest.mark.parametrize("switches", [{}, {"prefetched_batches": False}])
def test_a_step_reads_nothing_on_the_host_but_where_losses_are_logged(
    switches: dict[str, Any], micro_batch_blocks: int, loop: Loop
) -> None:
    made = loop("reads", switches, log_steps=4, micro_batch_blocks=micro_batch_blocks)
    made._train_step()
    assert not host_reads(made._train_step, steps=2)
    assert host_reads(made._train_step)


@pytest.mark.slow
def test_a_compiled_step_reads_nothing_either(loop: Loop) -> None:
    made = loop("compiled", {"compiled_layers": True, "compiled_loss": True}, log_steps=4)
    made._train_step()
    assert not host_reads(made._train_step, steps=2)
    assert host_reads(made._train_step)


def test_batches_made_ahead_are_the_same_to_the_last_bit(loop: Loop) -> None:
    ahead, at_once = (weights(loop(str(on), {"prefetched_batches": on}, batch_blocks=12)) for on in (True, False))
    assert all(torch.equal(ahead[name], at_once[name]) for name in ahead)


@pytest.mark.parametrize("clipping", [1e-3, 1e3])
def test_the_fused_optimizer_clips_and_moves_as_the_plain_one(clipping: float, loop: Loop) -> None:
    options = {"gradient_clipping": clipping, "learning_rate": 1e-2, "warmup_fraction": 0.0}
    sizes = replace(
        SIZES, fields={**LLAMA, "vocab_size": 320}
    )  # no biases: those of keys have gradients of noise alone
    fused, plain = (weights(loop(str(on), {"fused_optimizer": on}, sizes, **options)) for on in (True, False))
    start = loop("start", {}, sizes).engine.module.model.state_dict()
    for name, value in plain.items():
        torch.testing.assert_close(fused[name], value, rtol=1e-4, atol=1e-5)
    assert any((plain[name] - value).abs().max() > 1e-3 for name, value in start.items())


def test_a_checkpoint_of_a_copy_is_of_the_step_at_which_it_was_made(loop: Loop) -> None:
    made = loop("copied", {})
    before = weights(made)
    write = made.engine.copied()
    weights(made)
    write(made.folder / "state")
    saved = torch.load(made.folder / "state" / "torch.pt", weights_only=True)
    assert all(torch.equal(saved["model"][name], before[name]) for name in before)
    assert {float(state["step"]) for state in saved["optimizer"]["state"].values()} == {3.0}


def test_what_a_background_checkpoint_raises_is_raised_by_the_training(
    loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    made = loop("full", {"background_checkpoints": True}, checkpoint_steps=2, log_steps=1)
    monkeypatch.setattr("ifguide.training.engines.torch.save", full)
    with pytest.raises(OSError, match=r"No space left|room"):
        made.run()
    assert made.step < 5
    assert not list((made.folder / "checkpoints").iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("fields", [GPT_NEOX, LLAMA], ids=lambda fields: fields["model_type"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_compiled_or_not_the_losses_are_the_same(fields: dict[str, Any], dtype: str, loop: Loop) -> None:
    options = {"log_steps": 1, "learning_rate": 1e-2, "warmup_fraction": 0.0}
    sizes = replace(SIZES, fields={**fields, "vocab_size": 320}, dtype=dtype)
    losses = {}
    for on in (True, False):
        made = loop(str(on), {"compiled_layers": on, "compiled_loss": on}, sizes, **options)
        losses[on] = [made._train_step()["loss"] for _ in range(4)]
    assert losses[True] == pytest.approx(losses[False], rel=1e-5 if dtype == "float32" else 1e-2)
    assert abs(losses[False][-1] - losses[False][0]) > 1e-3
