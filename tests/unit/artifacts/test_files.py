"""ifguide.artifacts.files: whole files or none, in the order of their numbers, and removal that stays inside."""

import errno
import random
from pathlib import Path

import pytest

from ifguide.artifacts import data_files, file_entry, publish, publish_folder, record, recording, remove_tree
from tests.unit.artifacts.test_artifact import SHARD, write_shard


def test_publish_that_fails_leaves_the_old_file_and_no_part(tmp_path):
    path = write_shard(tmp_path, "old")

    def fail_halfway() -> None:
        with publish(path) as part:
            part.write_text("half")
            raise KeyError

    with pytest.raises(KeyError):
        fail_halfway()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_of_folders_that_are_published_at_once_each_is_whole_and_no_other_is_touched(tmp_path):
    theirs = write_shard(tmp_path / "out.part", "of somebody else")
    with publish_folder(tmp_path / "out") as first, publish_folder(tmp_path / "out") as second:
        (first / "a").write_text("first")
        (second / "b").write_text("second")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a"]  # the one that ended last
    assert theirs.read_text() == "of somebody else"

    def fail_halfway() -> None:
        with publish_folder(tmp_path / "out") as part:
            (part / "c").write_text("half")
            raise KeyError

    with pytest.raises(KeyError):
        fail_halfway()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.part"]


def test_part_files_are_never_listed_even_by_a_pattern_that_matches_them(tmp_path):
    for name in ("shard-00001.parquet", SHARD, "shard-00002.parquet.77.part", "documents-0.parquet"):
        (tmp_path / name).write_text("x")
    assert [path.name for path in data_files(tmp_path)] == [SHARD, "shard-00001.parquet"]
    assert [path.name for path in data_files(tmp_path, "shard-*")] == [SHARD, "shard-00001.parquet"]


def test_remove_tree_takes_the_folder_but_not_what_its_links_point_to(tmp_path):
    outside = write_shard(tmp_path / "outside", "kept")
    write_shard(tmp_path / "scratch" / "a" / "b", "x")
    (tmp_path / "scratch" / "link").symlink_to(tmp_path / "outside")
    remove_tree(tmp_path / "scratch")
    remove_tree(tmp_path / "scratch")
    assert not (tmp_path / "scratch").exists()
    assert outside.read_text() == "kept"


def test_an_error_of_storage_names_the_file(tmp_path):
    with pytest.raises(OSError, match=r"No space left on device.*shard-00000") as caught, publish(tmp_path / SHARD):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert caught.value.errno == errno.ENOSPC


def test_files_of_more_than_a_hundred_thousand_shards_are_in_the_order_of_their_numbers(tmp_path):
    numbers = [0, 9, 10_000, 99_998, 99_999, 100_000, 100_001, 999_999, 1_000_000]
    for number in random.Random(0).sample(numbers, len(numbers)):
        (tmp_path / f"shard-{number:05d}.parquet").write_text("")
    assert [int(path.stem.partition("-")[2]) for path in data_files(tmp_path)] == numbers


def test_remove_tree_of_a_link_removes_the_link_alone(tmp_path):
    outside = write_shard(tmp_path / "outside", "kept")
    for name in ("link", "dangling"):
        (tmp_path / name).symlink_to(tmp_path / ("outside" if name == "link" else "nowhere"))
        remove_tree(tmp_path / name)
        assert not (tmp_path / name).is_symlink()
    assert outside.read_text() == "kept"


@pytest.mark.parametrize("remote", [False, True])
def test_what_is_published_is_recorded_by_its_path(tmp_path, store, remote):
    folder = store if remote else tmp_path
    write_shard(folder, "before")
    with recording() as entries:
        shard = write_shard(folder, "content")
        with publish_folder(folder / "model") as part:
            (part / "weights").mkdir()
            (part / "weights" / "w").write_text("weights")
        (folder / "by hand").write_text("rest")
        record(folder / "by hand")
    write_shard(folder, "after", "shard-00001.parquet")
    assert entries == {path: file_entry(path) for path in (shard, folder / "model/weights/w", folder / "by hand")}


def test_remove_tree_passes_over_a_file_that_another_process_removes_meanwhile(tmp_path, monkeypatch):
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(Path, "rglob", lambda folder, pattern: iter([folder / "gone"]))
    remove_tree(tmp_path / "scratch")
    assert not (tmp_path / "scratch").exists()
