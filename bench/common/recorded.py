"""A seed's comparison, kept in the repository: a sweep over seeds takes nights, and few have one machine for so long.

A record has the rows of `comparison.json`, the options that made them, and the commit, day and machine. It stands for a
run only where all options agree that change results, those of the methods asked for among them. Data are known by the
names of their files, whose digests `ifguide fetch-data` checks.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bench.common.places import ROOT, this_machine
from ifguide.artifacts import publish, read_manifest
from ifguide.config import Config, result_options, to_mapping
from ifguide.config.compare import OWN_MODELS

RECORDS = ROOT / "bench" / "records" / "real_text"
SECTIONS = (
    "target",
    "pack_corpus",
    "pretrain",
    "fit_factors",
    "build_query",
    "score_corpus",
    "build_mask",
    "evaluate",
    "compare",
)
DIGITS = 6


@dataclass(frozen=True, kw_only=True)
class Record:
    """`made`: commit, day and machine. `options`: key -> value, nested. `methods`: name -> the method's options."""

    made: dict[str, str]
    options: dict[str, Any]
    methods: dict[str, Any]
    rows: list[dict[str, Any]]


def record_path(behaviour: str, seed: int, folder: Path = RECORDS) -> Path:
    return folder / f"{behaviour}_{seed}.json"


def write_record(path: Path, config: Config, report: Path, *, proxy: str) -> None:
    """The record of a finished comparison; `report`: its folder, `config`: what made it, `proxy`: how the bench names
    the proxy, whose path differs between machines."""
    manifest = read_manifest(report)
    rows = json.loads((report / "comparison.json").read_text(encoding="utf-8"))
    options, methods = _identity(config, proxy)
    made = {
        "commit": str(manifest.environment.get("git", "unknown"))[:7],
        "date": manifest.created[:10],
        "machine": this_machine(),
    }
    head = {"made": made, "options": options, "methods": methods}
    lines = [json.dumps(_rounded(row)) for row in rows]
    with publish(path) as part:
        part.write_text(f'{json.dumps(head)[:-1]}, "rows": [\n' + ",\n".join(lines) + "\n]}\n", "utf-8")


def read_record(path: Path, config: Config, *, proxy: str) -> Record | None:
    """The record at `path` with the rows of the models that `config` makes; None where there is no record.

    Raises SystemExit where it was made with other options, or lacks a method of `config`; names them.
    """
    if not path.exists():
        return None
    record = Record(**json.loads(path.read_text(encoding="utf-8")))
    options, methods = _identity(config, proxy)
    old, new = _flat(record.options), _flat(options)
    old.pop("score_corpus.min_agreement", None)  # of records that were made while it counted
    unlike = [f"{key} was {old.get(key)}, now {new.get(key)}" for key in sorted(old.keys() | new.keys())
              if old.get(key) != new.get(key)]  # fmt: skip
    unlike += [
        f"compare.methods.{name} {'is of other options' if name in record.methods else 'is not in it'}"
        for name, method in methods.items()
        if record.methods.get(name) != method
    ]
    if unlike:
        raise SystemExit(f"{path} cannot stand for this run: {'; '.join(unlike[:6])}. Run without --recorded")
    return replace(record, rows=[row for row in record.rows if row["model"] in {*methods, *OWN_MODELS}])


def _identity(config: Config, proxy: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The options that change results, but for the seed, which the file's name has; and those of each method."""
    options = result_options(replace(config, compare=replace(config.compare, methods={})), SECTIONS)
    methods = {name: to_mapping(method) for name, method in config.compare.methods.items()}
    plain: tuple[dict[str, Any], dict[str, Any]] = json.loads(json.dumps([{"proxy": proxy, **options}, methods]))
    return plain[0], plain[1]


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, dict):
        return {key: _rounded(own) for key, own in value.items()}
    return [_rounded(own) for own in value] if isinstance(value, list) else value


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        flat |= _flat(value, f"{name}.") if isinstance(value, dict) and value else {name: value}
    return flat
