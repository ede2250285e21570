"""Artifacts: folders of a run directory that are whole or are not there.

A stage opens its folder with `open_artifact`. That writes `plan.json` (the options and inputs it is made
from), so that a rerun can tell its own unfinished work from somebody else's. `Artifact.finish` writes `manifest.json`
over all files: its presence means complete. The resolved config lies beside it as `config.yaml` and can be run again.

Unfinished work of the same plan is resumed; of another plan it is refused, naming what differs.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import subprocess
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ifguide.artifacts.files import FileEntry, file_entry, json_digest, remove_tree, write_json, write_text
from ifguide.artifacts.manifest import (
    CONFIG,
    MANIFEST,
    PLAN,
    Manifest,
    MismatchError,
    read_manifest,
    read_plan,
    write_manifest,
)
from ifguide.config import redact
from ifguide.storage import is_remote, make_folder

SCRATCH = "scratch"  # of a finished plan: the folders to remove
LIBRARIES = ("ifguide", "torch", "ray", "transformers", "kronfluence", "deepspeed", "pyarrow", "numpy")
HASHED_AT_ONCE = 16  # files: one alone is read at a disk's or a store's latency


@dataclass(kw_only=True)
class Artifact:
    """An artifact being made, or (`manifest` set) one that is complete."""

    folder: Path
    verb: str
    plan: dict[str, Any]
    config_yaml: str
    manifest: Manifest | None
    started: float  # by the monotonic clock

    def finish(
        self,
        files: Iterable[Path],
        *,
        rows: Mapping[str, int],
        summary: Mapping[str, Any],
        remove: Iterable[str] = (),
        digests: Mapping[str, FileEntry] = {},
    ) -> Manifest:
        """Publish the manifest over `files` (inside the folder). `remove` names folders of scratch work.

        `digests` are of files by their name in the folder, taken when they were written: the others are read.

        Scratch goes when the manifest is there: whoever is killed in between leaves a complete artifact, and
        `open_artifact` removes the rest.

        Raises:
            FileNotFoundError: one of `files` is not there.
        """
        paths = {path.relative_to(self.folder).as_posix(): path for path in sorted(files)}
        with ThreadPoolExecutor(HASHED_AT_ONCE) as threads:
            entries = threads.map(lambda name: digests.get(name) or file_entry(paths[name]), paths)
            digested = dict(zip(paths, entries, strict=True))
        write_text(self.folder / CONFIG, self.config_yaml)
        manifest = Manifest(
            verb=self.verb,
            fingerprint=json_digest({name: entry["sha256"] for name, entry in digested.items()}),
            options=self.plan["options"],
            inputs=self.plan["inputs"],
            rows=dict(rows),
            summary=redact(summary),
            files=digested,
            created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            seconds=round(time.monotonic() - self.started, 3),
            environment=environment(),
        )
        write_json(self.folder / PLAN, {**self.plan, SCRATCH: list(remove)})
        write_manifest(self.folder, manifest)
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
    plan = json.loads(json.dumps(redact({"verb": verb, "options": options, "inputs": inputs})))
    manifest = read_manifest(folder) if (folder / MANIFEST).exists() else None
    artifact = Artifact(
        folder=folder, verb=verb, plan=plan, config_yaml=config_yaml, manifest=manifest, started=time.monotonic()
    )
    if manifest is not None:
        _refuse_other_plan(folder, {"options": manifest.options, "inputs": manifest.inputs}, plan)
        if (folder / PLAN).exists():  # whoever published the manifest was killed before the last step
            _remove_scratch(folder)
        return artifact
    plan_path = folder / PLAN
    if plan_path.exists():
        _refuse_other_plan(folder, read_plan(folder), plan)
        return artifact
    if folder.exists() and any(not path.name.endswith(".part") for path in folder.iterdir()):
        raise MismatchError(
            f"{folder} holds files but neither {MANIFEST} nor {PLAN}, so ifguide did not make them;"
            " move them away or set another run_dir"
        )
    make_folder(folder)
    write_json(plan_path, plan)
    return artifact


def made_from(folder: Path) -> dict[str, dict[str, Any]]:
    """The `options` and `inputs` that the artifact in `folder` was made from, or is being made from; both empty where
    there is none."""
    if (folder / MANIFEST).exists():
        manifest = read_manifest(folder)
        return {"options": manifest.options, "inputs": manifest.inputs}
    plan = read_plan(folder) if (folder / PLAN).exists() else {"options": {}, "inputs": {}}
    return {part: plan[part] for part in ("options", "inputs")}


def standing(folder: Path, options: Mapping[str, Any]) -> str | None:
    """What is there of an artifact of these `options`, some of all: `complete`, `begun` or nothing (None).

    Raises:
        MismatchError: it was made, or is being made, with others.
    """
    if not (folder / MANIFEST).exists() and not (folder / PLAN).exists():
        return None
    state, made = "complete" if (folder / MANIFEST).exists() else "begun", made_from(folder)["options"]
    wanted = json.loads(json.dumps(redact(options)))
    some = {key: made[key] for key in wanted if key in made}
    _refuse_other_plan(folder, {"options": some, "inputs": {}}, {"options": wanted, "inputs": {}})
    return state


def discard_if_mended(folder: Path, files: Mapping[str, Any]) -> bool:
    """Remove unfinished work on the same files with other contents: they were mended since. `files`: the option of that
    name, by path. Returns whether there was such work; what is complete stays, for `open_artifact` to refuse."""
    if (folder / MANIFEST).exists() or not (folder / PLAN).exists():
        return False
    begun = read_plan(folder)["options"].get("files", {})
    wanted = json.loads(json.dumps(redact(files)))
    if not isinstance(begun, dict) or begun.keys() != wanted.keys() or begun == wanted:
        return False
    remove_tree(folder)
    return True


def _remove_scratch(folder: Path) -> None:
    """What is left of the work on a complete artifact; the plan, which names it, goes last."""
    for name in read_plan(folder).get(SCRATCH, ()):
        remove_tree(folder / name)
    for part in [] if is_remote(folder) else list(folder.rglob("*.part")):
        remove_tree(part)  # files and folders of attempts that were killed
    (folder / PLAN).unlink(missing_ok=True)


def _refuse_other_plan(folder: Path, planned: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    differences = []
    for part in ("options", "inputs"):
        old, new = _flatten(redact(planned[part])), _flatten(wanted[part])  # plans of before may hold more
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
    if isinstance(tree, dict) and (tree or not prefix):
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
