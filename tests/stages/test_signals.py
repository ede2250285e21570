"""Ctrl-C and SIGTERM in the middle of a verb: the exit code, what is saved, no process left, and the next run."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from ifguide.artifacts import file_digest
from ifguide.config import Config, to_mapping
from ifguide.config.compare import Compare, Method
from ifguide.distributed.ledger import LEDGER
from ifguide.interrupts import GRACE
from ifguide.run import Run
from ifguide.stages.build_query import build_query
from ifguide.stages.compare import method_run
from ifguide.stages.evaluate import evaluate
from ifguide.stages.fit_factors import fit_factors
from ifguide.stages.pretrain import pretrain
from ifguide.stages.score_corpus import score_corpus
from ifguide.telemetry import METRICS, read_metrics
from ifguide.training.checkpoints import last_checkpoint
from tests import forked
from tests.prefork import holds
from tests.stages.conftest import ARCHITECTURE, own_environment
from tests.stages.packed import packed_run

CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}
GRACE_SECONDS = 100


def start(
    verb: str, config: dict[str, Any], folder: Path, program: Sequence[str] = ("-m", "ifguide.cli"), **environment: str
) -> forked.Popen:
    """Start a verb, with more time to save and to end in than any machine needs."""
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, *program, verb, "--config", str(folder / "config.yaml")]
    environment = {**own_environment(), GRACE: str(GRACE_SECONDS), **environment}
    return forked.Popen(command, env=environment, stderr=forked.PIPE, text=True)


def end(process: forked.Popen, number: signal.Signals, ready: Callable[[], bool]) -> str:
    """Send a signal when the verb is `ready`; its errors. It ends in its time, with the code, and leaves nobody."""
    while not ready() and process.poll() is None:
        time.sleep(0.02)
    assert process.poll() is None, process.communicate()[1]
    children = psutil.Process(process.pid).children(recursive=True)
    started = time.monotonic()
    process.send_signal(number)
    _, errors = process.communicate(timeout=150)
    assert time.monotonic() - started < GRACE_SECONDS, errors
    assert process.returncode == CODES[number], errors
    psutil.wait_procs(children, timeout=60)
    assert not [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]
    assert "the same command goes on from there" in errors
    return errors


def has_logged(metrics: Path, step: int) -> bool:
    return len(read_metrics(metrics)) >= step


def training(folder: Path, engine: str) -> Run:
    options = {"engine": engine, "epochs": 6, "checkpoint_steps": 1000, "heldout_blocks": 8}
    return packed_run(folder, options, architecture=ARCHITECTURE)


def interrupt(run: Run, folder: Path) -> None:
    """Train, and end it by each signal, while it is held: every time it goes on from the step that it has saved."""
    model = run.model("penalised")
    for number, held in zip(CODES, (20, 40), strict=True):
        process = start("pretrain", to_mapping(run.config), folder, **{holds.STEPS: "20,40"})
        errors = end(process, number, partial(has_logged, model / METRICS, held))
        checkpoint = last_checkpoint(model)
        assert checkpoint is not None, errors
        assert checkpoint.step == held + 1
        assert f"the checkpoint of step {checkpoint.step} is saved" in errors


@pytest.mark.slow
def test_a_training_saves_the_step_it_is_at_and_ends_as_if_nobody_had_ended_it(tmp_path: Path) -> None:
    whole, ended = (training(tmp_path / name, "torch") for name in ("whole", "ended"))
    interrupt(ended, tmp_path)
    for run in (ended, whole):
        assert pretrain(run) is not None
    weights = [file_digest(run.model("penalised") / "hf" / "model.safetensors") for run in (whole, ended)]
    assert weights[0] == weights[1]


@pytest.mark.slow
def test_a_training_under_deepspeed_does_too(tmp_path: Path) -> None:
    interrupt(training(tmp_path, "deepspeed"), tmp_path)


# The run is there, by an engine that trains one model at a time: it is not asked for again, nor looked at before.
COMPARE = """
import sys

from ifguide import cli, commands

commands.run_pipeline = lambda *arguments, **options: None
sys.exit(cli.main([*sys.argv[1:], "--no-preflight"]))
"""


@pytest.mark.slow
def test_trainings_side_by_side_save_the_steps_they_are_at(copied: Callable[..., Config], tmp_path: Path) -> None:
    config = copied()
    methods = {"first": Method(mask="influence"), "second": Method(mask="words"), "third": Method(mask="random")}
    config = replace(
        config,
        pretrain=replace(config.pretrain, engine="deepspeed", log_steps=1, checkpoint_steps=1000),
        compare=Compare(methods=methods, trainings=2),
    )
    run = Run(config=config)
    models = {name: method_run(run, name, method).model("penalised") for name, method in methods.items()}
    (tmp_path / "compare.py").write_text(COMPARE)
    process = start("compare", to_mapping(config), tmp_path, [str(tmp_path / "compare.py")], **{holds.STEPS: "3"})
    end(process, signal.SIGTERM, lambda: all(has_logged(models[name] / METRICS, 3) for name in ("first", "second")))
    steps = {name: checkpoint.step for name in methods if (checkpoint := last_checkpoint(models[name]))}
    assert steps == {"first": 4, "second": 4}  # the third had not begun


VERBS: dict[str, tuple[Callable[[Run], Any], tuple[str, ...]]] = {
    "fit_factors": (fit_factors, ("factors",)),
    "build_query": (build_query, ("query",)),
    "score_corpus": (score_corpus, ("scores", "ranking", "mask")),
    "evaluate": (evaluate, ("report", "generations")),
}


@pytest.mark.slow
@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_on_workers_ends_and_goes_on(verb: str, copied: Callable[..., Config], tmp_path: Path) -> None:
    stage, made = VERBS[verb]
    config = copied(drop=made)
    folder, attempts = Path(config.run_dir) / made[0], f"**/{LEDGER}/*.attempts"  # some passes have their own ledger
    for number in CODES:
        process = start(verb, to_mapping(config), tmp_path, **{holds.ATTEMPTS: "1"})
        end(process, number, lambda: bool(list(folder.glob(attempts))))
        for leftover in folder.glob(attempts):
            leftover.unlink()  # what the next one starts on is to be its own
    assert stage(Run(config=config)) is not None
