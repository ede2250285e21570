"""Folders that go to a remote file system and come back, on fsspec's file system in memory."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import pytest

from ifguide.artifacts import publish_folder, verified
from ifguide.corpus.inputs import digest_input, input_files, unchanged, write_inputs
from ifguide.records.choice import RowChoice
from ifguide.records.files import list_files
from ifguide.storage import (
    Mirror,
    download_folder,
    file_sizes,
    local_copy,
    location,
    machine_folder,
    stamp,
    upload_folder,
)
from tests.s3_server import s3_server
from tests.unit.artifacts.test_artifact import SHARD, opened, write_shard

pytest.importorskip("upath")
TEXTS = {"a": "one", "sub/b": "second", "sub/deep/c": ""}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, text in TEXTS.items():
        path = tmp_path / "source" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "source"


def texts(folder: Path) -> dict[str, str]:
    return {name: (folder / name).read_text() for name in file_sizes(folder)}


def test_a_folder_comes_back_whole(folder: Path, store: Path, tmp_path: Path) -> None:
    upload_folder(folder, store)
    assert texts(store) == TEXTS
    download_folder(store, tmp_path / "back")
    assert texts(tmp_path / "back") == TEXTS
    upload_folder(folder, store / "some", ["sub/b"])
    assert texts(store / "some") == {"sub/b": "second"}
    upload_folder(folder, store / "none", [])
    download_folder(store / "none", tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_mirror_moves_only_what_is_new(folder: Path, store: Path) -> None:
    upload_folder(folder, store)
    first, second = Mirror(store), Mirror(store)
    first.pull()
    assert texts(first.local) == TEXTS
    (first.local / "a").write_text("changed, which files here never do")
    (first.local / "new").write_text("by the first")
    first.push()
    assert texts(store) == {**TEXTS, "new": "by the first"}
    second.pull()
    assert texts(second.local) == texts(store)
    (store / "later").write_text("by another machine")
    second.pull(lambda name: name != "later")
    assert not (second.local / "later").exists()
    second.pull()
    assert (second.local / "later").read_text() == "by another machine"


@pytest.mark.parametrize("remote", [False, True])
def test_a_folder_is_published_whole_or_not_at_all(remote: bool, store: Path, tmp_path: Path) -> None:
    folder = (store if remote else tmp_path) / "made"
    for made in ({"a": "one", "b": "two"}, {"b": "three"}):
        with publish_folder(folder) as part:
            for name, text in made.items():
                (part / name).write_text(text)
        assert texts(folder) == made

    def fail() -> None:
        with publish_folder(folder) as part:
            (part / "half").write_text("of it")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert texts(folder) == made
    with publish_folder(folder) as part:
        assert not list(part.iterdir())  # what the failed one left is gone
        (part / "c").write_text("four")
    assert texts(folder) == {"c": "four"}


def test_a_file_that_comes_short_is_an_error(
    folder: Path, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload_folder(folder, store)
    monkeypatch.setenv("IFGUIDE_CACHE", str(tmp_path / "cache"))
    fs: Any = store.fs  # type: ignore[attr-defined]
    whole = fs.get_file

    def cut(source: str, target: str, **options: Any) -> None:
        whole(source, target, **options)
        if source.endswith("/b"):
            Path(target).write_text("sec")

    monkeypatch.setattr(fs, "get_file", cut)
    for read in (lambda: download_folder(store, tmp_path / "back"), lambda: local_copy(store / "sub/b")):
        with pytest.raises(OSError, match=r"/sub/b: 3 of 6 bytes were read"):
            read()


@pytest.mark.parametrize("made", ["writable by the group", "writable by others", "a link", "of another user"])
def test_a_cache_that_another_user_could_have_made_is_refused(
    made: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("IFGUIDE_CACHE", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder = machine_folder()
    assert folder.parent == tmp_path
    assert folder.stat().st_mode & 0o777 == 0o700
    assert machine_folder() == folder, "its own is taken again"
    if made == "a link":
        folder.rmdir()
        (tmp_path / "elsewhere").mkdir(mode=0o700)
        folder.symlink_to(tmp_path / "elsewhere")
    elif made == "of another user":
        another = os.getuid() + 1
        folder.rename(tmp_path / f"ifguide-cache-{another}")
        monkeypatch.setattr(os, "getuid", lambda: another)
    else:
        folder.chmod(0o770 if made == "writable by the group" else 0o707)
    with pytest.raises(PermissionError, match=r"ifguide-cache-\d+ is not a folder of yours .* set IFGUIDE_CACHE"):
        machine_folder()


def test_a_cache_that_the_user_chose_may_be_shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared").chmod(0o777)
    (tmp_path / "link").symlink_to(tmp_path / "shared")
    for name in ("shared", "link", "new/folder"):
        monkeypatch.setenv("IFGUIDE_CACHE", str(tmp_path / name))
        assert machine_folder() == tmp_path / name / f"ifguide-cache-{os.getuid()}"
        assert machine_folder().is_dir()


def test_an_object_that_stands_for_a_folder_is_no_file_of_it(tmp_path: Path) -> None:
    pytest.importorskip("moto.server")
    pytest.importorskip("s3fs")
    with s3_server(tmp_path):
        folder: Any = location("s3://lake/docs")
        for name in ("", "docs/", "docs/a.txt", "b.txt", "empty/"):
            folder.fs.pipe_file(f"lake/docs/{name}", b"text" if name.endswith(".txt") else b"")
        assert file_sizes(folder) == {"b.txt": 4, "docs/a.txt": 4}
        for path in ("s3://lake/docs", "s3://lake/docs/", "s3://lake/*", "s3://lake/docs/*", "s3://lake/docs/**"):
            assert {str(file) for file in list_files(path, "k")} == {
                "s3://lake/docs/b.txt",
                "s3://lake/docs/docs/a.txt",
            }
        with pytest.raises(FileNotFoundError, match="folder s3://lake/docs/empty holds no"):
            list_files("s3://lake/docs/empty", "k")


@pytest.mark.parametrize("text", ["hdfs://namenode:9000/runs", "abfs://box@account.dfs.core.windows.net/runs"])
def test_a_host_that_workers_would_not_be_told_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are given paths as text, which leaves it out."""
    monkeypatch.setattr("upath.core.UPath.fs", property(lambda path: None), raising=False)
    with pytest.raises(ValueError, match=r"workers would not be told the host; .* fs\.defaultFS"):
        location(text)


@pytest.mark.parametrize("text", ["hdfs:///runs", "s3://bucket/runs", "s3://key:secret@bucket/runs", "gs://bucket/a"])
def test_a_place_without_a_host_is_taken(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("upath.core.UPath.fs", property(lambda path: None), raising=False)
    assert str(location(text)).endswith(text.rpartition("@")[2].partition("://")[2].lstrip("/"))


def test_one_file_is_copied_from_a_store_that_lists_it_by_name_alone(
    folder: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload_folder(folder, store)
    fs = store.fs  # type: ignore[attr-defined]
    find = type(fs).find
    monkeypatch.setattr(
        type(fs), "find", lambda self, path, **options: [path] if self.isfile(path) else find(self, path, **options)
    )
    assert local_copy(store / "a").read_text() == "one"


@pytest.mark.parametrize("name", ["etag", "ETag", "last_modified", "updated"])
def test_a_file_that_is_written_anew_at_the_same_size_has_another_stamp(
    name: str, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever its store calls the tag or the time."""
    describe(store, monkeypatch, name=name)
    (store / "a").write_text("one")
    first, copy = stamp(store / "a"), local_copy(store / "a")
    assert stamp(store / "a") == first
    assert local_copy(store / "a") == copy
    (store / "a").write_text("two")
    assert stamp(store / "a") != first
    assert local_copy(store / "a").read_text() == "two"


def test_of_a_store_without_tags_and_times_nothing_is_trusted(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    describe(store, monkeypatch)
    rows, folder = store / "rows.txt", store / "made"
    rows.write_text("1\n")
    _, file = digest_input(str(rows))
    assert file.stamp is None
    write_inputs(tmp_path, {str(rows): file})
    with unchanged({str(rows): file}):
        assert RowChoice.of(str(rows)).start == 1
    copy = local_copy(rows)
    assert local_copy(rows) == copy
    artifact = opened(folder)
    artifact.finish([write_shard(folder, "one")], rows={}, summary={})
    verified(folder, SHARD)

    rows.write_text("2\n")
    (folder / SHARD).write_text("two")
    assert input_files(tmp_path, [str(rows)], lambda function, calls: (function(*call) for call in calls)) != {
        str(rows): file
    }
    assert RowChoice.of(str(rows)).start == 2
    assert (local_copy(rows).read_text(), copy.read_text()) == ("2\n", "1\n")
    with pytest.raises(ValueError, match="was written to while it was packed"), unchanged({str(rows): file}):
        pass
    with pytest.raises(ValueError, match="has changed since it was made"):
        verified(folder, SHARD)


def describe(store: Path, monkeypatch: pytest.MonkeyPatch, name: str | None = None) -> None:
    """Have the store describe files by size, and by a time of this name."""
    kind = type(store.fs)  # type: ignore[attr-defined]
    info = kind.info

    def described(fs: Any, path: str, **options: Any) -> dict[str, Any]:
        entry = dict(info(fs, path, **options))
        time = entry.pop("created", None)
        return entry if name is None else {**entry, name: str(time)}

    find = kind.find
    monkeypatch.setattr(kind, "info", described)
    monkeypatch.setattr(
        kind,
        "find",
        lambda fs, path, **options: {file: described(fs, file) for file in find(fs, path)},
    )
