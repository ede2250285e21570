"""`ifguide plan`: the estimates of every stage, as text or as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ifguide.artifacts import MANIFEST, read_manifest
from ifguide.config import Config, ConfigError, load_config
from ifguide.config.resources import Resources
from ifguide.folders import CORPUS
from ifguide.hardware import Hardware, hardware
from ifguide.influence.method import chosen_method
from ifguide.planning.corpus_size import input_size
from ifguide.planning.estimate import estimate, scoring_rates
from ifguide.planning.job import Job, StageEstimate
from ifguide.planning.measurements import sources
from ifguide.planning.models import proxy_shape, target_shape
from ifguide.shapes import ModelShape
from ifguide.storage import location

DEFAULT_TOKENS = 1e9
# What `--gpus N` sets, where a stage's workers have GPUs.
WORKERS = {
    "fit_factors": "data_partitions",
    "build_query": "partitions",
    "fit_student": "partitions",
    "score_corpus": "max_actors",
    "pretrain": "workers",
    "evaluate": "actors",
}
# And what it lowers to that where it is more.
LEAST_WORKERS = {"score_corpus": "min_actors", "pretrain": "min_workers"}


def plan(
    path: Path,
    overrides: Sequence[str] = (),
    *,
    corpus_tokens: float | None = None,
    gpu: str | None = None,
    gpus: int | None = None,
    price_per_hour: float | None = None,
) -> dict[str, Any]:
    """The plan as plain values: what `--json` prints. Times in hours, sizes in bytes.

    gpu: a hardware name; None takes h100, or cpu where no stage asks for GPUs. gpus: sets every stage's workers.

    Raises:
        ValueError, OSError: config, GPU type or shape that cannot be planned with; says what to do.
    """
    config = load_config(path, overrides)
    settings = [] if gpus is None else worker_settings(config, gpus)
    config = load_config(path, [*overrides, *settings])
    job = make_job(config, corpus_tokens=corpus_tokens, gpu=gpu)
    stages = estimate(job)
    expected, low, high = scoring_rates(job)
    result: dict[str, Any] = {
        "config": str(path),
        "settings": settings,
        "corpus_tokens": job.tokens,
        "machine": job.machine.name,
        "cores": job.cores,
        "price_per_hour": price_per_hour,
        "proxy": _model(job.proxy),
        "target": _model(job.target),
        "method": asdict(chosen_method(config.score_corpus)),
        "scoring_tokens_per_second_per_actor": {"expected": expected, "low": low, "high": high},
        "stages": [_stage(item, price_per_hour) for item in stages],
        "total": _total(stages, price_per_hour),
        "notes": job.notes,
    }
    used = dict.fromkeys(name for item in stages for name in item.basis)
    origins = sources()
    result["sources"] = {name: {"kind": origins[name][0], "source": origins[name][1]} for name in used}
    return rounded(result)


def make_job(config: Config, *, corpus_tokens: float | None = None, gpu: str | None = None) -> Job:
    """The config with its shapes and machines. Without `corpus_tokens`: those of `planned_tokens`."""
    on_gpu = any(_resources(config, verb).gpus for verb in WORKERS)
    machine = hardware(gpu) if gpu else planned_hardware(config) if on_gpu else hardware("cpu")
    notes: list[str] = []
    if corpus_tokens is None:
        corpus_tokens, notes = planned_tokens(config)
    if corpus_tokens <= 0:
        raise ValueError(f"--corpus-tokens {corpus_tokens:g}: must be above 0")
    return Job(
        config=config,
        proxy=proxy_shape(config),
        target=target_shape(config),
        tokens=corpus_tokens,
        machine=machine,
        core=hardware("cpu"),
        notes=notes,
    )


def planned_tokens(config: Config, corpora: Sequence[str] = (CORPUS,)) -> tuple[float, list[str]]:
    """Tokens of the first of these folders that is packed, else an estimate from the inputs' bytes, else
    `DEFAULT_TOKENS`; and a note that says which."""
    for name in corpora:
        corpus = location(config.run_dir) / name
        if (corpus / MANIFEST).exists():
            return float(read_manifest(corpus).rows["tokens"]), [f"corpus size: of {corpus}"]
    better = "pack it, or say `ifguide plan --corpus-tokens`"
    size = input_size(config.pack_corpus.inputs, apart=location(config.run_dir))
    if size is None:
        return DEFAULT_TOKENS, [f"corpus size: assumed; {better}"]
    rows = ", rows that `rows` leaves out too" if size.whole else ""
    described = f"{size.bytes:,} bytes in {size.files:,} file{'' if size.files == 1 else 's'}{rows}"
    return max(1.0, size.tokens), [f"corpus size: estimated from {described}; {better}"]


def planned_hardware(config: Config) -> Hardware:
    """The GPU that the config's `cluster.gpu` names."""
    try:
        return hardware(config.cluster.gpu)
    except ValueError as error:
        raise ConfigError(f"cluster.gpu: {error}") from error


def worker_settings(config: Config, gpus: int) -> list[str]:
    """The overrides that give every stage `gpus` workers, but for what one process alone does: to run with, too.

    Raises:
        ValueError: `gpus` is below 1.
    """
    if gpus < 1:
        raise ValueError(f"--gpus {gpus}: must be at least 1")
    settings = []
    for verb, key in WORKERS.items():
        if verb == "fit_student" and not config.score_corpus.uses_student:
            continue
        if verb == "pretrain" and config.pretrain.engine == "torch":  # which trains in one process
            continue
        section = getattr(config, verb)
        workers = max(1, int(gpus / (_resources(config, verb).gpus or 1)))
        settings.append(f"{verb}.{key}={workers}")
        least = LEAST_WORKERS.get(verb)
        if least is not None and (getattr(section, least) or 1) > workers:
            settings.append(f"{verb}.{least}={workers}")
    return settings


def _resources(config: Config, verb: str) -> Resources:
    """Of a verb's workers; a student's sample is scored with those of scoring."""
    resources: Resources = getattr(config, "score_corpus" if verb == "fit_student" else verb).resources
    return resources


def rounded(value: Any) -> Any:
    """Four significant digits, and None for what is not finite, so that the output is the same everywhere."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.4g}") if math.isfinite(value) else None
    return value


def _model(shape: ModelShape) -> dict[str, Any]:
    return {
        "name": shape.name,
        "parameters": shape.parameters,
        "tracked": shape.tracked,
        "known_from": shape.known_from,
    }


def _stage(item: StageEstimate, price: float | None) -> dict[str, Any]:
    return {
        "stage": item.stage,
        "workers": item.workers,
        "on_gpu": item.on_gpu,
        "flop": item.flop,
        "floor_hours": item.floor / 3600,
        "hours": {"expected": item.seconds / 3600, "low": item.low / 3600, "high": item.high / 3600},
        "gpu_hours": item.gpu_seconds / 3600,
        "cost": None if price is None else price * item.gpu_seconds / 3600,
        "storage_bytes": item.storage,
        "memory_bytes_per_worker": item.memory,
        "extrapolated": item.extrapolated,
        "basis": list(item.basis),
        "notes": list(item.notes),
    }


def _total(stages: Sequence[StageEstimate], price: float | None) -> dict[str, Any]:
    held = max((item.workers for item in stages if item.on_gpu), default=0)
    idle = sum(item.seconds for item in stages if not item.on_gpu) * held / 3600
    gpu_hours = sum(item.gpu_seconds for item in stages) / 3600
    return {
        "flop": sum(item.flop for item in stages),
        "hours": {
            "expected": sum(item.seconds for item in stages) / 3600,
            "low": sum(item.low for item in stages) / 3600,
            "high": sum(item.high for item in stages) / 3600,
        },
        "gpu_hours": gpu_hours,
        "gpu_hours_idle_if_kept": idle,
        "cost": None if price is None else price * gpu_hours,
        "storage_bytes": sum(item.storage for item in stages),
    }


def as_json(result: dict[str, Any]) -> str:
    """One JSON object, keys in a fixed order."""
    return json.dumps(result, indent=1)
