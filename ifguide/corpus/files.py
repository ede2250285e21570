"""Which files an input names, and of what kind each is.

What is taken: `.jsonl`, `.ndjson`, `.json`, `.parquet` and `.txt`, in any case of letters, and all but Parquet also
compressed (`.gz`, `.zst`, `.bz2`). A `.json` file may hold JSON lines.

Of a folder, everything below it is taken, through links too. Never taken are hidden files and folders and those whose
names begin with `_`, and what describes a data set: README, LICENSE, NOTICE, `dataset_infos.json`, and the like. Any
other file is an error that names it: half a corpus must not be lost without a word. A pattern takes what it matches,
hidden files apart; folders that it matches are taken as folders, unless `**` has entered them already.
"""

from __future__ import annotations

import glob
import io
import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Literal

import pyarrow as pa

from ifguide.storage import is_remote, location, matching

Kind = Literal["jsonl", "parquet", "text", "json"]

KINDS: dict[str, Kind] = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".parquet": "parquet", ".txt": "text"}
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}
DESCRIPTIONS = ("dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json", "croissant.json")
PROSE = ("readme", "license", "licence", "notice", "citation")
PROSE_SUFFIXES = ("", ".md", ".txt", ".rst", ".html", ".bib", ".cff")
SHOWN_FILES = 10
FIRST_LINE_BYTES = 2**26  # of a .json file: longer ones are no JSON lines


def list_files(path: str, dotted_key: str) -> list[Path]:
    """The files of an input in reading order.

    Raises:
        FileNotFoundError: nothing is there, or a link leads nowhere. ValueError: a file of a kind that is not read, or
            links that go in a circle. Both name the config key.
    """
    place = location(path) if "://" in path else Path(path).expanduser()
    if place.is_dir():
        files = _checked(list(_below(place, dotted_key)), dotted_key)
        if not files:
            raise FileNotFoundError(f"{dotted_key}: folder {path} holds no {', '.join(KINDS)} file")
        return files
    if place.is_file():
        return _checked([place], dotted_key)
    matches = matching(place) if is_remote(place) else sorted(map(Path, glob.glob(str(place), recursive=True)))
    files = [item for item in matches if item.is_file()]
    if "**" not in path:
        files = sorted([*files, *(file for item in matches if item.is_dir() for file in _below(item, dotted_key))])
    if not files:
        raise FileNotFoundError(f"{dotted_key}: no file matches {path}")
    return _checked(files, dotted_key)


def kind_of(path: Path) -> Kind | None:
    """The kind of a file by its name; None: it is not read."""
    suffix = path.suffix.lower()
    if suffix in COMPRESSIONS:
        kind = KINDS.get(Path(path.stem).suffix.lower())
        return None if kind == "parquet" else kind
    return KINDS.get(suffix)


def is_compressed(path: Path) -> bool:
    """Whether a file is compressed as a whole: it can be read from its beginning alone."""
    return path.suffix.lower() in COMPRESSIONS


def open_bytes(path: Path) -> IO[bytes]:
    """A file's bytes, decompressed.

    Raises:
        OSError, while it is read: a compressed file is damaged or cut off.
    """
    file = path.open("rb")
    if not is_compressed(path):
        return file
    stream = pa.CompressedInputStream(pa.PythonFile(file, mode="r"), COMPRESSIONS[path.suffix.lower()])
    return io.BufferedReader(stream)


def holds_json_lines(path: Path, text_column: str) -> bool:
    """Whether a `.json` file has one object a line: more than one, or one with the text column."""
    with open_bytes(path) as file:
        first = next((line for line in _lines(file, FIRST_LINE_BYTES) if line.strip()), b"")
        try:
            content = json.loads(first)
        except (ValueError, RecursionError):
            return False
        return isinstance(content, dict) and (
            isinstance(content.get(text_column), str) or any(line.strip() for line in _lines(file, 2**16))
        )


def short_names(paths: list[str]) -> dict[str, str]:
    """A name for each file: its path below the folder that holds them all, so that it says which file is meant, and
    does not change when the folder is moved."""
    folders = [path.split("/")[:-1] for path in paths]
    common = sum(1 for _ in itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*folders, strict=False)))
    return {path: "/".join(path.split("/")[common:]) for path in paths}


def _below(folder: Path, dotted_key: str, above: tuple[str, ...] = ()) -> Iterator[Path]:
    """The files below a folder, sorted by path; `above` has the real paths of the folders it lies in."""
    real = str(folder) if is_remote(folder) else os.path.realpath(folder)
    if real in above:
        raise ValueError(f"{dotted_key}: {folder} is a link to a folder that holds it; remove the link")
    for item in sorted(folder.iterdir()):
        if item.name.startswith((".", "_")):
            continue
        if item.is_dir():
            yield from _below(item, dotted_key, (*above, real))
        elif not item.exists():
            raise FileNotFoundError(f"{dotted_key}: {item} is a link to nothing; mend or remove it")
        elif not _describes(item.name):
            yield item


def _describes(name: str) -> bool:
    stem, suffix = os.path.splitext(name.lower())
    return name.lower() in DESCRIPTIONS or (stem in PROSE and suffix in PROSE_SUFFIXES)


def _checked(files: list[Path], dotted_key: str) -> list[Path]:
    others = [str(path) for path in files if kind_of(path) is None]
    if others:
        more = f" and {len(others) - SHOWN_FILES} more" if len(others) > SHOWN_FILES else ""
        raise ValueError(
            f"{dotted_key}: not read are {', '.join(others[:SHOWN_FILES])}{more}; what is read ends in"
            f" {', '.join(KINDS)}, all but Parquet also with {', '.join(COMPRESSIONS)} behind. Convert them, move them"
            " away, or name the files by a pattern"
        )
    return files


def _lines(file: Any, size: int) -> Iterator[bytes]:
    """The lines of the next `size` bytes, the last one cut off where they end."""
    yield from file.read(size).removeprefix(b"\xef\xbb\xbf").splitlines()
