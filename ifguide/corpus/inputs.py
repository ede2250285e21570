"""The files that a corpus is packed of, known by their contents.

A file is read once to be known by its SHA-256. `inputs.json` in the corpus keeps that with the file's stamp (size,
times, inode), so that a rerun reads only files that were touched since. While a corpus is packed its inputs must stay
as they are, from before they are cut into chunks: a chunk is a range of bytes, and would miss what is added behind it.
Whoever reads a file checks its stamp before and after. Of a store that tells no stamp the contents are read for that.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ifguide.artifacts import file_entry, read_sealed, write_sealed
from ifguide.config import Input, redact
from ifguide.corpus.reading import document_files, hub_name
from ifguide.storage import location, stamp

INPUTS = "inputs.json"
COMMITS = "hub.json"  # of hub datasets
HUB_SECONDS = 10.0
RunTasks = Callable[[Callable[..., Any], Iterable[tuple[Any, ...]]], Iterator[Any]]  # a function on many arguments


@dataclass(frozen=True, kw_only=True)
class InputFile:
    """What a file held when it had this stamp; None where its store tells no stamp."""

    stamp: str | None
    bytes: int
    sha256: str


def input_files(corpus: Path, paths: Iterable[str], run_tasks: RunTasks) -> dict[str, InputFile]:
    """What the files hold, by path; tasks read those that are not in the corpus' record, or were touched since.

    Raises:
        FileNotFoundError: a file is gone. ValueError: one is being written to.
    """
    recorded = _recorded(corpus)
    files = {path: recorded[redact(path)] for path in paths if redact(path) in recorded}
    files = {path: file for path, file in files.items() if file.stamp and file.stamp == stamp(location(path))}
    touched = sorted(set(paths) - files.keys())
    if touched:
        files |= run_tasks(digest_input, ((path,) for path in touched))
    return dict(sorted(files.items()))


def input_marks(inputs: Sequence[Input], *, apart: Path | None = None) -> dict[str, str | int]:
    """The stamp of every file of the inputs, by path; its size where its store tells no stamp. Those of the hub, and
    what lies below the folder `apart`, are left out.

    Raises:
        FileNotFoundError: nothing matches an input's path; names the config key. ValueError: a file of another kind.
    """
    keyed = {f"pack_corpus.inputs[{index}].path": source for index, source in enumerate(inputs) if not source.on_hub}
    return {
        str(path): stamp(path) or path.stat().st_size
        for key, source in keyed.items()
        for path in document_files(source, key, apart=apart)
    }


def require_marks(marks: Mapping[str, str | int], files: Mapping[str, InputFile], paths: Iterable[str]) -> None:
    """That the files still have the marks which `input_marks` told before they were cut, each of `paths` among them.
    `files`: what those with chunks hold now; one without a row has no chunk.

    Raises:
        FileNotFoundError: a file is gone. ValueError: one was written to since, or is new.
    """
    now = {path: files[path].stamp or files[path].bytes for path in marks.keys() & files.keys()}
    now |= {path: stamp(place := location(path)) or place.stat().st_size for path in marks.keys() - files.keys()}
    for path in sorted({*marks, *paths}):
        if path not in marks or marks[path] != now[path]:
            raise ValueError(f"{path} was written to since the corpus was begun; run again when it is whole")


def digest_input(path: str) -> tuple[str, InputFile]:
    """What a file holds, with its path.

    Raises:
        ValueError: it was written to meanwhile.
    """
    file = location(path)
    before = stamp(file)
    contents = InputFile(stamp=before, **file_entry(file))
    if stamp(file) != before:
        raise ValueError(f"{path} was written to while it was read; pack it when it is whole")
    return path, contents


def write_inputs(corpus: Path, files: Mapping[str, InputFile]) -> None:
    """Record the files in a corpus, for the next run."""
    files = {redact(path): file for path, file in files.items()}
    if _recorded(corpus) != files:
        write_sealed(corpus / INPUTS, {"files": {path: dataclasses.asdict(file) for path, file in files.items()}})


@contextlib.contextmanager
def unchanged(files: Mapping[str, InputFile]) -> Iterator[None]:
    """Read files within, by path, which are those that were planned with.

    Raises:
        ValueError: one grew, shrank, is gone or was changed otherwise, before or meanwhile.
    """
    for path, file in files.items():
        _check(path, file)
    try:
        yield
    finally:
        for path, file in files.items():
            _check(path, file)  # first: what went wrong within may come of it


def hub_commits(corpora: Iterable[Path], inputs: Iterable[Input]) -> dict[str, str]:
    """The commit of each dataset of the hub, by `name@revision`: that which the first of these corpora to have one was
    begun with, else the one that the hub tells now; none where it tells none."""
    commits: dict[str, str] = {}
    for corpus in corpora:
        with contextlib.suppress(FileNotFoundError, KeyError, ValueError):
            commits = read_sealed(corpus / COMMITS)["commits"] | commits
    on_hub = {_at_revision(source): source for source in inputs if source.on_hub}
    told = {key: _told_commit(source) for key, source in on_hub.items() if key not in commits}
    return commits | {key: commit for key, commit in told.items() if commit}


def at_commits(inputs: Iterable[Input], commits: Mapping[str, str]) -> tuple[Input, ...]:
    """The inputs, with the commit for the revision of each hub dataset whose commit is known."""
    return tuple(
        replace(source, revision=commits.get(_at_revision(source), source.revision)) if source.on_hub else source
        for source in inputs
    )


def write_commits(corpus: Path, commits: Mapping[str, str]) -> None:
    """Record the commits, so that a run that goes on reads the same ones."""
    if commits:
        write_sealed(corpus / COMMITS, {"commits": dict(commits)})


def _at_revision(source: Input) -> str:
    return f"{hub_name(source)[0]}@{source.revision or 'main'}"


def _told_commit(source: Input) -> str | None:
    from huggingface_hub import HfApi

    try:
        return HfApi().dataset_info(hub_name(source)[0], revision=source.revision, timeout=HUB_SECONDS).sha
    except Exception:  # of the client's many kinds; reading the dataset says what is wrong, if anything is
        return None


def _check(path: str, file: InputFile) -> None:
    place = location(path)
    try:
        mark = stamp(place)
        if mark == file.stamp and (mark is not None or file_entry(place)["sha256"] == file.sha256):
            return
        now = place.stat().st_size
    except FileNotFoundError:
        happened = "is gone"
    else:
        change = "grew" if now > file.bytes else "shrank"
        happened = f"{change} from {file.bytes:,} to {now:,} bytes" if now != file.bytes else "was written to"
    raise ValueError(
        f"{path} {happened} while it was packed: inputs must stay as they are. Run again when it is whole; if its"
        " contents are others then, delete the corpus first"
    )


def _recorded(corpus: Path) -> dict[str, InputFile]:
    try:
        recorded: dict[str, Any] = read_sealed(corpus / INPUTS)["files"]
        return {path: InputFile(**file) for path, file in recorded.items()}
    except (FileNotFoundError, KeyError, ValueError, TypeError):
        return {}  # then they are read again
