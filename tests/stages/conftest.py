"""One small run of the whole pipeline on a local Ray cluster, shared by the stage tests."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from filelock import FileLock

from ifguide.config import Cluster, Config, config_from_mapping, to_mapping
from ifguide.demo import generate_demo
from ifguide.demo.generate import SUMMARY
from ifguide.distributed.session import connect
from ifguide.pipeline import run_pipeline
from tests.prefork.ray_ports import any_agent_port

any_agent_port()

ARCHITECTURE = {
    "model_type": "gpt_neox",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 128,
}


def small_config(data: Path, run_dir: Path) -> dict[str, Any]:
    """The pipeline at its smallest: a few thousand tokens, a model of two layers."""
    no_gpu = {"resources": {"gpus": 0}}
    return {
        "run_dir": str(run_dir),
        "tokenizer": str(data / "tokenizer"),
        "target": {"architecture": ARCHITECTURE},
        "cluster": {"num_cpus": 2},
        "pack_corpus": {
            "inputs": [{"path": str(data / "corpus.jsonl"), "spans_column": "toxic_spans"}],
            "block_size": 64,
            "blocks_per_shard": 100,
        },
        "pretrain": {
            "epochs": 1,
            "batch_blocks": 16,
            "micro_batch_blocks": 4,
            "learning_rate": 0.003,
            "dtype": "float32",
            # starting Ray Train and DeepSpeed takes longer than these trainings; tests/stages/test_resume.py has both
            "engine": "torch",
            **no_gpu,
            "checkpoint_steps": 8,
            "log_steps": 4,
        },
        "fit_factors": {"sample_blocks": 40, **no_gpu},
        "build_query": {
            "prompts": str(data / "queries.jsonl"),
            "classifier": "alt-profanity-check",
            "negative_threshold": 0.3,
            "partitions": 2,
            **no_gpu,
        },
        "score_corpus": {
            "min_actors": 1,
            "max_actors": 1,
            **no_gpu,
            "fused": False,
        },
        "build_mask": {"quantile": 0.97, "max_fraction": 0.02},
        "evaluate": {
            "prompts": str(data / "prompts.jsonl"),
            "max_prompts": 10,
            "classifier": "alt-profanity-check",
            "continuations": 3,
            "max_new_tokens": 6,
            "prompts_per_shard": 4,
            "heldout": [str(data / "heldout.jsonl")],
            "cloze": str(data / "cloze.jsonl"),
            "word_list": ["clown", "pig"],
            "actors": 1,
            **no_gpu,
        },
    }


def own_environment() -> dict[str, str]:
    """The environment of a driver whose Ray cluster and workers are its own, all of them its descendants."""
    shared = ("RAY_ADDRESS", "IFGUIDE_PREFORK_SOCKET")
    return {key: value for key, value in os.environ.items() if key not in shared}


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder of all processes of `pytest -n`, while it is this one's alone: what one has made, the next one finds."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def data(shared: Path) -> Path:
    """A small demo data set."""
    folder = shared / "data"
    with FileLock(shared / "data.lock"):
        if not (folder / SUMMARY).exists():
            generate_demo(folder, seed=3, documents=140, vocab_size=512, queries=40, prompts=20, cloze=10)
    return folder


@pytest.fixture(scope="session")
def cluster() -> Iterator[None]:
    """A local Ray cluster of two CPUs for the whole session."""
    connect(Cluster(num_cpus=2))
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def finished(data: Path, cluster: None, shared: Path) -> Config:
    """The config of a finished run of every verb. Tests read it; to change something they copy it."""
    config = config_from_mapping(small_config(data, shared / "run"))
    with FileLock(shared / "run.lock"):
        run_pipeline(config, dry_run=False)  # nothing is left to do for the second process
    return config


@pytest.fixture
def copied(finished: Config, tmp_path: Path) -> Callable[..., Config]:
    """A copy of the finished run without the artifacts `drop`, with config `changes` (dotted key -> value)."""

    def copy(*, drop: tuple[str, ...] = (), **changes: Any) -> Config:
        target = tmp_path / "copy"
        # another process of the tests may be looking whether that run is finished, and holds it
        shutil.copytree(finished.run_dir, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns("lock.json"))
        for name in drop:
            shutil.rmtree(target / name)
        tree = {**to_mapping(finished), "run_dir": str(target)}
        for dotted, value in changes.items():
            section, _, key = dotted.partition("__")
            tree[section][key] = value
        return config_from_mapping(tree)

    return copy
