"""Checkpoints: whole or passed over, found again, the last and the best kept."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from ifguide.storage import file_sizes
from ifguide.training.checkpoints import (
    CHECKPOINTS,
    DESCRIPTION,
    STATE,
    UNIVERSAL,
    Checkpoint,
    best_checkpoints,
    describe_checkpoint,
    digest_files,
    first_whole,
    last_checkpoint,
    part_folder,
    publish_checkpoint,
    published_checkpoints,
    remove_others,
)


def publish(folder: Path, step: int, heldout: float | None = None) -> Path:
    part = part_folder(folder, step)
    (part / STATE / "deep").mkdir(parents=True)
    (part / STATE / "rank0.pt").write_bytes(bytes(100))
    (part / STATE / "deep" / "rank1.pt").write_bytes(bytes(50))
    (part / "latest").write_text(STATE)
    made = Checkpoint(
        folder=part, step=step, engine="torch", world_size=2, heldout=heldout, training={"lowest": step / 3}
    )
    return publish_checkpoint(part, describe_checkpoint(made), digest_files(part, file_sizes(part)))


def steps(folder: Path) -> list[int]:
    return [checkpoint.step for checkpoint in published_checkpoints(folder)]


def test_what_is_published_is_what_is_found(tmp_path: Path) -> None:
    assert last_checkpoint(tmp_path) is None
    path = publish(tmp_path, 7, heldout=1 / 3)
    found = last_checkpoint(tmp_path)
    assert found == Checkpoint(
        folder=path, step=7, engine="torch", world_size=2, heldout=1 / 3, training={"lowest": 7 / 3}, files=found.files
    )
    assert found.state == path / STATE
    assert not part_folder(tmp_path, 7).exists()
    assert set(json.loads((path / DESCRIPTION).read_text())["files"]) == {
        "state/rank0.pt",
        "state/deep/rank1.pt",
        "latest",
    }


def test_the_last_is_the_last_by_step_not_by_time(tmp_path: Path) -> None:
    for step in (100, 9, 20_000_000):
        publish(tmp_path, step)
    assert steps(tmp_path) == [9, 100, 20_000_000]
    assert last_checkpoint(tmp_path).step == 20_000_000


DAMAGES: dict[str, Callable[[Path], object]] = {
    "a missing file": lambda path: (path / STATE / "deep" / "rank1.pt").unlink(),
    "a truncated file": lambda path: (path / STATE / "rank0.pt").write_bytes(bytes(99)),
    "no description": lambda path: (path / DESCRIPTION).unlink(),
    "a file more": lambda path: (path / STATE / "zero_pp_rank_9.pt").write_bytes(bytes(10)),
    "a changed description": lambda path: (path / DESCRIPTION).write_text(
        (path / DESCRIPTION).read_text().replace('"step": 8', '"step": 9')
    ),
    "half a description": lambda path: (path / DESCRIPTION).write_text((path / DESCRIPTION).read_text()[:40]),
    "an empty description": lambda path: (path / DESCRIPTION).write_text(""),
    "never renamed": lambda path: path.rename(path.with_name(path.name + ".part")),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_torn_checkpoint_is_passed_over_and_replaced(damage: str, tmp_path: Path) -> None:
    publish(tmp_path, 4)
    DAMAGES[damage](publish(tmp_path, 8))
    assert last_checkpoint(tmp_path).step == 4
    if damage != "never renamed":  # a loop removes the part before it writes it anew
        publish(tmp_path, 8)
        assert steps(tmp_path) == [4, 8]


FLIPS: dict[str, Callable[[Path], object]] = {
    "one bit": lambda path: (path / STATE / "rank0.pt").write_bytes(bytes(50) + b"\x01" + bytes(49)),
    "all of it": lambda path: (path / STATE / "deep" / "rank1.pt").write_bytes(b"x" * 50),
}


@pytest.mark.parametrize("flip", FLIPS)
def test_a_changed_file_sends_the_training_to_the_checkpoint_before(
    flip: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("ifguide"), "propagate", True)
    publish(tmp_path, 2)
    publish(tmp_path, 4)
    path = publish(tmp_path, 8)
    FLIPS[flip](path)
    assert first_whole(reversed(published_checkpoints(tmp_path))).step == 4
    assert f"{path / STATE}" in caplog.text
    assert "has changed since it was written: its checkpoint is passed over" in caplog.text
    assert steps(tmp_path) == [2, 4], "nobody takes it up again"
    remove_others(tmp_path, keep_last=1, keep_best=0)
    assert steps(tmp_path) == [4], "and it counts for none of those to keep"


def test_with_no_whole_checkpoint_there_is_none(tmp_path: Path) -> None:
    FLIPS["one bit"](publish(tmp_path, 8))
    assert first_whole(published_checkpoints(tmp_path)) is None
    assert last_checkpoint(tmp_path) is None


def test_leftovers_are_never_taken_for_checkpoints_and_are_removed(tmp_path: Path) -> None:
    publish(tmp_path, 4)
    converted = tmp_path / CHECKPOINTS / f"step-00000004{UNIVERSAL}"
    for path in (part_folder(tmp_path, 6), converted, converted.with_suffix(f"{UNIVERSAL}-part")):
        (path / STATE).mkdir(parents=True)
        (path / STATE / "rank0.pt").write_bytes(bytes(10))
    assert steps(tmp_path) == [4]
    remove_others(tmp_path, keep_last=1, keep_best=1)
    assert [path.name for path in (tmp_path / CHECKPOINTS).iterdir()] == ["step-00000004"]


@pytest.mark.parametrize(
    ("keep_last", "keep_best", "kept"), [(1, 0, [5]), (1, 1, [2, 5]), (2, 2, [2, 3, 4, 5]), (9, 9, [1, 2, 3, 4, 5])]
)
def test_the_last_and_the_best_are_kept(keep_last: int, keep_best: int, kept: list[int], tmp_path: Path) -> None:
    for step, heldout in enumerate([5.0, 1.0, 2.0, 4.0, None], start=1):
        publish(tmp_path, step, heldout)
    assert [found.step for found in best_checkpoints(published_checkpoints(tmp_path))] == [2, 3, 4, 1]
    remove_others(tmp_path, keep_last=keep_last, keep_best=keep_best)
    assert steps(tmp_path) == kept


def test_of_equally_good_ones_the_earlier_is_the_best(tmp_path: Path) -> None:
    for step in (3, 1, 2):
        publish(tmp_path, step, 1.5)
    assert best_checkpoints(published_checkpoints(tmp_path))[0].step == 1
