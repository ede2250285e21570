"""Files and folders that are whole or are not there, and removal that touches nothing else.

`publish`: `.part`, fsync, rename; on an object store, one upload. Within `recording`, the digest of every file that is
published is kept, taken from what was written, before anybody else could change it.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import secrets
import tempfile
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any, TypedDict

from ifguide.storage import file_sizes, is_remote, remove_folder, upload, upload_folder

REMOVALS = 5  # of a folder that is written to meanwhile


class FileEntry(TypedDict):
    """What a file holds: SHA-256 (hex) and size."""

    sha256: str
    bytes: int


_recorded: ContextVar[dict[Path, FileEntry] | None] = ContextVar("recorded", default=None)


@contextlib.contextmanager
def recording() -> Iterator[dict[Path, FileEntry]]:
    """Yield a dict that fills with what this thread publishes, by path."""
    entries: dict[Path, FileEntry] = {}
    token = _recorded.set(entries)
    try:
        yield entries
    finally:
        _recorded.reset(token)


def record(path: Path, written: Path | None = None) -> None:
    """Keep the digest of a file for whoever records: of one that is published otherwise than by `publish`.

    `written` is the local file that it was made of, if it is another."""
    entries = _recorded.get()
    if entries is not None:
        entries[path] = file_entry(written or path)


def data_files(folder: Path, pattern: str = "shard-*.parquet") -> list[Path]:
    """The published files of a folder in the order of their numbers; `.part` leftovers are never among them."""
    return sorted((path for path in folder.glob(pattern) if not path.name.endswith(".part")), key=by_number)


def by_number(path: Path) -> tuple[int, str]:
    """A key that sorts names by their number, which has five digits or, from 100,000 on, more."""
    return len(path.name), path.name


@contextlib.contextmanager
def publish(path: Path) -> Iterator[Path]:
    """Yield a `.part` path to write; on success fsync it and rename it to `path`.

    Each part has a name of its own: two attempts at one shard, on any two machines, never write the same file.
    For a remote path it is a temporary local file, uploaded on success: readers see all of it or nothing.
    """
    if is_remote(path):
        with tempfile.TemporaryDirectory(prefix="ifguide-") as folder:
            part = Path(folder) / path.name
            yield part
            record(path, part)
            upload(part, path)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{secrets.token_hex(6)}.part")
    try:
        yield part
        fsync(part)
        record(path, part)
        os.replace(part, path)
        fsync(path.parent)
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(error.errno, f"writing failed: {error.strerror or error}", str(path)) from error
    finally:
        part.unlink(missing_ok=True)


@contextlib.contextmanager
def publish_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty local folder to fill; on success it becomes `folder`, in place of what was there.

    Its name is its own, and ends in `.part`: of two at once each fills another. It is removed when it is not used.
    """
    if is_remote(folder):
        with tempfile.TemporaryDirectory(prefix="ifguide-") as temporary:
            yield Path(temporary)
            move_folder(Path(temporary), folder)
        return
    part = folder.with_name(f"{folder.name}.{secrets.token_hex(6)}.part")
    part.mkdir(parents=True)
    try:
        yield part
        move_folder(part, folder)
    finally:
        remove_tree(part)


def move_folder(part: Path, folder: Path) -> None:
    """Make a whole local folder `folder`, in place of what was there: by rename, or by upload if that is remote."""
    for path in part.rglob("*"):
        if path.is_file():
            record(folder / path.relative_to(part).as_posix(), path)
    remove_tree(folder)
    if is_remote(folder):
        upload_folder(part, folder)
    else:
        part.rename(folder)


def write_text(path: Path, text: str) -> None:
    """Publish a text file."""
    with publish(path) as part:
        part.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """Publish a JSON file."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def file_entry(path: Path) -> FileEntry:
    """Digest and size of a file."""
    return {"sha256": file_digest(path), "bytes": path.stat().st_size}


def file_digest(path: Path) -> str:
    """SHA-256 (hex) of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folder_digest(folder: Path) -> str:
    """SHA-256 (hex) of the names and contents of a folder's files, but for hidden ones."""
    return json_digest({name: file_digest(folder / name) for name in file_sizes(folder) if not name.startswith(".")})


def json_digest(content: Any) -> str:
    """SHA-256 (hex) of what JSON can hold, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def remove_tree(folder: Path) -> None:
    """Remove scratch work of an artifact; a missing folder is fine. Of a symbolic link the link alone goes."""
    if is_remote(folder):
        remove_folder(folder)
        return
    if folder.is_symlink() or folder.is_file():
        folder.unlink()
        return
    for attempt in range(REMOVALS):  # an actor that starts late may still write its start count
        try:
            if folder.exists():
                _remove_local(folder)
            return
        except OSError as error:
            if error.errno != errno.ENOTEMPTY or attempt == REMOVALS - 1:
                raise


def _remove_local(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):  # an actor that ends late may still remove its start count
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
    folder.rmdir()


def fsync(path: Path) -> None:
    """Have a file's contents, or a folder's own names, on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_tree(folder: Path) -> None:
    """Have all of a folder on disk; a rename alone does not."""
    for path in [*folder.rglob("*"), folder]:
        fsync(path)
