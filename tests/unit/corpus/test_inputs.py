"""ifguide.corpus.inputs: files are known by their contents, and read again only when they were touched."""

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ifguide.corpus.inputs import INPUTS, InputFile, digest_input, input_files, unchanged, write_inputs
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
        with unchanged(path, file):
            if when == "meanwhile":
                location(path).write_text(content)
                raise KeyError  # what reading it came to

    if when == "before":
        location(path).write_text(content)
    with pytest.raises(ValueError, match=f"a {happened} while it was packed"):
        read()


def test_a_file_that_is_gone_is_said_and_a_hub_dataset_has_no_stamp(tmp_path):
    file = InputFile(stamp="1", bytes=1, sha256="0")
    with pytest.raises(ValueError, match="is gone while it was packed"), unchanged(str(tmp_path / "a"), file):
        pass
    with unchanged("hf://some/dataset", None):
        pass
