"""Which files an input names, and of what kind each is.

What is taken: `.jsonl`, `.ndjson`, `.json`, `.csv`, `.tsv`, `.parquet`, `.arrow` and `.txt`, in any case of letters,
and all but Parquet and Arrow also compressed (`.gz`, `.zst`, `.bz2`). A `.json` file may hold JSON lines. Prompts and
labelled texts are tables: of them `.txt` is not read.

Of a folder, everything below it is taken, through links too, but for the run's own directory. Never taken are hidden
files and folders and those whose names begin with `_`, what describes a data set (README, LICENSE, NOTICE,
`dataset_infos.json`, and the like), and `cache-*.arrow`, what `datasets` keeps beside a data set that it saved. Any
other file is an error that names it: half a corpus must not be lost without a word. A pattern takes what it matches,
hidden files apart; folders that it matches are taken as folders, and a file that it finds twice is taken once.
"""

from __future__ import annotations

import codecs
import glob
import io
import itertools
import json
import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import IO, Literal

import pyarrow as pa

from ifguide.storage import entries, is_remote, location, matching

Kind = Literal["jsonl", "parquet", "arrow", "text", "json", "csv"]

KINDS: dict[str, Kind] = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".parquet": "parquet", ".arrow": "arrow", ".txt": "text",
    ".csv": "csv", ".tsv": "csv",
}  # fmt: skip
DOCUMENTS: tuple[Kind, ...] = ("jsonl", "json", "parquet", "arrow", "text", "csv")
TABLES: tuple[Kind, ...] = ("jsonl", "json", "parquet", "arrow", "csv")
COLUMNAR: tuple[Kind, ...] = ("parquet", "arrow")  # compressed within
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}
DESCRIPTIONS = ("dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json", "croissant.json")
PROSE = ("readme", "license", "licence", "notice", "citation")
PROSE_SUFFIXES = ("", ".md", ".txt", ".rst", ".html", ".bib", ".cff")
SHOWN_FILES = 10
FIRST_LINE_BYTES = 2**26  # of a .json file: longer ones are no JSON lines


def list_files(
    path: str, dotted_key: str, kinds: Collection[Kind] = DOCUMENTS, *, apart: Path | None = None
) -> list[Path]:
    """The files of an input in reading order, but for those below the folder `apart`: the run's own.

    Raises:
        FileNotFoundError: nothing is there, or a link leads nowhere. ValueError: a file of a kind that is not read, or
            links that go in a circle. Both name the config key.
    """
    place = _place(path)
    if place.is_dir():
        files = _checked(list(_below(place, dotted_key, apart)), dotted_key, kinds)
        if not files:
            more = " (it is the run's own)" if apart is not None and real_path(apart) == real_path(place) else ""
            raise FileNotFoundError(f"{dotted_key}: folder {path}{more} holds no {', '.join(_suffixes(kinds))} file")
        return files
    if place.is_file():
        return _checked([place], dotted_key, kinds)
    if not glob.has_magic(path):
        raise FileNotFoundError(f"{dotted_key}: {path} does not exist: check the path")
    matches = matching(place) if is_remote(place) else _matching(place)
    if apart is not None:
        own, fixed = real_path(apart), named_folder(path)
        if own not in map(real_path, (fixed, *fixed.parents)):  # else its files are named on purpose
            matches = [item for item in matches if own not in map(real_path, (item, *item.parents))]
    for item in matches:
        _require_something(item, dotted_key)
    files = [item for item in matches if item.is_file()]
    if place.name != "**":  # which matches every file itself
        files = sorted(
            {*files, *(file for item in matches if item.is_dir() for file in _below(item, dotted_key, apart))}
        )
    if "**" in path and not is_remote(place):
        _require_no_circle(files, dotted_key)
    if not files:
        raise FileNotFoundError(f"{dotted_key}: no file matches {path}")
    return _checked(files, dotted_key, kinds)


def named_folder(path: str) -> Path:
    """The folder that a path names; of a file or a pattern the one without wildcards that it lies in."""
    place = _place(path)
    return place if place.is_dir() else next(above for above in place.parents if not glob.has_magic(str(above)))


def _place(path: str) -> Path:
    return location(path) if "://" in path else Path(path).expanduser()


def _matching(pattern: Path) -> list[Path]:
    """The local files and folders that a pattern matches, sorted, each once: several `**` of it find one repeatedly."""
    return sorted({Path(name) for name in glob.glob(str(pattern), recursive=True)})


def real_path(path: Path) -> str:
    """The one name of a file or folder, however links and relative paths lead to it."""
    return str(path) if is_remote(path) else os.path.realpath(path)


def kind_of(path: Path) -> Kind | None:
    """The kind of a file by its name; None: it is not read."""
    suffix = path.suffix.lower()
    if suffix in COMPRESSIONS:
        kind = KINDS.get(Path(path.stem).suffix.lower())
        return None if kind in COLUMNAR else kind
    return KINDS.get(suffix)


def is_compressed(path: Path) -> bool:
    """Whether a file is compressed as a whole: it can be read from its beginning alone."""
    return path.suffix.lower() in COMPRESSIONS


def open_bytes(path: Path) -> IO[bytes]:
    """A file's bytes, decompressed.

    Raises:
        ValueError: a compressed file has not one byte. OSError, while it is read: it is damaged or cut off.
    """
    if is_compressed(path) and not path.stat().st_size:
        raise ValueError(f"{path}: damaged or cut off (it is empty)")
    file = path.open("rb")
    if not is_compressed(path):
        return file
    stream = pa.CompressedInputStream(pa.PythonFile(file, mode="r"), COMPRESSIONS[path.suffix.lower()])
    return io.BufferedReader(stream)


def holds_json_lines(path: Path, column: str) -> bool:
    """Whether a `.json` file has one object a line: more than one, or one with the column of its text or tokens."""
    with open_bytes(path) as file:
        lines = (line for line in iter(lambda: file.readline(FIRST_LINE_BYTES), b"") if line.strip())
        try:
            content = json.loads(next(lines, b"").removeprefix(codecs.BOM_UTF8))
        except (ValueError, RecursionError):
            return False
        except OSError as error:
            raise ValueError(f"{path}: damaged or cut off ({error})") from error
        return isinstance(content, dict) and (
            isinstance(content.get(column), str | list) or next(lines, None) is not None
        )


def short_names(paths: list[str]) -> dict[str, str]:
    """A name for each file: its path below the folder that holds them all, so that it says which file is meant, and
    does not change when the folder is moved."""
    folders = [path.split("/")[:-1] for path in paths]
    common = sum(1 for _ in itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*folders, strict=False)))
    return {path: "/".join(path.split("/")[common:]) for path in paths}


def _below(folder: Path, dotted_key: str, apart: Path | None, above: tuple[str, ...] = ()) -> Iterator[Path]:
    """The files below a folder, sorted by path; `above` has the real paths of the folders it lies in."""
    real = real_path(folder)
    if apart is not None and real == real_path(apart):
        return
    if real in above:
        raise ValueError(f"{dotted_key}: {folder} is a link to a folder that holds it; remove the link")
    for item in entries(folder):
        if item.name.startswith((".", "_")):
            continue
        if item.is_dir():
            yield from _below(item, dotted_key, apart, (*above, real))
            continue
        _require_something(item, dotted_key)
        if not _describes(item.name):
            yield item


def _require_something(item: Path, dotted_key: str) -> None:
    if not item.exists():
        raise FileNotFoundError(f"{dotted_key}: {item} is a link to nothing; mend or remove it")
    if not (item.is_file() or item.is_dir()):
        raise ValueError(f"{dotted_key}: {item} is neither a file nor a folder; remove it")


def _require_no_circle(files: list[Path], dotted_key: str) -> None:
    """`**` would enter a folder that is linked to from within itself again and again."""
    for folder in sorted({file.parent for file in files}):
        real = [os.path.realpath(part) for part in (folder, *folder.parents)]
        if len(set(real)) < len(real):
            raise ValueError(f"{dotted_key}: {folder} goes through a link to a folder that holds it; remove the link")


def _describes(name: str) -> bool:
    stem, suffix = os.path.splitext(name.lower())
    return (
        name.lower() in DESCRIPTIONS
        or (stem in PROSE and suffix in PROSE_SUFFIXES)
        or (stem.startswith("cache-") and suffix == ".arrow")
    )


def _suffixes(kinds: Collection[Kind]) -> list[str]:
    return [suffix for suffix, kind in KINDS.items() if kind in kinds]


def _checked(files: list[Path], dotted_key: str, kinds: Collection[Kind]) -> list[Path]:
    others = [str(path) for path in files if kind_of(path) not in kinds]
    if others:
        more = f" and {len(others) - SHOWN_FILES} more" if len(others) > SHOWN_FILES else ""
        raise ValueError(
            f"{dotted_key}: not read are {', '.join(others[:SHOWN_FILES])}{more}; what is read ends in"
            f" {', '.join(_suffixes(kinds))}, all but Parquet and Arrow also with {', '.join(COMPRESSIONS)} behind."
            " Convert them, move them away, or name the files by a pattern"
        )
    return files
