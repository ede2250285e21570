"""ifguide.artifacts.reading: no file is read that is not the one that was made."""

import os

import pytest

from ifguide.artifacts import reading, remove_tree, verified, verified_files, verify_digest
from tests.unit.artifacts.test_artifact import SHARD, made, opened, write_shard


def test_a_file_that_changed_or_does_not_belong_is_refused_by_its_digest(tmp_path):
    artifact = opened(tmp_path / "a")
    artifact.finish([write_shard(artifact.folder, "content")], rows={}, summary={})
    assert verified(artifact.folder, SHARD) == artifact.folder / SHARD
    (artifact.folder / SHARD).write_text("contend")
    with pytest.raises(ValueError, match=rf"{SHARD} has changed since it was made: SHA-256 \w{{16}}.*run `ifguide v`"):
        verified(artifact.folder, SHARD)
    with pytest.raises(ValueError, match=r"other\.parquet is not in .*manifest\.json"):
        verified(artifact.folder, "other.parquet")


@pytest.mark.parametrize("remote", [False, True])
def test_every_file_is_checked_once_and_again_when_it_was_touched(tmp_path, store, remote, monkeypatch):
    folder = store if remote else tmp_path
    artifact = opened(folder)
    names = [f"shard-{number:05d}.parquet" for number in (0, 99_999, 100_000)]
    artifact.finish([write_shard(folder, name, name) for name in names], rows={}, summary={})
    (folder / "shard-00001.parquet").write_text("of nobody")
    reads = []
    digest = reading.file_digest
    monkeypatch.setattr(reading, "file_digest", lambda path: reads.append(path.name) or digest(path))
    assert [path.name for path in verified_files(folder)] == names
    assert [path.name for path in verified_files(folder)] == names
    assert reads == names
    (folder / names[1]).write_text(names[0])
    with pytest.raises(ValueError, match=rf"{names[1]} has changed since it was made"):
        list(verified_files(folder))


def test_a_remade_artifact_is_checked_by_its_new_manifest(tmp_path):
    for content in ("old", "new"):
        remove_tree(tmp_path / "a")
        made(tmp_path / "a", content=content)
        assert verified(tmp_path / "a", SHARD).read_text() == content


def test_a_file_that_is_gone_is_said_with_what_to_do(tmp_path):
    made(tmp_path)
    os.unlink(tmp_path / SHARD)
    with pytest.raises(ValueError, match=rf"{SHARD} is gone; delete {tmp_path} and run `ifguide v` again"):
        verified(tmp_path, SHARD)
    with pytest.raises(ValueError, match=rf"{SHARD} is gone"):
        verify_digest(tmp_path / SHARD, "0" * 64, "v")
    with pytest.raises(ValueError, match="run `ifguide import-mask` again"):
        verify_digest(tmp_path / SHARD, "0" * 64, "import_mask")
    with pytest.raises(ValueError, match="run `ifguide build_mask` again"):
        verify_digest(tmp_path / SHARD, "0" * 64, "build_mask")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        verified(tmp_path / "nothing", SHARD)
