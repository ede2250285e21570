"""ifguide.corpus.inputs: files are known by their contents, and read again only when they were touched."""

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ifguide.config import ConfigError, Input, config_from_mapping
from ifguide.corpus.inputs import (
    INPUTS,
    InputFile,
    at_commits,
    digest_input,
    hub_commits,
    input_files,
    unchanged,
    write_commits,
    write_inputs,
)
from ifguide.run import Run
from ifguide.stages.pack_corpus import pack_corpus
from ifguide.storage import location


class Tasks:
    """Tasks in this process; `read` names the files that they read."""

    def __init__(self) -> None:
        self.read: list[str] = []

    def __call__(self, function: Callable[..., Any], calls: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
        for arguments in calls:
            self.read.append(Path(arguments[0]).name)
            yield function(*arguments)


def write(folder: Path, **contents: str) -> list[str]:
    for name, content in contents.items():
        (folder / name).write_text(content)
    return [str(folder / name) for name in contents]


def test_only_what_was_touched_is_read_again_and_contents_are_what_counts(tmp_path):
    paths, tasks = write(tmp_path, a="one", b="two", c="three"), Tasks()
    first = input_files(tmp_path / "corpus", [*paths, paths[0]], tasks)
    assert list(first) == paths
    write_inputs(tmp_path / "corpus", first)
    assert input_files(tmp_path / "corpus", paths, tasks) == first
    assert tasks.read == ["a", "b", "c"]
    times = os.stat(paths[1])
    write(tmp_path, b="TWO")
    os.utime(paths[1], ns=(times.st_atime_ns, times.st_mtime_ns))  # as long and as old as before
    os.utime(paths[2])
    again = input_files(tmp_path / "corpus", paths, tasks)
    assert tasks.read == ["a", "b", "c", "b", "c"]
    assert [again[path].sha256 == first[path].sha256 for path in paths] == [True, False, True]


def test_a_damaged_record_is_read_anew(tmp_path):
    paths, tasks = write(tmp_path, a="one"), Tasks()
    first = input_files(tmp_path, paths, tasks)
    write_inputs(tmp_path, first)
    record = tmp_path / INPUTS
    record.write_text(record.read_text().replace(first[paths[0]].sha256, "0" * 64))
    assert input_files(tmp_path, paths, tasks) == first
    assert tasks.read == ["a", "a"]


@pytest.mark.parametrize("remote", [False, True])
@pytest.mark.parametrize(
    ("content", "happened"),
    [("content, more", "grew from 7 to 13 bytes"), ("cont", "shrank from 7 to 4 bytes"), ("CONTENT", "was written to")],
)
@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_a_file_that_changes_while_it_is_packed_is_said(tmp_path, store, remote, content, happened, when):
    (path,) = write(store if remote else tmp_path, a="content")
    _, file = digest_input(path)

    def read() -> None:
        with unchanged({path: file}):
            if when == "meanwhile":
                location(path).write_text(content)
                raise KeyError  # what reading it came to

    if when == "before":
        location(path).write_text(content)
    with pytest.raises(ValueError, match=f"a {happened} while it was packed"):
        read()


def test_a_file_that_is_gone_is_said(tmp_path):
    file = InputFile(stamp="1", bytes=1, sha256="0")
    with pytest.raises(ValueError, match="is gone while it was packed"), unchanged({str(tmp_path / "a"): file}):
        pass


@pytest.mark.parametrize("change", ["grows", "grows from nothing", "is replaced"])
def test_a_file_that_changes_after_it_was_cut_into_chunks_is_refused(tmp_path, monkeypatch, change):
    """What is added lies in no chunk, though the digest is of all of it."""
    name = "b.parquet" if change == "is replaced" else "b.jsonl"
    (tmp_path / "docs").mkdir()
    write(tmp_path / "docs", **{"a.jsonl": '{"text": "whole"}\n'})

    def write_rows(count: int) -> None:
        if name == "b.parquet":
            table = pa.table({"text": ["text"] * count})
            pq.write_table(table, tmp_path / "new", row_group_size=1)
            os.replace(tmp_path / "new", tmp_path / "docs" / name)
        else:
            (tmp_path / "docs" / name).write_text('{"text": "text"}\n' * count)

    write_rows(0 if change == "grows from nothing" else 1)

    def start(cluster: object) -> None:
        write_rows(2)

    monkeypatch.setattr("ifguide.stages.pack_corpus.connect", start)
    monkeypatch.setattr("ifguide.stages.pack_corpus.run_tasks", lambda resources: Tasks())
    tree = {"run_dir": str(tmp_path / "run"), "tokenizer": "t", "pack_corpus": {"inputs": [str(tmp_path / "docs")]}}
    with pytest.raises(ValueError, match=rf"{name} was written to since the corpus was begun; run again when"):
        pack_corpus(Run(config=config_from_mapping(tree)))
    assert not (tmp_path / "run").exists()


def test_a_hub_dataset_stays_at_the_commit_that_its_corpus_was_begun_with(tmp_path, monkeypatch):
    class Told:
        sha = "c0ffee"

    def dataset_info(self: object, name: str, *, revision: str | None, timeout: float) -> Told:
        if name == "not/reached":
            raise OSError("no network")
        return Told()

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", dataset_info)
    inputs = [Input(path="hf://a/b", split="train"), Input(path="hf://a/b:test", revision="v1"), Input(path="a.jsonl")]
    inputs.append(Input(path="hf://not/reached", revision="v2"))
    commits = hub_commits([tmp_path], inputs)
    assert commits == {"a/b@main": "c0ffee", "a/b@v1": "c0ffee"}
    write_commits(tmp_path, commits)
    Told.sha = "later"
    assert hub_commits([tmp_path], [*inputs, Input(path="hf://c/d")]) == {**commits, "c/d@main": "later"}
    # The same documents in another tokenizer's tokens: those commits, unless this corpus was begun at others.
    other = tmp_path / "other"
    assert hub_commits([other, tmp_path], inputs) == commits
    write_commits(other, {"a/b@v1": "own"})
    assert hub_commits([other, tmp_path], inputs) == commits | {"a/b@v1": "own"}
    assert [source.revision for source in at_commits(inputs, commits)] == ["c0ffee", "c0ffee", None, "v2"]


def test_a_finished_corpus_of_a_hub_dataset_asks_the_hub_nothing(tmp_path, monkeypatch):
    tree = {"run_dir": str(tmp_path), "tokenizer": "t", "pack_corpus": {"inputs": ["hf://a/b"]}}
    run = Run(config=config_from_mapping(tree))
    begun = run.open(
        run.corpus, "pack_corpus", keys=("pack_corpus", "tokenizer"), inputs={}, extra={"tokenizer": "t", "files": {}}
    )
    asked: list[str] = []
    monkeypatch.setattr("datasets.load_dataset", lambda name, *options, **more: asked.append(name))
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda hub, name, **more: asked.append(name))
    manifest = begun.finish([], rows={"blocks": 1}, summary={})
    assert pack_corpus(run) == manifest
    assert asked == []


@pytest.mark.parametrize(
    ("source", "key"),
    [
        ({"path": "hf://a/b:train", "split": "test"}, "split"),
        ({"path": "a.jsonl", "split": "test"}, "split"),
        ({"path": "a.jsonl", "subset": "en"}, "subset"),
        ({"path": "a.jsonl", "revision": "v1"}, "revision"),
    ],
)
def test_what_is_of_hub_datasets_is_refused_of_files(source, key):
    for where in ("pack_corpus.inputs", "evaluate.heldout"):
        section, name = where.split(".")
        with pytest.raises(ConfigError, match=rf"{section}\.{name}\[0\]\.{key}: "):
            config_from_mapping({section: {name: [source]}})
