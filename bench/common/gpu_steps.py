"""The steps of `bench/gpu.py`: what each runs, and what it takes from what that prints or writes.

A step is a function of the session that returns its figures. Whatever it computes runs in a process of its own, so a
step that runs out of memory takes none with it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import yaml

from bench.common.gpu_config import data_of, pipeline_config
from ifguide.artifacts import MANIFEST, read_manifest
from ifguide.training.checkpoints import last_checkpoint

Figures = dict[str, Any]
NEEDED = ("torch", "transformers", "ray", "deepspeed", "triton", "trl", "alt-profanity-check", "tensorboard")
FURTHER = ("liger-kernel", "cut-cross-entropy")  # beside which our loss is measured, where they are there
SHAPES = {"160m": ("EleutherAI/pythia-160m", "pythia160m", 16), "1b": ("EleutherAI/pythia-1b", "llama1b", 4)}
TRAINING_FIGURES = (
    "mfu", "tokens_per_second", "mask_time_ratio", "syncs_per_step", "launches_per_step", "seconds", "megabytes",
    "peak_megabytes", "planned_megabytes",
)  # fmt: skip
# `ifguide` that ends itself with all that it has started, by kill -9, once its training has published a checkpoint
KILLED = """
import os, signal, sys
from ifguide.cli import main
from ifguide.training.folder import TrainingFolder

publish = TrainingFolder.publish_checkpoint

def publish_and_die(*arguments):
    publish(*arguments)
    os.killpg(os.getpid(), signal.SIGKILL)

TrainingFolder.publish_checkpoint = publish_and_die
sys.exit(main())
"""


@dataclass(frozen=True, kw_only=True)
class Session:
    """Where the steps work; `small`: at toy size on a CPU."""

    folder: Path
    small: bool

    def python(self, *arguments: str, log: str) -> str:
        """What a Python process prints; all it says is kept in `logs/LOG.txt`.

        Raises:
            RuntimeError: it failed; holds its last lines.
        """
        path = self.folder / "logs" / f"{log}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w") as errors:
            done = subprocess.run([sys.executable, *arguments], stdout=subprocess.PIPE, stderr=errors, text=True)
        with path.open("a") as kept:
            kept.write(done.stdout)
        if done.returncode:
            last = " | ".join(path.read_text(errors="replace").splitlines()[-3:])
            raise RuntimeError(f"{' '.join(arguments[:3])} ended with {done.returncode}: {last[-600:]} (all in {path})")
        return done.stdout

    @property
    def run_dir(self) -> Path:
        """Of the pipeline."""
        return self.folder / "run"

    def bench(self, name: str, *arguments: str, log: str) -> Figures:
        """The last line of a bench."""
        lines = self.python("-m", f"bench.{name}", *arguments, log=log).splitlines()
        figures: Figures = json.loads(lines[-1])
        return figures

    def verb(self, *arguments: str, config: Path, log: str) -> float:
        """Seconds of a command of `ifguide`."""
        started = time.monotonic()
        self.python("-m", "ifguide.cli", arguments[0], "--config", str(config), *arguments[1:], log=log)
        return round(time.monotonic() - started, 1)

    def config(self, run_dir: Path | None = None) -> Path:
        """The pipeline's config file, written for this run directory."""
        run_dir = run_dir or self.run_dir
        path = self.folder / f"{run_dir.name}.yaml"
        path.write_text(yaml.safe_dump(pipeline_config(self.folder / "data", run_dir, small=self.small)))
        return path


def machine(session: Session) -> Figures:
    """What there is, and what is lacking."""
    versions: dict[str, str | None] = {}
    for name in (*NEEDED, *FURTHER):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return {"device": device, "cores": os.cpu_count(), "versions": versions, "lacking": lacking(versions)}


def lacking(versions: dict[str, str | None]) -> list[str]:
    """Packages that are not there."""
    return [name for name, version in versions.items() if version is None]


def training(shape: str) -> Callable[[Session], Figures]:
    """Training steps at a shape: model FLOP of the peak, with and without mask, and memory."""

    def step(session: Session) -> Figures:
        hub, _, blocks = SHAPES[shape]
        options = ["--sides", "mask", "plain"]
        if session.small:
            options += ["--small", "--threads", "1"]
            options += [f"--set=acceleration.{name}=false" for name in ("compiled_layers", "compiled_loss")]
        else:
            options += ["--device", "cuda", "--dtype", "bfloat16", "--shape", hub, "--blocks", str(blocks)]
            options += ["--block-size", "2048", "--rounds", "10", "--warm-up", "4"]
        figures = session.bench("training_step", *options, log=f"training_{shape}")
        return {name: figures[name] for name in TRAINING_FIGURES}

    return step


def head_losses(session: Session) -> Figures:
    """The head and its loss at both shapes: ours, and those of libraries that are installed."""
    if session.small:
        return {"160m": session.bench("head_losses", "--small", log="head_losses")}
    figures = {}
    for shape, (hub, _, blocks) in SHAPES.items():
        options = ["--device", "cuda", "--shape", hub, "--tokens", str(2048 * blocks)]
        figures[shape] = session.bench("head_losses", *options, log=f"head_losses_{shape}")
    return figures


def scoring(shape: str) -> Callable[[Session], Figures]:
    """Tokens scored a second at a shape."""

    def step(session: Session) -> Figures:
        _, name, blocks = SHAPES[shape]
        options = ["--v", "gradient", "--sides", "full", "--rounds", "1", "--check-blocks", "1"]
        if session.small:
            options += ["--shape", "tiny", "--device", "cpu", "--block-size", "64", "--blocks", "2"]
            options += ["--micro-batch", "2", "--kronfluence-batches", "2"]
        else:
            options += ["--shape", name, "--device", "cuda", "--block-size", "2048", "--blocks", str(blocks)]
            options += ["--micro-batch", str(blocks), "--kronfluence-batches", "2"]
        figures = session.bench("score_throughput", *options, log=f"scoring_{shape}")
        return {"scored": figures}

    return step


def pipeline(session: Session) -> Figures:
    """Every verb on the demo's documents, in bfloat16, with two actors that share the device."""
    data_of(session.folder / "data", small=session.small)
    seconds = session.verb("run", config=session.config(), log="pipeline")
    manifests = {path.parent: read_manifest(path.parent) for path in session.run_dir.rglob(MANIFEST)}
    stages = {folder.relative_to(session.run_dir).as_posix(): each.seconds for folder, each in manifests.items()}
    summaries = {folder.name: each.summary for folder, each in manifests.items()}
    factors, report = (manifests[session.run_dir / name] for name in ("factors", "report"))
    block_size = yaml.safe_load(session.config().read_text())["pack_corpus"]["block_size"]
    return {
        "seconds": seconds,
        "stages": stages,
        # of both passes together, with the starts of their processes and the eigendecompositions between
        "factor_tokens_per_second": round(2 * factors.rows["blocks"] * block_size / factors.seconds, 1),
        "continuations_per_second": round(report.rows["continuations"] / report.seconds, 1),
        "score_tokens_per_second_per_actor": summaries["scores"].get("tokens_per_second_per_actor"),
        "report": summaries.get("report"),
    }


def equal_bytes(session: Session) -> Figures:
    """The same scores by one actor alone on the device."""
    alone = copy_of_run(session, "alone", without=("scores",))
    whole = "0" if session.small else "1"
    options = ["score_corpus.min_actors=1", "score_corpus.max_actors=1", f"score_corpus.resources.gpus={whole}"]
    overrides = [argument for option in options for argument in ("--set", option)]
    seconds = session.verb("score_corpus", *overrides, config=session.config(alone), log="equal_bytes")
    same = read_manifest(alone / "scores").fingerprint == read_manifest(session.run_dir / "scores").fingerprint
    return {"equal_bytes": same, "seconds": seconds}


def comparison(session: Session) -> Figures:
    """`compare` with one DPO."""
    seconds = session.verb("compare", config=session.config(), log="comparison")
    return {"seconds": seconds, "methods": sorted(path.name for path in (session.run_dir / "compare").iterdir())}


def resuming(session: Session) -> Figures:
    """A penalised training is killed after its first checkpoint with all that it started, and goes on."""
    killed = copy_of_run(session, "killed", without=("model/penalised", "report"))
    config, folder = session.config(killed), killed / "model" / "penalised"
    command = [sys.executable, "-c", KILLED, "pretrain", "--config", str(config)]
    with (session.folder / "logs" / "killed.txt").open("w") as output:
        subprocess.run(command, start_new_session=True, stdout=output, stderr=output)
    checkpoint = last_checkpoint(folder)
    if checkpoint is None:
        raise RuntimeError(f"no checkpoint to go on from (see {session.folder / 'logs' / 'killed.txt'})")
    seconds = session.verb("pretrain", config=config, log="resumed")
    resumed, whole = (read_manifest(run / "model" / "penalised") for run in (killed, session.run_dir))
    return {
        "resumed_from": checkpoint.step,
        "steps": resumed.rows["steps"],
        "seconds": seconds,
        "loss_resumed": resumed.summary["loss_benign"],
        "loss_whole": whole.summary["loss_benign"],
    }


def copy_of_run(session: Session, name: str, *, without: Sequence[str]) -> Path:
    """The run directory without some artifacts and what was made of them."""
    copy = session.folder / name
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(session.run_dir, copy)
    for artifact in without:
        shutil.rmtree(copy / artifact)
    return copy


STEPS: dict[str, Callable[[Session], Figures]] = {
    "machine": machine,
    "training_160m": training("160m"),
    "training_1b": training("1b"),
    "head_losses": head_losses,
    "scoring_160m": scoring("160m"),
    "scoring_1b": scoring("1b"),
    "pipeline": pipeline,
    "equal_bytes": equal_bytes,
    "resuming": resuming,
    "comparison": comparison,
}
AFTER = dict.fromkeys(("equal_bytes", "resuming", "comparison"), "pipeline")
