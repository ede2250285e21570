"""A small packed corpus to train on by the torch engine, and what the tests of the loop share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ifguide.artifacts import file_digest
from ifguide.run import Run
from ifguide.telemetry import METRICS, read_metrics
from ifguide.training.loop import TrainingLoop
from tests.stages.conftest import ARCHITECTURE
from tests.stages.packed import packed_run, settings_of

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


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
