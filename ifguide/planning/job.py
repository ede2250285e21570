"""What is planned, and a stage's estimate from its FLOP or its time per token.

    seconds = starts * start + FLOP / (workers * peak * efficiency)

The efficiency comes from measurements (`measurements`), with the range that they leave. The floor is the same with an
efficiency of 1 and no starts.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from ifguide.config import Completions, Config, Pairs, Prompts, PromptSet
from ifguide.config.resources import WorkerResources
from ifguide.evaluation.prompts import read_set
from ifguide.hardware import Hardware
from ifguide.planning.measurements import SPREAD, efficiency, rates
from ifguide.records.files import TABLES, kind_of, list_files
from ifguide.records.rows import open_parquet, table_rows
from ifguide.shapes import ModelShape

ASSUMED_ROWS = 100_000
# A stage's pools of workers, each of which starts anew. Of pretrain: for each of its models.
STARTS = {
    "pack_corpus": 3,
    "fit_factors": 3,
    "build_query": 2,
    "fit_student": 3,
    "score_corpus": 1,
    "build_mask": 1,
    "pretrain": 1,
    "evaluate": 1,
}


@dataclass(frozen=True, kw_only=True)
class StageEstimate:
    """Times in seconds of the wall clock, sizes in bytes. `workers` are GPUs if `on_gpu`, else CPU cores. `memory` is
    of one worker: of its GPU if `on_gpu`, else of the machine. `basis` names measurements."""

    stage: str
    workers: int
    on_gpu: bool
    flop: float
    floor: float
    seconds: float
    low: float
    high: float
    storage: float
    memory: float
    basis: tuple[str, ...]
    extrapolated: bool
    notes: tuple[str, ...] = ()

    @property
    def gpu_seconds(self) -> float:
        """Of all workers together; 0 for a stage without GPUs."""
        return self.seconds * self.workers if self.on_gpu else 0.0


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is planned: a config, its models' shapes, the corpus, the machines. `machine` is what a stage that asks for
    GPUs runs on; `core` one CPU core."""

    config: Config
    proxy: ModelShape
    target: ModelShape
    tokens: float
    machine: Hardware
    core: Hardware
    notes: list[str] = field(default_factory=list, compare=False)

    @property
    def block(self) -> int:
        return self.config.pack_corpus.block_size

    @property
    def cores(self) -> int:
        """CPU cores of the cluster: as configured, else what the largest stage reserves."""
        config = self.config
        reserved = [
            config.score_corpus.max_actors * config.score_corpus.resources.cpus,
            config.pretrain.workers * config.pretrain.resources.cpus,
            config.evaluate.actors * config.evaluate.resources.cpus,
        ]
        return config.cluster.num_cpus or max(1, int(max(reserved)))

    @property
    def gpus(self) -> float:
        """GPUs of the cluster: what scoring or training takes at once. Other stages' workers wait for their turn."""
        config = self.config
        scoring = config.score_corpus.max_actors * config.score_corpus.resources.gpus
        return max(scoring, config.pretrain.workers * config.pretrain.resources.gpus)

    def at_once(self, workers: int, resources: WorkerResources) -> int:
        """How many of a stage's workers find room."""
        if resources.gpus:  # where no other stage asks for GPUs there are as many as this one wants
            room = self.gpus / resources.gpus or workers
        else:
            room = self.cores / resources.cpus
        return max(1, min(workers, int(room)))

    def device(self, gpus: float) -> Hardware:
        return self.machine if gpus else self.core


class Pass(NamedTuple):
    """What a stage computes: FLOP of a kind that was measured, in a precision, by a model of `size` tracked weights."""

    kind: str
    flop: float
    precision: str
    size: float


def computed(
    job: Job,
    stage: str,
    work: Pass,
    *,
    workers: int,
    resources: WorkerResources,
    memory: float,
    storage: float,
    repeats: int = 1,
    serial: tuple[float, float, str] | None = None,
    stretch: float = 1.0,
    notes: tuple[str, ...] = (),
) -> StageEstimate:
    """A stage whose time is FLOP over a rate. repeats: how often its workers start anew. serial: seconds beside these,
    and at best, and their basis. stretch: how much longer the busiest worker works than the mean."""
    device, running = job.device(resources.gpus), job.at_once(workers, resources)
    units = running * (resources.gpus or resources.cpus)
    stretch = max(stretch, math.ceil(workers / running) * running / workers)
    start = rates()["stage_start"].value * STARTS[stage] * repeats
    efficient = efficiency(work.kind, device, work.precision, work.size)
    floor = work.flop / (units * device.peak(work.precision))
    totals = {
        "expected": start + stretch * floor / efficient.expected,
        "low": start / SPREAD[False] + stretch * floor / efficient.high,
        "high": start * SPREAD[False] + stretch * floor / efficient.low,
    }
    basis = ["stage_start", *efficient.basis]
    if serial is not None:
        seconds, least, name = serial
        floor += least
        totals["expected"] += seconds
        totals["low"] += seconds / SPREAD[True]
        totals["high"] += seconds * SPREAD[True]
        basis.append(name)
    on_gpu = resources.gpus > 0
    if on_gpu and memory > device.memory:
        notes = (*notes, f"needs {memory / 1e9:.0f} GB of GPU memory, {device.name} has {device.memory / 1e9:.0f}")
    return StageEstimate(
        stage=stage,
        workers=math.ceil(units),
        on_gpu=on_gpu,
        flop=work.flop,
        floor=floor,
        seconds=totals["expected"],
        low=totals["low"],
        high=totals["high"],
        storage=storage,
        memory=memory,
        basis=tuple(dict.fromkeys([*basis, device.name])),
        extrapolated=device.device == "gpu" or efficient.extrapolated,
        notes=notes,
    )


def by_core(
    job: Job, stage: str, seconds_per_token: float, bytes_per_token: float, *, memory: float, basis: tuple[str, ...]
) -> StageEstimate:
    """A stage that takes so many seconds of a core for each token, and writes so many bytes."""
    start = rates()["stage_start"].value * STARTS[stage]
    seconds = job.tokens * seconds_per_token / job.cores
    extrapolated = job.cores > 2
    spread = SPREAD[True]
    return StageEstimate(
        stage=stage,
        workers=job.cores,
        on_gpu=False,
        flop=0.0,
        floor=seconds / spread,
        seconds=start + seconds,
        low=start / SPREAD[False] + seconds / spread,
        high=start * SPREAD[False] + seconds * spread,
        storage=job.tokens * bytes_per_token,
        memory=memory,
        basis=("stage_start", *basis),
        extrapolated=extrapolated,
    )


def rows(job: Job, prompts: Prompts | Completions | Pairs | None, key: str) -> int:
    """How many rows a table of prompts or queries has; assumed, with a note to the job, where it cannot be known.

    Raises:
        ValueError: a file is of a kind that is not read, or cannot be read; names it.
    """
    if prompts is None:
        job.notes.append(f"{key} is not set: {ASSUMED_ROWS:,} rows are assumed")
        return ASSUMED_ROWS
    if prompts.rows is not None:
        return prompts.rows[1] - prompts.rows[0]
    with contextlib.suppress(FileNotFoundError):
        return sum(map(_length, list_files(prompts.path, f"{key}.path", TABLES)))
    job.notes.append(f"{prompts.path} of {key} is not there yet: {ASSUMED_ROWS:,} rows are assumed")
    return ASSUMED_ROWS


def _length(table: Path) -> int:
    """Rows of a table, bad ones included."""
    if kind_of(table) == "parquet":
        return int(open_parquet(table).metadata.num_rows)
    return sum(1 for _ in table_rows(table))


def set_rows(job: Job, source: PromptSet, key: str) -> int:
    """How many prompts of a set are continued; assumed, with a note to the job, where its files are not there."""
    try:
        return len(read_set(source, key, seed=0))
    except FileNotFoundError:
        assumed = min(ASSUMED_ROWS, source.max_prompts or ASSUMED_ROWS)
        job.notes.append(f"{source.path} of {key} is not there yet: {assumed:,} rows are assumed")
        return assumed
