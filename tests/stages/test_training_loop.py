"""The training loop on one device, by the torch engine: objectives, early stop, what is kept and exported."""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ray.train import ControllerError, WorkerGroupError
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from ifguide.artifacts import MANIFEST, PLAN, file_digest, read_manifest, read_sealed, write_json
from ifguide.config import ModelSource, config_from_mapping, to_mapping
from ifguide.corpus.tables import document_table
from ifguide.distributed.shards import StageError
from ifguide.gauges import GAUGES
from ifguide.models import load_model
from ifguide.run import PENALISED, Run
from ifguide.stages import pretrain as pretrain_stage
from ifguide.stages.pretrain import _reason, pretrain
from ifguide.telemetry import METRICS, Sink, read_metrics
from ifguide.training import loop as training_loop
from ifguide.training.blocks import BLOCKS
from ifguide.training.checkpoints import CHECKPOINTS, last_checkpoint, part_folder, published_checkpoints
from ifguide.training.engines import TorchEngine
from ifguide.training.loop import SUMMARY, TrainingLoop
from tests.stages.conftest import ARCHITECTURE
from tests.stages.packed import BLOCK_SIZE, packed_run, settings_of
from tests.stages.packed import BLOCKS as BLOCKS_MADE

STEPS = 10
Options = dict[str, Any]


class Killed(Exception):
    pass


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    options = {"engine": "torch", "epochs": 1, "heldout_blocks": 8, "checkpoint_steps": 2, "weight_decay": 0.0}
    options |= {"acceleration": {"background_checkpoints": True}}  # without is tests/stages/test_resume.py's
    return packed_run(tmp_path_factory.mktemp("packed"), options, architecture=ARCHITECTURE)


@pytest.fixture
def train(run: Run, tmp_path: Path) -> Callable[..., Path]:
    """Train into a folder by name, from its last checkpoint; `before` is called with the loop and each step."""

    def go(name: str, *, before: Callable[[TrainingLoop, int], None] | None = None, **changes: Any) -> Path:
        loop = TrainingLoop(settings_of(run, tmp_path / name, **changes), rank=0, world_size=1)
        if before is not None:
            step = loop._train_step

            def watched() -> dict[str, Any]:
                before(loop, loop.step)
                return step()

            loop._train_step = watched  # type: ignore[method-assign]
        loop.run()
        return tmp_path / name

    return go


def kill_at(step: int) -> Callable[[TrainingLoop, int], None]:
    def before(loop: TrainingLoop, now: int) -> None:
        if now == step:
            raise Killed

    return before


def column(folder: Path, name: str) -> list[float]:
    return [row[name] for row in read_metrics(folder / METRICS)]


def digest(folder: Path) -> str:
    return file_digest(folder / "hf" / "model.safetensors")


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
    assert 1 < manifest.rows["steps"] < 2 * STEPS
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


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


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


@pytest.mark.parametrize("name", ["corpus", "mask"])
def test_a_changed_corpus_or_mask_is_not_trained_on(name: str, run: Run, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run.folder, copy, ignore=shutil.ignore_patterns("model"))
    damaged = copy / name / "shard-00001.parquet"
    flip_a_bit(damaged)
    with pytest.raises(ValueError, match=rf"{name}/shard-00001\.parquet has changed since it was made"):
        pretrain(Run(config=replace(run.config, run_dir=str(copy))))
    assert not list(copy.glob("model/*/hf"))


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


def test_weights_that_are_no_numbers_never_replace_a_checkpoint(train: Callable[..., Path], tmp_path: Path) -> None:
    def before(loop: TrainingLoop, step: int) -> None:
        if step == 5:
            loop.engine.end_step = lambda: float("nan")  # type: ignore[method-assign]

    with pytest.raises(FloatingPointError, match=r"norm nan at step 6; lower pretrain\.learning_rate"):
        train("nan", before=before)
    assert last_checkpoint(tmp_path / "nan").step == 4


def test_a_training_that_diverges_at_once_ends_in_its_advice_alone(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TorchEngine, "end_step", lambda engine: float("nan"))
    lent = {"corpus": run.corpus, "mask": run.mask}
    with pytest.raises(StageError, match=r"^the loss is .* norm nan at step 1; lower pretrain\.learning_rate"):
        pretrain(Run(config=replace(run.config, run_dir=str(tmp_path)), lent=lent))


def test_of_several_failed_workers_the_one_that_says_what_to_do_is_heard() -> None:
    lost, advice = RuntimeError("Connection closed by peer"), FloatingPointError("the loss is nan; lower it")
    assert _reason(WorkerGroupError("...", {1: advice, 0: lost})) == "the loss is nan; lower it"
    assert _reason(WorkerGroupError("...", {1: lost, 0: lost})) == "worker 0: RuntimeError: Connection closed by peer"
    assert "no worker" in _reason(ControllerError(RuntimeError("no worker")))


@pytest.mark.parametrize(
    ("options", "positions", "message"),
    [
        ({"heldout_blocks": 168}, 32, r"pretrain\.heldout_blocks: 168 of the corpus' 168 blocks"),
        ({}, 31, r"pack_corpus\.block_size: 32 tokens are more than the 31 positions of target\.architecture"),
        ({"init_from": "short"}, 32, r"pack_corpus\.block_size: 32 tokens are more than the 16 positions of .*short"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_any_worker_starts(
    options: Options, positions: int, message: str, run: Run, tmp_path: Path
) -> None:
    fields = {**ARCHITECTURE, "max_position_embeddings": 16}
    AutoConfig.for_model(**fields).save_pretrained(tmp_path / "short")
    tree = to_mapping(run.config) | {"run_dir": str(tmp_path / "run")}
    tree["pretrain"] |= {
        key: str(tmp_path / "short") if key == "init_from" else value for key, value in options.items()
    }
    tree["target"]["architecture"] |= {"max_position_embeddings": positions}
    lent = {"corpus": run.corpus, "mask": run.mask}
    with pytest.raises(ValueError, match=f"^{message}"):
        pretrain(Run(config=config_from_mapping(tree), lent=lent))
    assert not (tmp_path / "run").exists()


def test_a_model_that_zero_has_placed_is_left_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Moved to the CPU, its placeholders would stay there, for DeepSpeed does not move what it has parted."""
    moved: list[Any] = []
    to = torch.nn.Module.to

    def record(module: torch.nn.Module, device: Any) -> torch.nn.Module:
        moved.append(device)
        return to(module, device)

    source = ModelSource(architecture={**ARCHITECTURE, "vocab_size": 50})
    monkeypatch.setattr(torch.nn.Module, "to", record)
    load_model(source)
    assert moved == []
    assert load_model(source, device="meta").device.type == "meta"
    assert moved == ["meta"]


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


def test_workers_that_see_other_checkpoints_are_told_what_they_lack(
    train: Callable[..., Path], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gather(found: list[Any], own: Any) -> None:
        found[:] = [own, None]

    folder = train("seen", epochs=0.2)
    monkeypatch.setattr(training_loop.torch.distributed, "barrier", lambda: None)
    monkeypatch.setattr(training_loop.torch.distributed, "all_gather_object", gather)
    with pytest.raises(RuntimeError, match=r"of steps \[2, None\]: run_dir must lie on storage that all nodes mount"):
        TrainingLoop(settings_of(run, folder), rank=0, world_size=2)
    assert read_manifest(run.corpus).rows["blocks"] == 168
