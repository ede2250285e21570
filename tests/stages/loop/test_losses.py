"""The training loop on one device, by the torch engine: what is learned, what is not, and what is told of it."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ifguide.artifacts import MANIFEST, PLAN, write_json
from ifguide.corpus.tables import document_table
from ifguide.folders import PENALISED
from ifguide.gauges import GAUGES
from ifguide.run import Run
from ifguide.stages import pretrain as pretrain_stage
from ifguide.stages.pretrain import pretrain
from ifguide.telemetry import METRICS, Sink, read_metrics
from ifguide.training.loop import LOOK_STEPS, SUMMARY, TrainingLoop
from tests.stages.conftest import ARCHITECTURE
from tests.stages.loop.conftest import STEPS, column, digest
from tests.stages.packed import BLOCK_SIZE, packed_run, settings_of
from tests.stages.packed import BLOCKS as BLOCKS_MADE


@pytest.fixture(scope="module")
def ignored(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained with masked tokens left out of the loss."""
    folder = tmp_path_factory.mktemp("ignored")
    TrainingLoop(settings_of(run, folder, objective={"kind": "ignore"}), rank=0, world_size=1).run()
    return folder


@pytest.mark.parametrize("kind", ["penalty", "clipped", "unlikelihood"])
def test_every_objective_learns_the_benign_tokens_and_unlearns_the_masked(
    kind: str, train: Callable[..., Path], ignored: Path
) -> None:
    folder = train(kind, objective={"kind": kind, "floor_probability": 1e-3})
    benign, masked = column(folder, "loss_benign"), column(folder, "loss_masked")
    assert len(benign) == STEPS
    assert benign[-1] < benign[0] - 1
    assert masked[-1] > column(ignored, "loss_masked")[-1] + (0 if kind == "unlikelihood" else 0.05)


def test_ignored_tokens_are_in_the_count_alone(ignored: Path) -> None:
    rows = read_metrics(ignored / METRICS)
    assert all(0.7 < row["loss"] / row["loss_benign"] < 1 for row in rows)
    assert rows[-1]["loss_benign"] < rows[0]["loss_benign"] - 1


def test_a_training_that_diverges_stops_early_with_advice_and_stays_stopped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any token is masked half of the time, at an unbounded penalty of 3: on the whole, every token is unlearned."""
    monkeypatch.setattr(logging.getLogger("ifguide"), "propagate", True)
    options = {"engine": "torch", "epochs": 2, "checkpoint_steps": 7, "penalty": 3.0, "max_benign_rise": 0.2}
    options |= {"objective": {"kind": "penalty"}}
    diverging = packed_run(tmp_path, options, architecture=ARCHITECTURE, masked_share=0.5)
    manifest = pretrain(diverging)
    assert manifest.rows["steps"] == LOOK_STEPS < 2 * STEPS
    assert manifest.summary["stopped_early"] > 0.2
    assert manifest.summary["exported_step"] == manifest.rows["steps"]
    shown = [record for record in caplog.records if record.name == "ifguide" and record.levelno == logging.WARNING]
    (warning,) = {record.getMessage() for record in shown}  # another test may have left its handler
    assert "the benign loss rose by" in warning
    assert "lower pretrain.penalty" in warning
    folder = diverging.model(PENALISED)
    weights = digest(folder)
    (folder / MANIFEST).unlink()
    (folder / SUMMARY).unlink()
    write_json(folder / PLAN, {"verb": "pretrain", "options": manifest.options, "inputs": manifest.inputs})
    again = pretrain(diverging)
    assert (digest(folder), again.rows, again.summary) == (weights, manifest.rows, manifest.summary)


@pytest.mark.parametrize(("log_steps", "checkpoint_steps"), [(1, 1), (3, 4), (1000, 1000)])
def test_where_a_training_stops_is_the_same_whatever_is_logged_and_saved(
    log_steps: int, checkpoint_steps: int, tmp_path: Path
) -> None:
    options = {"engine": "torch", "epochs": 2, "penalty": 3.0, "max_benign_rise": 0.2, "objective": {"kind": "penalty"}}
    options |= {"log_steps": log_steps, "checkpoint_steps": checkpoint_steps}
    run = packed_run(tmp_path, options, architecture=ARCHITECTURE, masked_share=0.5)
    rises: list[float] = []
    loop = TrainingLoop(settings_of(run, tmp_path / "model"), rank=0, world_size=1)
    step = loop._train_step

    def watched() -> dict[str, Any]:
        values = step()
        rises.append(loop.rise.value)
        return values

    loop._train_step = watched  # type: ignore[method-assign]
    loop.run()
    assert loop.step == len(rises) == LOOK_STEPS < loop.schedule.steps
    assert rises[-1] > 0.2
    if log_steps == 1:
        assert any(rise > 0.2 for rise in rises[:-1]), "it would have stopped before"
    assert [row["step"] for row in read_metrics(tmp_path / "model" / METRICS)][-1] == LOOK_STEPS


def test_every_figure_of_a_training_has_a_gauge(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[dict[str, Any]] = []

    @contextlib.contextmanager
    def sinks(verb: str, folder: Path) -> Iterator[tuple[Sink, ...]]:
        yield (shown.append,)

    monkeypatch.setattr(pretrain_stage, "ray_metrics", sinks)
    pretrain_stage._train(settings_of(run, tmp_path / "shown"), run.config.cluster)
    rows = read_metrics(tmp_path / "shown" / METRICS)
    assert [values["done"] for values in shown] == [row["step"] for row in rows]
    assert {values["total"] for values in shown} == {STEPS}
    assert rows[-1].keys() - {"step", "steps"} <= {gauge.name for gauge in GAUGES}
    assert {name: shown[-1][name] for name in rows[-1]} == rows[-1]


def test_heldout_blocks_are_not_trained_on_and_their_loss_is_of_all_their_tokens(
    train: Callable[..., Path], run: Run
) -> None:
    seen: set[int] = set()

    def before(loop: TrainingLoop, step: int) -> None:
        seen.update(loop.trained[loop.schedule.batch(step)[loop.schedule.batch(step) >= 0]].tolist())

    folder = train("heldout", before=before)
    loop = TrainingLoop(settings_of(run, folder), rank=0, world_size=1)
    assert len(seen) == len(loop.trained) == 160
    assert seen.isdisjoint(loop.heldout.tolist())
    tokens, lengths, *_ = loop.blocks.take(loop.heldout)
    with torch.no_grad():
        logits = loop.engine.module.model.eval()(input_ids=torch.from_numpy(tokens)).logits
    nll = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), torch.from_numpy(tokens[:, 1:]).flatten(), reduction="none"
    ).view(len(tokens), -1)
    counted = torch.arange(1, tokens.shape[1]) < torch.from_numpy(lengths)[:, None]
    assert read_metrics(folder / METRICS)[-1]["loss_heldout"] == pytest.approx(nll[counted].mean().item(), rel=1e-5)


def test_activation_checkpointing_changes_no_loss(train: Callable[..., Path]) -> None:
    plain, again = train("plain", epochs=0.3), train("again", epochs=0.3, activation_checkpointing=True)
    assert column(again, "loss") == pytest.approx(column(plain, "loss"), rel=1e-5)


def test_with_documents_apart_only_tokens_that_follow_one_of_their_document_are_learned(
    train: Callable[..., Path], run: Run
) -> None:
    loops: list[TrainingLoop] = []
    folder = train("apart", document_attention=True, before=lambda loop, step: loops.append(loop))
    blocks = loops[0].blocks
    starts = document_table(run.corpus).column("token_start").to_numpy()
    assert blocks.starts.tolist() == starts.tolist()
    inside = starts[(starts % BLOCK_SIZE > 0) & (starts < BLOCK_SIZE * (BLOCKS_MADE - 1) + BLOCK_SIZE // 2)]
    whole = (BLOCKS_MADE - 1) * (BLOCK_SIZE - 1) + BLOCK_SIZE // 2 - 1
    assert blocks.predicted_tokens(np.arange(BLOCKS_MADE)) == whole - len(inside)
    apart, together = column(folder, "loss_benign"), column(train("together"), "loss_benign")
    assert apart[-1] < apart[0] - 1
    assert apart != together


def test_bfloat16_follows_float32(train: Callable[..., Path]) -> None:
    half, plain = train("half", dtype="bfloat16"), train("plain")
    assert column(half, "loss") != column(plain, "loss")
    assert column(half, "loss_benign") == pytest.approx(column(plain, "loss_benign"), rel=0.02)
    assert all(weight.dtype == torch.float32 for weight in load_file(half / "hf" / "model.safetensors").values())
