"""Reading what an artifact holds: every file is checked against its digest when this process first reads it.

A digest takes about a second for a gigabyte, and a remote file is read twice. A file that has not been touched since
(size, time and inode, or the store's tag) is not read again, unless its store tells neither tag nor time.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping
from pathlib import Path

from ifguide.artifacts.files import FileEntry, file_digest
from ifguide.artifacts.manifest import CONFIG, MANIFEST, Manifest, read_manifest
from ifguide.storage import location, stamp

_manifests: dict[str, tuple[str, Manifest]] = {}  # of this process: folder -> the file's stamp, what it says
_trusted: dict[str, tuple[str | None, str]] = {}  # of this process: file -> its stamp, its digest


def verified(folder: Path, name: str) -> Path:
    """The path of a file of a finished artifact, once its contents are those of the manifest.

    Raises:
        FileNotFoundError: the artifact is missing or unfinished.
        ValueError: the manifest does not name the file, or the file has changed since, by a flipped bit for instance.
    """
    manifest, path = _manifest(folder), folder / name
    if name not in manifest.files:
        raise ValueError(f"{path} is not in {folder / MANIFEST}: it does not belong to this artifact")
    return _verify(path, manifest.files[name]["sha256"], folder, manifest.verb)


def verified_files(folder: Path, pattern: str = "shard-*.parquet") -> Iterator[Path]:
    """`verified` of the files that the manifest names, in the order of their numbers, each when it is asked for."""
    for name in _manifest(folder).names(pattern):
        yield verified(folder, name)


def sound(folder: Path, name: str) -> Path:
    """`verified` of a finished artifact; in one that is still being made, the path as it is."""
    return verified(folder, name) if (folder / MANIFEST).exists() else folder / name


def verify_folder(folder: Path, *, leave_out: str = "") -> None:
    """Check the files of a folder within a finished artifact, as a model's and a tokenizer's are, but those that match
    `leave_out`. Of a folder that lies elsewhere nothing is known, so nothing is checked.

    Raises:
        ValueError: a file is gone, or has changed since it was made.
    """
    manifest = _manifest_around(folder)
    for name in manifest.names(f"{folder.name}/*") if manifest else ():
        if not (leave_out and fnmatch.fnmatch(name, leave_out)):
            verified(folder.parent, name)


def is_trained(source: str) -> bool:
    """Whether `pretrain` or `compare` has made the model of that name, in whatever run: it has read documents joined by
    EOS, and no other special token of its tokenizer's."""
    manifest = _manifest_around(location(source))
    return manifest is not None and manifest.verb in ("pretrain", "compare")


def verify_digest(path: Path, sha256: str, verb: str) -> Path:
    """`verified` for a task that was told the digest.

    Raises:
        ValueError: the file has changed since `verb` made it.
    """
    return _verify(path, sha256, path.parent, verb)


def damaged_files(folder: Path, files: Mapping[str, FileEntry]) -> dict[str, str]:
    """Of files by their path in a folder, or by their whole path, those that are not as recorded, and why."""
    reasons = {}
    for name, entry in files.items():
        path = location(name) if "://" in name else folder / name
        try:
            verify_digest(path, entry["sha256"], "")
        except ValueError:
            reasons[name] = "has changed" if path.exists() else "is gone"
    return reasons


def _manifest_around(folder: Path) -> Manifest | None:
    """The manifest of the finished artifact that a folder lies in; None where it lies elsewhere."""
    artifact = folder.parent
    if not all((artifact / name).exists() for name in (MANIFEST, CONFIG)):  # others' folders have manifests, too
        return None
    return _manifest(artifact)


def _manifest(folder: Path) -> Manifest:
    try:
        mark = stamp(folder / MANIFEST)
    except FileNotFoundError:
        return read_manifest(folder)  # says what is missing
    if mark is None:
        return read_manifest(folder)
    kept = _manifests.get(str(folder))
    if kept is None or kept[0] != mark:
        kept = _manifests[str(folder)] = (mark, read_manifest(folder))
    return kept[1]


def _verify(path: Path, sha256: str, folder: Path, verb: str) -> Path:
    command = verb.replace("_", "-") if verb.startswith("import_") else verb  # no stage: named with a hyphen
    advice = f"delete {folder} and run `ifguide {command}` again"
    try:
        mark = (stamp(path), sha256)
        if mark[0] is not None and _trusted.get(str(path)) == mark:
            return path
        digest = file_digest(path)
    except FileNotFoundError as error:
        raise ValueError(f"{path} is gone; {advice}") from error
    if digest != sha256:
        raise ValueError(
            f"{path} has changed since it was made: SHA-256 {digest[:16]}, its manifest says {sha256[:16]}; {advice}"
        )
    _trusted[str(path)] = mark
    return path
