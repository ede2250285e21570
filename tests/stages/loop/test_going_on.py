"""The training loop on one device, by the torch engine: going on bit for bit, what is kept and exported."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from ifguide import interrupts
from ifguide.artifacts import read_sealed
from ifguide.run import Run
from ifguide.stages import pretrain as pretrain_stage
from ifguide.telemetry import METRICS
from ifguide.training import model
from ifguide.training.blocks import BLOCKS
from ifguide.training.checkpoints import CHECKPOINTS, last_checkpoint, part_folder, published_checkpoints
from ifguide.training.choices import Compiled, read_choices
from ifguide.training.folder import STOP
from ifguide.training.loop import SUMMARY, TrainingLoop
from tests.stages.loop.conftest import Killed, Options, column, digest, flip_a_bit, kill_at
from tests.stages.packed import settings_of


def test_with_dropout_a_resumed_training_is_the_uninterrupted_one(train: Callable[..., Path]) -> None:
    architecture = {"hidden_dropout": 0.1, "attention_dropout": 0.1}
    whole = train("whole", architecture=architecture)
    with pytest.raises(Killed):
        train("resumed", architecture=architecture, before=kill_at(5))
    resumed = train("resumed", architecture=architecture)
    assert column(resumed, "loss") == column(whole, "loss") != column(train("plain"), "loss")
    assert digest(resumed) == digest(whole)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_compiled_training_goes_on_bit_for_bit(dtype: str, train: Callable[..., Path]) -> None:
    """With dropout and documents apart, so that what is random and what is masked is in the compiled graphs."""
    options: Options = {"dtype": dtype, "document_attention": True, "architecture": {"attention_dropout": 0.1}}
    options |= {"acceleration": {"compiled_layers": True, "compiled_loss": True}}
    whole = train("whole", **options)
    with pytest.raises(Killed):
        train("resumed", before=kill_at(5), **options)
    resumed = train("resumed", **options)
    assert column(resumed, "loss") == column(whole, "loss")
    assert digest(resumed) == digest(whole)
    plain = train("plain", **options | {"acceleration": {}, "architecture": {"attention_dropout": 0.0}})
    assert column(resumed, "loss")[-1] == pytest.approx(column(plain, "loss")[-1], rel=0.1)


def test_a_torn_checkpoint_is_not_loaded(train: Callable[..., Path]) -> None:
    whole = train("whole")
    with pytest.raises(Killed):
        train("torn", before=kill_at(7), keep_last=2)
    folder = Path(whole.parent / "torn")
    last = last_checkpoint(folder)
    assert last.step == 6
    state = last.state / "torch.pt"
    state.write_bytes(state.read_bytes()[:-1])
    part = part_folder(folder, 8)
    part.mkdir()
    (part / "half").write_text("torn")
    (folder / METRICS).open("a").write('{"step": 7, "lo')
    begun: list[int] = []
    train("torn", before=lambda loop, step: begun.append(step), keep_last=2)
    assert begun == [4, 5, 6, 7, 8, 9]
    assert digest(folder) == digest(whole)
    assert column(folder, "loss") == column(whole, "loss")
    assert not [path for path in (folder / CHECKPOINTS).iterdir() if path.suffix]


def test_a_checkpoint_with_a_flipped_bit_is_passed_over(train: Callable[..., Path]) -> None:
    whole = train("whole")
    with pytest.raises(Killed):
        train("flipped", before=kill_at(7), keep_last=2)
    folder = whole.parent / "flipped"
    flip_a_bit(last_checkpoint(folder).state / "torch.pt")
    begun: list[int] = []
    train("flipped", before=lambda loop, step: begun.append(step), keep_last=2)
    assert begun == [4, 5, 6, 7, 8, 9]
    assert digest(folder) == digest(whole)


def test_what_was_flattened_is_made_again_when_it_has_changed(train: Callable[..., Path]) -> None:
    whole = train("whole")
    with pytest.raises(Killed):
        train("flipped", before=kill_at(7))
    folder = whole.parent / "flipped"
    for name in ("tokens.npy", "masked.npy"):
        flip_a_bit(folder / BLOCKS / name)
    train("flipped")
    assert digest(folder) == digest(whole)


METRICS_DAMAGES: dict[str, Callable[[Path], object]] = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "no text": lambda path: path.write_bytes(b"\xff\x00" * 20),
}


@pytest.mark.parametrize("damage", METRICS_DAMAGES)
def test_a_finished_training_needs_no_metrics_to_be_exported(damage: str, train: Callable[..., Path]) -> None:
    folder = train("whole")
    summary = read_sealed(folder / SUMMARY)
    weights = digest(folder)
    (folder / SUMMARY).unlink()
    shutil.rmtree(folder / "hf")
    METRICS_DAMAGES[damage](folder / METRICS)
    train("whole")
    assert read_sealed(folder / SUMMARY) == summary
    assert digest(folder) == weights


def test_the_best_checkpoint_is_kept_and_exported(train: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    losses = iter([3.0, 1.5, 2.0, 1.7, 1.6])
    monkeypatch.setattr(TrainingLoop, "_heldout_loss", lambda loop: next(losses))
    folder = train("best", export="best", keep_last=2)
    assert [(found.step, found.heldout) for found in published_checkpoints(folder)] == [(4, 1.5), (8, 1.7), (10, 1.6)]
    best = torch.load(published_checkpoints(folder)[0].state / "torch.pt", weights_only=True)["model"]
    exported = AutoModelForCausalLM.from_pretrained(folder / "hf").state_dict()
    assert all(torch.equal(exported[name], best[name]) for name in best)
    last = torch.load(last_checkpoint(folder).state / "torch.pt", weights_only=True)["model"]
    assert any(not torch.equal(exported[name], last[name]) for name in last)


def test_weights_that_are_no_numbers_never_replace_a_checkpoint(train: Callable[..., Path], tmp_path: Path) -> None:
    def before(loop: TrainingLoop, step: int) -> None:
        if step == 5:
            loop.engine.end_step = lambda: float("nan")  # type: ignore[method-assign]

    with pytest.raises(FloatingPointError, match=r"norm nan at step 6; lower pretrain\.learning_rate"):
        train("nan", before=before)
    assert last_checkpoint(tmp_path / "nan").step == 4


def test_a_resumed_training_goes_on_by_the_choices_that_it_began_with(
    train: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Killed):
        train("chosen", before=kill_at(5))
    begun = read_choices(tmp_path / "chosen")
    assert begun is not None
    assert (begun.layers, begun.attention) == ((False, "on a CPU the time of float32 goes to the products"), "sdpa")
    monkeypatch.setattr(model, "compiles", lambda wanted, **_: Compiled(bool(wanted), "here it would be"))
    train("chosen", before=kill_at(99))
    assert read_choices(tmp_path / "chosen") == begun
    replace(begun, loss=Compiled(True, "it paid")).write(tmp_path / "other")
    asked: list[bool | None] = []
    monkeypatch.setattr(model, "compiles", lambda wanted, **_: asked.append(wanted) or Compiled(False, ""))
    with pytest.raises(Killed):
        train("other", before=kill_at(5))
    assert asked == [None, None]  # nothing was saved: it begins anew
    replace(begun, loss=Compiled(True, "it paid")).write(tmp_path / "other")
    with pytest.raises(Killed):
        train("other", before=kill_at(4))
    assert asked[2:] == [False, True]


def test_the_driver_writes_its_word_into_a_file_that_is_there_from_the_start(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, seen = settings_of(run, tmp_path), []

    class Trainer:
        def fit(self) -> None:
            stop = tmp_path / STOP
            file = stop.stat().st_ino
            seen.append(stop.read_text())
            monkeypatch.setattr(interrupts, "requested", lambda: True)
            while not stop.read_text():
                time.sleep(0.01)
            seen.append(stop.stat().st_ino == file)

    monkeypatch.setattr(pretrain_stage, "require_resources", lambda *_: None)
    monkeypatch.setattr(pretrain_stage, "is_fixed", lambda _: True)
    monkeypatch.setattr(pretrain_stage, "_trainer", lambda *_, **__: Trainer())
    with pytest.raises(interrupts.Interrupted):
        pretrain_stage._train_on_ray(settings, run.config.cluster)
    assert seen == ["", True]
    assert not (tmp_path / STOP).exists()
