"""Artifacts: folders of a run directory that are whole or are not there.

A stage opens its folder with `open_artifact`. That writes `plan.json` (the options and inputs it is made
from), so that a rerun can tell its own unfinished work from somebody else's. Files are published with
`publish`: `.part`, fsync, rename; on an object store, one upload. `Artifact.finish` writes `manifest.json`
over all of them: its presence means complete. The manifest holds the options, the fingerprints of the inputs, and each
file's SHA-256; an artifact's fingerprint is the digest of its files' digests, so equal contents have equal
fingerprints. The resolved config lies beside it as `config.yaml` and can be run again.

Unfinished work of the same plan is resumed; of another plan it is refused, naming what differs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import importlib.metadata
import json
import os
import secrets
import subprocess
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ifguide.storage import is_remote, make_folder, remove_folder, sizes, upload, upload_folder

MANIFEST = "manifest.json"
PLAN = "plan.json"
SCRATCH = "scratch"  # of a finished plan: the folders to remove
LIBRARIES = ("ifguide", "torch", "ray", "transformers", "kronfluence", "deepspeed", "pyarrow", "numpy")
HASHED_AT_ONCE = 16  # files: one alone is read at a disk's or a store's latency
REMOVALS = 5  # of a folder that is written to meanwhile


class MismatchError(ValueError):
    """Artifacts that do not belong together, or a run directory that holds another config."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a finished artifact is and what it was made from."""

    verb: str
    fingerprint: str
    options: dict[str, Any]
    inputs: dict[str, str]  # artifact or model name -> fingerprint
    rows: dict[str, int]
    summary: dict[str, Any]
    files: dict[str, dict[str, Any]]  # relative path -> {"sha256", "bytes"}
    created: str  # UTC, ISO 8601
    seconds: float
    environment: dict[str, str]


@dataclass(kw_only=True)
class Artifact:
    """An artifact being made, or (`manifest` set) one that is complete."""

    folder: Path
    verb: str
    plan: dict[str, Any]
    config_yaml: str
    manifest: Manifest | None
    started: float

    def finish(
        self,
        files: Iterable[Path],
        *,
        rows: Mapping[str, int],
        summary: Mapping[str, Any],
        remove: Iterable[str] = (),
    ) -> Manifest:
        """Publish the manifest over `files` (inside the folder). `remove` names folders of scratch work.

        Scratch goes when the manifest is there: whoever is killed in between leaves a complete artifact, and
        `open_artifact` removes the rest.

        Raises:
            FileNotFoundError: one of `files` is not there.
        """
        paths = sorted(files)
        with ThreadPoolExecutor(HASHED_AT_ONCE) as threads:
            entries = list(threads.map(_file_entry, paths))
        digests = {path.relative_to(self.folder).as_posix(): entry for path, entry in zip(paths, entries, strict=True)}
        write_text(self.folder / "config.yaml", self.config_yaml)
        manifest = Manifest(
            verb=self.verb,
            fingerprint=json_digest({name: entry["sha256"] for name, entry in digests.items()}),
            options=self.plan["options"],
            inputs=self.plan["inputs"],
            rows=dict(rows),
            summary=dict(summary),
            files=digests,
            created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            seconds=round(time.time() - self.started, 3),
            environment=environment(),
        )
        write_json(self.folder / PLAN, {**self.plan, SCRATCH: list(remove)})
        write_json(self.folder / MANIFEST, dataclasses.asdict(manifest))
        _remove_scratch(self.folder)
        self.manifest = manifest
        return manifest


def open_artifact(
    folder: Path, *, verb: str, options: Mapping[str, Any], inputs: Mapping[str, str], config_yaml: str
) -> Artifact:
    """Open `folder` to make an artifact, to resume one, or to find it complete.

    Raises:
        MismatchError: the folder holds an artifact, finished or not, of other options or inputs.
    """
    plan = json.loads(json.dumps({"verb": verb, "options": options, "inputs": inputs}))
    manifest = read_manifest(folder) if (folder / MANIFEST).exists() else None
    artifact = Artifact(
        folder=folder, verb=verb, plan=plan, config_yaml=config_yaml, manifest=manifest, started=time.time()
    )
    if manifest is not None:
        _refuse_other_plan(folder, {"options": manifest.options, "inputs": manifest.inputs}, plan)
        if (folder / PLAN).exists():  # whoever published the manifest was killed before the last step
            _remove_scratch(folder)
        return artifact
    plan_path = folder / PLAN
    if plan_path.exists():
        _refuse_other_plan(folder, _read_json(plan_path), plan)
        return artifact
    if folder.exists() and any(not path.name.endswith(".part") for path in folder.iterdir()):
        raise MismatchError(
            f"{folder} holds files but neither {MANIFEST} nor {PLAN}, so ifguide did not make them;"
            " move them away or set another run_dir"
        )
    make_folder(folder)
    write_json(plan_path, plan)
    return artifact


def _remove_scratch(folder: Path) -> None:
    """What is left of the work on a complete artifact; the plan, which names it, goes last."""
    for name in _read_json(folder / PLAN).get(SCRATCH, ()):
        remove_tree(folder / name)
    for part in () if is_remote(folder) else folder.rglob("*.part"):
        part.unlink(missing_ok=True)  # of attempts that were killed
    (folder / PLAN).unlink(missing_ok=True)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a finished artifact.

    Raises:
        FileNotFoundError: the artifact is missing or unfinished.
    """
    path = folder / MANIFEST
    if not path.exists():
        state = "is unfinished" if (folder / PLAN).exists() else "does not exist"
        raise FileNotFoundError(f"{folder} {state}: run the stage that makes it first (`ifguide show` lists them)")
    content = _read_json(path)
    known = {field.name for field in dataclasses.fields(Manifest)}
    if set(content) != known:
        raise ValueError(f"{path} has keys {sorted(content)}, expected {sorted(known)}; another version made it")
    return Manifest(**content)


def require(folder: Path, verb: str) -> Manifest:
    """The manifest of a finished artifact whose files are all there with their sizes.

    Raises:
        FileNotFoundError: missing or unfinished, naming the verb to run.
        ValueError: a file is missing or has another size.
    """
    if not (folder / MANIFEST).exists():
        state = "is unfinished" if (folder / PLAN).exists() else "does not exist"
        raise FileNotFoundError(f"{folder} {state}; run `ifguide {verb}` first")
    manifest = read_manifest(folder)
    found = sizes(folder, manifest.files)
    for name, entry in manifest.files.items():
        if found.get(name) != entry["bytes"]:
            raise ValueError(
                f"{folder / name} has {found.get(name)} bytes where its manifest says {entry['bytes']}; delete"
                f" {folder} and run `ifguide {verb}` again"
            )
    return manifest


def verify_file(folder: Path, name: str, manifest: Manifest) -> Path:
    """The path of a file of an artifact whose SHA-256 is the manifest's: for whoever reads the file whole.

    Raises:
        ValueError: the manifest does not hold the file, or the file has changed since, by a flipped bit for instance.
    """
    path = folder / name
    if name not in manifest.files:
        raise ValueError(f"{path} is not in {folder / MANIFEST}: it does not belong to this artifact")
    return verify_digest(path, manifest.files[name]["sha256"], manifest.verb)


def verify_digest(path: Path, sha256: str, verb: str) -> Path:
    """`verify_file` for a task that was told the digest: a manifest of a hundred thousand shards is no argument.

    Raises:
        ValueError: the file has changed since `verb` made it.
    """
    found = file_digest(path)
    if found != sha256:
        raise ValueError(
            f"{path} has changed since it was made: SHA-256 {found[:16]}, its manifest says {sha256[:16]}; delete"
            f" {path.parent} and run `ifguide {verb}` again"
        )
    return path


def require_same(left: str, left_fingerprint: str, right: str, right_fingerprint: str, advice: str) -> None:
    """Refuse two things that do not belong together, naming both fingerprints."""
    if left_fingerprint != right_fingerprint:
        raise MismatchError(f"{left} ({left_fingerprint[:16]}) is not {right} ({right_fingerprint[:16]}): {advice}")


def data_files(folder: Path, pattern: str = "shard-*.parquet") -> list[Path]:
    """The published files of a folder, sorted by name; `.part` leftovers are never among them."""
    return sorted(path for path in folder.glob(pattern) if not path.name.endswith(".part"))


@contextlib.contextmanager
def publish(path: Path) -> Iterator[Path]:
    """Yield a `.part` path to write; on success fsync it and rename it to `path`.

    Each part has a name of its own: two attempts at one shard, on any two machines, never write the same file.
    For a remote path it is a temporary local file, uploaded on success: readers see all of it or nothing.
    """
    if is_remote(path):
        with tempfile.TemporaryDirectory(prefix="ifguide-") as folder:
            yield Path(folder) / path.name
            upload(Path(folder) / path.name, path)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{secrets.token_hex(6)}.part")
    try:
        yield part
        fsync(part)
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
    """Yield an empty local folder to fill; on success it becomes `folder`, in place of what was there."""
    if is_remote(folder):
        with tempfile.TemporaryDirectory(prefix="ifguide-") as temporary:
            yield Path(temporary)
            move_folder(Path(temporary), folder)
        return
    part = folder.with_name(f"{folder.name}.part")
    remove_tree(part)
    part.mkdir(parents=True)
    yield part
    move_folder(part, folder)


def move_folder(part: Path, folder: Path) -> None:
    """Make a whole local folder `folder`, in place of what was there: by rename, or by upload if that is remote."""
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


def _file_entry(path: Path) -> dict[str, Any]:
    return {"sha256": file_digest(path), "bytes": path.stat().st_size}


def file_digest(path: Path) -> str:
    """SHA-256 (hex) of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remove_tree(folder: Path) -> None:
    """Remove scratch work of an artifact; a missing folder is fine."""
    if is_remote(folder):
        remove_folder(folder)
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
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
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


def _refuse_other_plan(folder: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    differences = []
    for part in ("options", "inputs"):
        old, new = _flatten(found[part]), _flatten(wanted[part])
        differences += [
            f"{key} was {_short(old.get(key))}, now {_short(new.get(key))}"
            for key in sorted(old.keys() | new.keys())
            if old.get(key) != new.get(key)
        ]
    if differences:
        raise MismatchError(
            f"{folder} was made from something else: {'; '.join(differences[:6])}."
            f" Set another run_dir, or delete {folder} and what was made from it"
        )


def _flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(tree, dict) and tree:
        items = [_flatten(value, f"{prefix}.{key}" if prefix else key) for key, value in tree.items()]
        return {key: value for item in items for key, value in item.items()}
    return {prefix: tree}


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def environment() -> dict[str, str]:
    versions = {}
    for name in LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    commit = _git_commit()
    return {**versions, "git": commit} if commit else versions


def _git_commit() -> str | None:
    try:
        result = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=5
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None


def json_digest(content: Any) -> str:
    """SHA-256 (hex) of what JSON can hold, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); delete its folder and run the stage again") from error
