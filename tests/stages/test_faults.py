"""Storage that fails, and files that are not what they were: a clear error, or a correct result."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from bench.chaos import prepare
from ifguide.artifacts import MANIFEST, PLAN, MismatchError, data_files, read_manifest
from ifguide.cli import main
from ifguide.config import config_from_mapping, load_config, to_mapping
from ifguide.distributed.shards import StageError
from ifguide.pipeline import stage
from ifguide.run import Run

pytestmark = pytest.mark.slow

Disk = Callable[[Path, str], None]
Copied = Callable[..., Run]


@pytest.fixture(scope="module")
def masked(cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished run up to its mask, of a random proxy and direction."""

    def run_verb(run_dir: Path, verb: str) -> None:
        stage(verb)(Run(config=load_config(run_dir / "config.yaml")))

    run_dir = prepare(tmp_path_factory.mktemp("faults") / "run", run_verb, 100)
    run_verb(run_dir, "score_corpus")
    run_verb(run_dir, "build_mask")
    return Run(config=load_config(run_dir / "config.yaml"))


@pytest.fixture
def copied(masked: Run, tmp_path: Path) -> Copied:
    """A copy of that run without the artifacts `drop`, with changed options of `pack_corpus`."""

    def copy(*drop: str, **changes: Any) -> Run:
        shutil.copytree(masked.folder, tmp_path / "copy", ignore=lambda _, names: set(names) & set(drop))
        tree = {**to_mapping(masked.config), "run_dir": str(tmp_path / "copy")}
        tree["score_corpus"]["resources"]["attempts"] = 3  # the bench has far more, for its kills
        return Run(config=config_from_mapping({**tree, "pack_corpus": {**tree["pack_corpus"], **changes}}))

    return copy


@pytest.fixture
def disk() -> Iterator[Disk]:
    """Mounts a small file system of its own at a folder, or mounts it again with other options."""
    mounted: list[Path] = []

    def mount(folder: Path, options: str) -> None:
        folder.mkdir(exist_ok=True)
        again = "remount," if folder in mounted else ""
        command = ["mount", "-t", "tmpfs", "-o", again + options, "tmpfs", str(folder)]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            pytest.skip(f"file systems cannot be mounted here: {result.stderr.strip()}")
        if folder not in mounted:
            mounted.append(folder)

    yield mount
    for folder in mounted:
        subprocess.run(["umount", str(folder)], check=True)


def flip_a_bit(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", ["truncated", "zeroed footer", "one bit"])
def test_a_damaged_corpus_shard_is_named_and_the_others_are_scored(damage: str, copied: Copied) -> None:
    run = copied("scores", "ranking", "mask")
    shards = data_files(run.corpus)
    damaged = shards[1]
    content = damaged.read_bytes()
    if damage == "truncated":
        damaged.write_bytes(content[: len(content) // 2])
    elif damage == "zeroed footer":
        damaged.write_bytes(content[:-8] + bytes(8))
    else:
        flip_a_bit(damaged, len(content) // 3)
    with pytest.raises((ValueError, StageError), match=damaged.name):
        stage("score_corpus")(run)
    assert not (run.scores / MANIFEST).exists()
    if damage != "truncated":  # which is seen by its size, before anything is begun
        assert [path.name for path in data_files(run.scores)] == [path.name for path in shards if path != damaged]
    damaged.write_bytes(content)
    assert stage("score_corpus")(run).rows["blocks"] == read_manifest(run.corpus).rows["blocks"]


def test_a_bit_flipped_in_the_scores_is_found_when_they_are_read(copied: Copied) -> None:
    run = copied("ranking", "mask")
    damaged = data_files(run.scores)[-1]
    flip_a_bit(damaged, damaged.stat().st_size // 2)
    with pytest.raises(Exception, match=rf"{damaged.name} has changed since it was made"):
        stage("build_mask")(run)
    assert not (run.mask / MANIFEST).exists()


@pytest.mark.parametrize("size", ["20k", "24k", "48k"])  # at 24k some actors cannot even count their start
def test_a_full_disk_is_said_and_more_room_ends_at_the_same_bytes(
    size: str, masked: Run, copied: Copied, disk: Disk
) -> None:
    run = copied("scores", "ranking", "mask")
    disk(run.scores, f"size={size}")
    with pytest.raises((StageError, OSError), match=r"No space left on device"):
        stage("score_corpus")(run)
    assert not (run.scores / MANIFEST).exists()
    for path in data_files(run.scores)[:1]:  # what was finished is not trusted either
        flip_a_bit(path, path.stat().st_size // 2)
    disk(run.scores, "size=50m")
    assert stage("score_corpus")(run).fingerprint == read_manifest(masked.scores).fingerprint
    assert not list(run.scores.rglob("*.part"))


def test_a_read_only_directory_is_said_in_one_line(
    copied: Copied, disk: Disk, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copied("scores")
    disk(run.scores, "size=1m")
    disk(run.scores, "ro")
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(to_mapping(run.config)))
    assert main(["score_corpus", "--config", str(path)]) == 1
    error = capsys.readouterr().err
    assert "Read-only file system" in error
    assert str(run.scores) in error


def test_scores_begun_of_another_corpus_are_refused(copied: Copied) -> None:
    run = copied("corpus", "ranking", "mask", block_size=64)
    (run.scores / MANIFEST).rename(run.scores / PLAN)  # unfinished, of the same options and inputs
    other = stage("pack_corpus")(run)
    with pytest.raises(MismatchError, match=rf"corpus was .* now .{other.fingerprint[:16]}"):
        stage("score_corpus")(run)


def test_the_manifest_of_another_corpus_is_refused(copied: Copied, masked: Run) -> None:
    run = copied("corpus", block_size=64)
    stage("pack_corpus")(run)
    with pytest.raises(MismatchError, match=read_manifest(masked.corpus).fingerprint[:16]):
        stage("build_mask")(run)  # scores of the corpus that was here before
    manifest = (masked.corpus / MANIFEST).read_bytes()
    (run.corpus / MANIFEST).write_bytes(manifest)
    with pytest.raises(ValueError, match=r"bytes where its manifest says"):
        stage("score_corpus")(run)
