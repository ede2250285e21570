"""A training killed anywhere goes on to the same weights: ranks, whole nodes, drivers; on as many workers or others."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import torch
import yaml
from ray.exceptions import ActorDiedError
from ray.train import ControllerError, TrainingFailedError
from safetensors.torch import load_file

from ifguide.artifacts import file_digest
from ifguide.config import ConfigError, to_mapping
from ifguide.distributed.shards import StageError
from ifguide.run import Run
from ifguide.stages import pretrain as pretrain_stage
from ifguide.stages.pretrain import FAILURE, pretrain
from ifguide.telemetry import read_metrics
from ifguide.training.checkpoints import last_checkpoint
from ifguide.training.folder import METRICS
from ifguide.training.loop import SUMMARY, TrainingLoop
from ifguide.training.settings import TrainingSettings
from tests import forked
from tests.prefork import holds
from tests.stages.conftest import ARCHITECTURE, own_environment
from tests.stages.packed import packed_run, settings_of
from tests.stages.ranks import PLACES, Kill, run_ranks

Settings = TrainingSettings
STEPS, SAVED_EVERY = 10, 2
FIGURES = ("loss", "loss_benign", "loss_masked", "gradient_norm", "benign_rise", "learning_rate", "loss_heldout")
# ZeRO-3 parts a weight and frees it between uses from 100,000 elements on: here, the embeddings and the head.
PARTED = {**ARCHITECTURE, "vocab_size": 4096}
DROPOUT = {"hidden_dropout": 0.1, "attention_dropout": 0.1}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """160 blocks to train on: ten steps an epoch. Weight decay is so strong that losses tell which weights have it."""
    options = {"epochs": 1, "heldout_blocks": 8, "checkpoint_steps": SAVED_EVERY, "weight_decay": 0.5}
    return packed_run(tmp_path_factory.mktemp("packed"), options, architecture=PARTED)


@pytest.fixture
def settings(run: Run, tmp_path: Path) -> Callable[..., Settings]:
    """What a rank is given, by the name of a folder and the changed options."""
    return lambda name, **changes: settings_of(run, tmp_path / name, **changes)


@pytest.fixture(scope="module")
def undisturbed(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """Trained by the torch engine, in this process."""
    made = settings_of(run, tmp_path_factory.mktemp("torch") / "undisturbed", engine="torch", workers=1)
    TrainingLoop(made, rank=0, world_size=1).run()
    return made


def rows(made: Settings) -> list[dict[str, Any]]:
    """The rows of all attempts; of one that is being written, those that are whole."""
    path = Path(made.folder) / METRICS
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]] if path.exists() else []


def figures(made: Settings, steps: int = STEPS) -> dict[int, dict[str, Any]]:
    """Step -> figures of the whole training."""
    found = read_metrics(Path(made.folder) / METRICS)
    assert [row["step"] for row in found] == list(range(1, steps + 1))
    return {row["step"]: {name: row.get(name) for name in FIGURES} for row in found}


def model_file(made: Settings) -> Path:
    return Path(made.folder) / "hf" / "model.safetensors"


def require_same_bits(found: Settings, reference: Settings, *, steps: int = STEPS) -> None:
    """Every row of every attempt is the reference's row of that step, and so are the weights."""
    expected = figures(reference, steps)
    assert figures(found, steps) == expected
    for row in rows(found):
        assert {name: row.get(name) for name in FIGURES} == expected[row["step"]], row["step"]
    assert file_digest(model_file(found)) == file_digest(model_file(reference))


def require_close(found: Settings, reference: Settings, tolerance: float, *, steps: int = STEPS) -> None:
    """Losses of every step within `tolerance`, relative."""
    expected = figures(reference, steps)
    for step, values in figures(found, steps).items():
        for name in ("loss", "loss_benign", "loss_masked", "loss_heldout"):
            if values[name] is not None or expected[step][name] is not None:  # held-out: only with a checkpoint
                assert values[name] == pytest.approx(expected[step][name], rel=tolerance), (step, name)


def draw_kill(rng: random.Random, first: int, last: int, *, world_size: int) -> Kill:
    """A kill while one of the steps that follow first, ..., last is taken or saved."""
    place = rng.choice(PLACES)
    rank = rng.choice([None, 0] if place == "publish" else [None, *range(world_size)])
    return Kill(step=rng.randint(first, last), place=place, rank=rank)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_killed_ranks_go_on_bit_for_bit_on_as_many_workers(stage: int, settings: Callable[..., Settings]) -> None:
    """Two kills at places drawn by seed, with dropout: what is random comes from the step's number."""
    rng = random.Random(stage)
    options: dict[str, Any] = {"zero_stage": stage, "workers": 2, "architecture": DROPOUT}
    reference, killed = settings("reference", **options), settings("killed", **options)
    run_ranks(reference, 2)
    run_ranks(killed, 2, draw_kill(rng, 1, 4, world_size=2))
    run_ranks(killed, 2, draw_kill(rng, 5, 7, world_size=2))
    run_ranks(killed, 2)
    require_same_bits(killed, reference)


@pytest.mark.slow
def test_compiled_by_deepspeed_the_losses_are_the_same(settings: Callable[..., Settings]) -> None:
    options: dict[str, Any] = {"zero_stage": 1, "workers": 1}
    plain = settings("plain", **options)
    compiled = settings("compiled", **options, acceleration={"deepspeed_compile": True})
    for made in (plain, compiled):
        run_ranks(made, 1)
    require_close(compiled, plain, 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_killed_ranks_go_on_with_the_same_losses_on_another_number_of_workers(
    stage: int, settings: Callable[..., Settings], undisturbed: Settings
) -> None:
    """1 -> 2 -> 1 workers, a kill between them; at stages 1 and 2 against the other engine, plain torch."""
    rng = random.Random(10 + stage)
    reference, killed = undisturbed, settings("killed", zero_stage=stage)
    if stage == 3:  # draws other initial weights
        reference = settings("reference", zero_stage=3)
        run_ranks(reference, 1)
    run_ranks(killed, 1, draw_kill(rng, 2, 4, world_size=1))
    assert last_checkpoint(Path(killed.folder)).world_size == 1
    run_ranks(killed, 2, replace(draw_kill(rng, 8, 8, world_size=2), place=rng.choice(["step", "backward", "save"])))
    assert last_checkpoint(Path(killed.folder)).world_size == 2
    run_ranks(killed, 1)
    require_close(killed, reference, 1e-4)


def test_partitioned_weights_start_as_the_family_draws_them_and_decay(settings: Callable[..., Settings]) -> None:
    """DeepSpeed's own `zero.Init` around a constructor would leave embeddings of standard deviation 1."""
    made = settings("initial", zero_stage=3, learning_rate=1e-12, weight_decay=0.0, epochs=0.1)
    run_ranks(made, 1)
    for name, weight in load_file(model_file(made)).items():
        if weight.ndim == 2:
            assert weight.std().item() == pytest.approx(0.02, rel=0.1), name
        else:
            assert torch.allclose(weight, torch.full_like(weight, float("norm" in name and "weight" in name))), name
    decayed = settings("decayed", zero_stage=3, learning_rate=1e-12, weight_decay=1e11, epochs=0.1)
    run_ranks(decayed, 1)  # one step, which takes a tenth of a matrix and nothing of a vector
    plain = load_file(model_file(made))
    for name, weight in load_file(model_file(decayed)).items():
        torch.testing.assert_close(weight, plain[name] * (0.9 if weight.ndim == 2 else 1.0))


@pytest.mark.parametrize("stage", [0, 1])
def test_bfloat16_goes_on_bit_for_bit_and_is_exported_in_float32(
    stage: int, settings: Callable[..., Settings], undisturbed: Settings
) -> None:
    options: dict[str, Any] = {"zero_stage": stage, "dtype": "bfloat16"}
    reference, killed = settings("reference", **options), settings("killed", **options)
    run_ranks(reference, 1)
    run_ranks(killed, 1, draw_kill(random.Random(20 + stage), 2, 6, world_size=1))
    run_ranks(killed, 1)
    require_same_bits(killed, reference)
    require_close(killed, undisturbed, 0.05)
    exported = load_file(model_file(killed))
    matrices = [weight for weight in exported.values() if weight.ndim == 2]
    assert all(weight.dtype == torch.float32 for weight in exported.values())
    assert all((weight != weight.bfloat16()).any() for weight in matrices)


def test_in_bfloat16_a_step_without_zero_is_that_of_stage_1(settings: Callable[..., Settings]) -> None:
    """From the first on: DeepSpeed takes one on gradients of zero as it starts, which would decay the weights."""
    options: dict[str, Any] = {"dtype": "bfloat16", "epochs": 0.4}
    without, parted = (settings(f"stage-{stage}", zero_stage=stage, **options) for stage in (0, 1))
    for made in (without, parted):
        run_ranks(made, 1)
    require_close(without, parted, 2e-3, steps=4)


def ray_workers() -> list[psutil.Process]:
    """Processes of the ranks that Ray Train started on this process' own cluster: they write into its logs."""
    logs, found = ray._private.worker._global_node.get_logs_dir_path(), []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess):
            if "RayTrainWorker" in "".join(process.cmdline()[:1]) and any(
                file.path.startswith(logs) for file in process.open_files()
            ):
                found.append(process)
    return found


@pytest.mark.slow
def test_ray_train_starts_a_killed_rank_again(
    run: Run, cluster: None, settings: Callable[..., Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole stage, a rank killed from outside: the losses and weights of ranks that nothing happened to."""
    options: dict[str, Any] = {"epochs": 6, "checkpoint_steps": 15, "workers": 2, "max_failures": 2}
    reference = settings("reference", **options)
    run_ranks(reference, 2)
    whole = Run(config=replace(run.config, pretrain=replace(run.config.pretrain, **options)))
    made = replace(reference, folder=str(whole.model("penalised")))
    train_loop, killed = pretrain_stage.train_loop, tmp_path / "killed"

    def held(given: dict[str, Settings]) -> None:
        """Between two checkpoints rank 0 waits to see the kill, and the other rank for it."""
        holds.hold_steps(TrainingLoop, [20], killed.exists)
        train_loop(given)

    def kill() -> None:
        try:
            while not any(row["step"] == 20 for row in rows(made)) and not ended.is_set():
                time.sleep(0.01)
            random.Random(0).choice(ray_workers()).kill()
        finally:
            killed.touch()

    monkeypatch.setattr(pretrain_stage, "train_loop", held)
    killer, ended = threading.Thread(target=kill), threading.Event()
    killer.start()
    try:
        manifest = pretrain(whole)
    finally:
        ended.set()
        killer.join()
    assert manifest.rows["steps"] == 60
    assert len(rows(made)) == 65, "it was not killed after step 20, between two checkpoints"
    require_same_bits(made, reference, steps=60)


@pytest.mark.slow
def test_what_a_restart_cannot_mend_is_said_once(run: Run, cluster: None, tmp_path: Path) -> None:
    """The second step's loss is no number, whichever attempt takes it."""
    run_dir = tmp_path / "run"
    shutil.copytree(run.folder, run_dir, ignore=shutil.ignore_patterns("model"))
    changed = replace(run.config.pretrain, learning_rate=1e30, heldout_blocks=0)
    diverging = Run(config=replace(run.config, run_dir=str(run_dir), pretrain=changed))
    with pytest.raises(StageError, match=r"^the loss is .* at step 2; lower pretrain\.learning_rate"):
        pretrain(diverging)
    folder = diverging.model("penalised")
    assert [row["step"] for row in read_metrics(folder / METRICS)] == [1]
    assert not (folder / FAILURE).exists()


def test_what_a_rank_wrote_down_is_said_whatever_ray_met_in_ending_the_others(
    run: Run, cluster: None, settings: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = settings("failing", epochs=1)
    folder = Path(failing.folder)
    folder.mkdir(parents=True, exist_ok=True)

    def fit(trainer: Any, folder: Path) -> None:
        (folder / FAILURE).write_text("the loss is nan at step 2")
        raise TrainingFailedError("the actor died")

    monkeypatch.setattr(pretrain_stage, "_trainer", lambda settings, **_: None)
    monkeypatch.setattr(pretrain_stage, "_fit", fit)
    with pytest.raises(StageError, match=r"^the loss is nan at step 2$"):
        pretrain_stage._train_on_ray(failing, run.config.cluster)
    assert not (folder / FAILURE).exists()


def test_a_worker_that_is_lost_while_ray_starts_it_costs_a_start(
    run: Run, cluster: None, settings: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    losing = settings("losing", epochs=1)
    folder, starts = Path(losing.folder), []
    folder.mkdir(parents=True, exist_ok=True)

    def fit(trainer: Any, folder: Path) -> None:
        starts.append(trainer)
        if len(starts) <= losing.train.max_failures:
            raise ControllerError(ActorDiedError())
        (folder / SUMMARY).write_text("{}")

    monkeypatch.setattr(pretrain_stage, "_trainer", lambda settings, **_: None)
    monkeypatch.setattr(pretrain_stage, "_fit", fit)
    pretrain_stage._train_on_ray(losing, run.config.cluster)
    assert len(starts) == losing.train.max_failures + 1 > 1


@pytest.mark.parametrize(("failure", "again"), [(ActorDiedError(), True), (OSError("no space"), False)])
def test_what_ray_ends_a_training_for_is_said_at_once_or_after_the_last_start(
    run: Run,
    cluster: None,
    settings: Callable[..., Settings],
    monkeypatch: pytest.MonkeyPatch,
    failure: Exception,
    again: bool,
) -> None:
    failing, starts = settings("failing_in_ray", epochs=1), []
    Path(failing.folder).mkdir()  # as of an artifact that is being made

    def fit(trainer: Any, folder: Path) -> None:
        starts.append(trainer)
        raise ControllerError(failure)

    monkeypatch.setattr(pretrain_stage, "_trainer", lambda settings, **_: None)
    monkeypatch.setattr(pretrain_stage, "_fit", fit)
    with pytest.raises(StageError, match=r"^Training failed due to controller error"):
        pretrain_stage._train_on_ray(failing, run.config.cluster)
    assert len(starts) == (failing.train.max_failures + 1 if again else 1)


def test_workers_that_the_machine_cannot_hold_are_refused(run: Run, cluster: None, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(run.folder, run_dir, ignore=shutil.ignore_patterns("model"))
    many = replace(run.config.pretrain, workers=4)
    with pytest.raises(ConfigError, match=r"^pretrain\.resources.cpus: "):
        pretrain(Run(config=replace(run.config, run_dir=str(run_dir), pretrain=many)))


@pytest.mark.slow
def test_a_killed_driver_goes_on_on_the_one_cpu_that_is_left(
    run: Run, settings: Callable[..., Settings], tmp_path: Path
) -> None:
    """`ifguide pretrain` twice: two workers, killed with all that it started, then one, by `min_workers`."""
    options: dict[str, Any] = {"epochs": 6, "checkpoint_steps": 15, "workers": 2, "min_workers": 1}
    reference = settings("reference", engine="torch", epochs=6, checkpoint_steps=15, workers=1)
    TrainingLoop(reference, rank=0, world_size=1).run()
    run_dir = tmp_path / "run"
    shutil.copytree(run.folder, run_dir, ignore=shutil.ignore_patterns("model"))
    tree = to_mapping(run.config) | {"run_dir": str(run_dir)}
    tree["pretrain"] |= options
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    command = [sys.executable, "-m", "ifguide.cli", "pretrain", "--config", str(tmp_path / "config.yaml")]
    environment = own_environment()
    made = replace(reference, folder=str(run_dir / "model" / "penalised"))
    process = forked.Popen(command, start_new_session=True, env={**environment, holds.STEPS: "20"})
    while not any(row["step"] == 20 for row in rows(made)) and process.poll() is None:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    checkpoint = last_checkpoint(Path(made.folder))
    assert (checkpoint.world_size, checkpoint.step) == (2, 15)
    forked.run([*command, "--set", "cluster.num_cpus=1"], check=True, env=environment)
    assert last_checkpoint(Path(made.folder)).world_size == 1
    require_close(made, reference, 1e-3, steps=60)
