"""Damage every file of a small finished run, one at a time, and run the verb that reads it: none may pass in silence.

    python bench/attack.py [--ways flip cut zero swap] [--only corpus mask ...] [--every 1] [--folder DIR]

The demo is run at its smallest. Then, for each file of each artifact: the run is put back as it was, without what the
reading verb makes, the file is damaged, and the verb runs. Ways: one `flip`ped bit in the middle, `cut` to half,
`zero` bytes, and the same size with other contents (`swap`: those of the artifact's next file of its kind, or its own
bytes in reverse). Checkpoints are read by a training that has lost its result and goes on from them.

An attack is refused where the verb ends with an error (`unnamed` counts those that do not name the file or its folder,
`crashed` those that are no error for a person), and redone where what the verb makes is, file by file, what it made of
the undamaged run. Anything else is silent. Files that no verb reads again are counted in `unread`.

Each attack that is not refused by name or redone is a line. One JSON object is printed last: `files`, `damages`,
`refused_or_redone`, `silent`, and the counts above. `--every N` takes every N-th file.

Workers are called in this process, one after the other, not started by Ray: an attack takes a second or less.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import json
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from safetensors.numpy import load_file

from bench.common.places import ROOT
from ifguide.artifacts import MANIFEST, PLAN, file_digest, read_manifest, write_json
from ifguide.config import OWN, Config, load_config
from ifguide.demo import generate_demo
from ifguide.distributed import shards, tasks
from ifguide.distributed.ledger import Entry, Failure
from ifguide.distributed.shards import StageError
from ifguide.distributed.worker import LedgerWorker, Parcel, WorkerSource
from ifguide.folders import FOLDERS
from ifguide.interchange import export_scores
from ifguide.pipeline import run_pipeline, stage
from ifguide.report.terminal import terminal_view
from ifguide.run import Run
from ifguide.stages.analyse import analyse
from ifguide.status import run_status
from ifguide.telemetry import configure_logging

SMALLEST = (
    "target.architecture.hidden_size=32", "target.architecture.num_hidden_layers=2",
    "target.architecture.num_attention_heads=2", "target.architecture.intermediate_size=64",
    "cluster.num_cpus=2", "pack_corpus.block_size=64", "pack_corpus.blocks_per_shard=200", "pretrain.epochs=1",
    "pretrain.batch_blocks=16", "pretrain.micro_batch_blocks=4", "pretrain.engine=torch", "pretrain.workers=1",
    "pretrain.checkpoint_steps=8", "pretrain.log_steps=4", "fit_factors.sample_blocks=400",
    "fit_factors.data_partitions=1", "build_query.partitions=1", "score_corpus.min_actors=1",
    "score_corpus.max_actors=1", "evaluate.max_prompts=10", "evaluate.continuations=3", "evaluate.max_new_tokens=6",
    "evaluate.prompts_per_shard=8", "evaluate.actors=1",
    "evaluate.bootstrap_samples=100", "evaluate.top_documents=3", "analyse.actors=1", "analyse.methods=[lens]",
    "analyse.max_prompts=4",
)  # fmt: skip
WAYS = ("flip", "cut", "zero", "swap")


@dataclass(frozen=True)
class Reader:
    """The verb that reads the files of a pattern, what it makes, and what of that says that it made the same.

    `lost` is removed before it runs, `made` compared after it."""

    pattern: str
    verb: str
    lost: tuple[str, ...]
    made: tuple[str, ...]
    use_mask: bool = True


SCORING = ("score_corpus", ("scores",), ("scores/shard-*",))
MASKING = ("build_mask", ("ranking", "mask"), ("ranking/*.parquet", "mask/*.parquet"))
TRAINING = ("pretrain", ("model/penalised",), ("model/penalised/hf/*.safetensors",))
FITTING = ("fit_factors", ("factors",), ("factors/*.safetensors",))
QUERYING = ("build_query", ("query",), ("query/direction.safetensors", "query/queries.jsonl"))
MEASURING = ("evaluate", ("report",), ("report/metrics.json", "report/report.json", "report/continuations/*"))
SAMPLING = ("evaluate", ("report", "generations"), (*MEASURING[2], "generations/*/*/*.parquet"))
INSPECTING = ("inspect", ("inspect.txt",), ("inspect.txt",))
SHOWING = ("status", ("status.txt",), ("status.txt",))
EXPORTING = ("export-scores", ("exported",), ("exported/scores.npy",))  # the file itself has its keys in any order
ANALYSING = ("analyse", ("analyses",), ("analyses/analyses.json",))

READERS = (
    Reader("corpus/shard-*", *SCORING),
    Reader("corpus/shard-*", *TRAINING),
    Reader("corpus/shard-*", *FITTING),
    Reader("corpus/documents-*", *MASKING),
    Reader("corpus/offsets-*", *MASKING),
    Reader("corpus/offsets-*", *MEASURING),
    Reader("corpus/documents-*", *MEASURING),
    Reader("corpus/shard-*", *MEASURING),
    Reader("corpus/*", *INSPECTING),
    Reader("corpus/tokenizer/*", *MEASURING),
    Reader("corpus/tokenizer/*", *TRAINING),
    Reader("corpus/manifest.json", *SCORING),
    Reader("factors/*.safetensors", *QUERYING),
    Reader("factors/*.json", *QUERYING),
    Reader("query/direction.safetensors", *SCORING),
    Reader("query/manifest.json", *SCORING),
    Reader("query/queries.jsonl", *ANALYSING),
    Reader("scores/shard-*", *MASKING),
    Reader("scores/manifest.json", *MASKING),
    Reader("scores/*", *MEASURING),
    Reader("scores/*", *INSPECTING),
    Reader("scores/*", *EXPORTING),
    Reader("ranking/*", *MEASURING),
    Reader("ranking/*", *INSPECTING),
    Reader("mask/*", *MEASURING),
    Reader("mask/*", *INSPECTING),
    Reader("mask/shard-*", *TRAINING),
    Reader("mask/manifest.json", *TRAINING),
    Reader("model/baseline/hf/*.safetensors", *FITTING),
    Reader("model/*/hf/*.safetensors", *SAMPLING),
    Reader("model/*/hf/*.json", *SAMPLING),
    Reader("model/*/manifest.json", *SAMPLING),
    Reader("model/*/metrics.jsonl", *MEASURING),
    Reader("model/baseline/checkpoints/*", "pretrain", ("model/baseline/manifest.json", "model/baseline/hf"),
           ("model/baseline/hf/*.safetensors",), use_mask=False),
    Reader("model/penalised/checkpoints/*", "pretrain", ("model/penalised/manifest.json", "model/penalised/hf"),
           ("model/penalised/hf/*.safetensors",)),
    Reader("generations/*", *MEASURING),
    Reader("*/manifest.json", *SHOWING),
)  # fmt: skip


class Attack:
    """A finished run, and what each reading verb makes of it undamaged."""

    def __init__(self, folder: Path, overrides: Sequence[str] = ()):
        self.run_dir, self.pristine = folder / "run", folder / "pristine"
        overrides = [f"run_dir={self.run_dir}", *SMALLEST, *overrides]
        self.config: Config = load_config(ROOT / "configs" / "demo.yaml", overrides)
        if not self.pristine.exists():
            generate_demo(
                self.run_dir / "data", seed=3, documents=140, vocab_size=512, queries=40, prompts=20, cloze=10
            )
            with in_this_process():
                run_pipeline(self.config, dry_run=False)
                analyse(Run(config=self.config))
            self.run_dir.rename(self.pristine)
        self.undamaged: dict[Reader, dict[str, str]] = {}

    def files(self) -> list[str]:
        """Every file of the artifacts, by its path in the run directory."""
        paths = (path.relative_to(self.pristine) for path in sorted(self.pristine.rglob("*")) if path.is_file())
        return [path.as_posix() for path in paths if path.parts[0] != "data"]

    def outcome(self, reader: Reader, name: str, way: str) -> tuple[str, str]:
        """What became of one attack (redone, refused, unnamed, crashed or silent), and what was said."""
        if reader not in self.undamaged:
            self._restore(reader)
            self._read(reader)
            self.undamaged[reader] = self._made(reader)
        self._restore(reader)
        path = self.run_dir / name
        path.write_bytes(damaged(path, way))
        try:
            self._read(reader)
        except (ValueError, OSError, StageError) as error:
            # an artifact's file, or for one of a folder within it that folder
            named = any(part in str(error) for part in (path.name, path.parent.as_posix()))
            return ("refused" if named else "unnamed"), str(error)
        except Exception as error:
            return "crashed", f"{type(error).__name__}: {error}"
        changed = {key for key, digest in self.undamaged[reader].items() if self._made(reader).get(key) != digest}
        return ("silent", f"changed: {', '.join(sorted(changed))}") if changed else ("redone", "")

    def _restore(self, reader: Reader) -> None:
        shutil.rmtree(self.run_dir, ignore_errors=True)
        shutil.copytree(self.pristine, self.run_dir)
        for name in reader.lost:
            path = self.run_dir / name
            if path.name == MANIFEST:  # as if a training had been killed before it
                manifest = read_manifest(path.parent)
                plan = {"verb": manifest.verb, "options": manifest.options, "inputs": manifest.inputs}
                write_json(path.with_name(PLAN), plan)
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def _read(self, reader: Reader) -> None:
        run = Run(config=self.config).with_mask(reader.use_mask)
        with in_this_process():
            if reader.verb == "inspect":
                lines = terminal_view(run.selection, documents=10, context=60)
                (self.run_dir / "inspect.txt").write_text("\n".join(lines), encoding="utf-8")
            elif reader.verb == "status":
                (self.run_dir / "status.txt").write_text(
                    "\n".join(run_status(self.run_dir, FOLDERS).lines()), encoding="utf-8"
                )
            elif reader.verb == "export-scores":
                exported = self.run_dir / "exported"
                made = export_scores(self.run_dir, exported, name="n", behaviour=OWN, max_gigabytes=1)
                np.save(exported / "scores.npy", load_file(made / "pairwise_scores.safetensors")["all_modules"])
            else:
                (analyse if reader.verb == "analyse" else stage(reader.verb))(run)

    def _made(self, reader: Reader) -> dict[str, str]:
        paths = {path for pattern in reader.made for path in self.run_dir.glob(pattern)}
        return {path.relative_to(self.run_dir).as_posix(): file_digest(path) for path in paths}


@contextlib.contextmanager
def in_this_process() -> Iterator[None]:
    """Call workers and tasks here: to start their processes would take most of an attack's time."""

    def work_off(descriptors: Sequence[Any], source: WorkerSource, pool: object) -> Iterator[Entry | Failure]:
        worker = LedgerWorker(source)
        for descriptor in descriptors:
            yield from (parcel.content for parcel in worker({"shard": [Parcel(descriptor)]})["entry"])

    def start(function: Any, arguments: tuple[Any, ...], resources: object) -> Callable[[], Any]:
        result = function(*arguments)
        return lambda: result

    def wait(pending: list[Any], timeout: float | None = None) -> tuple[list[Any], list[Any]]:
        return pending[:1], pending[1:]

    with (
        mock.patch.object(shards, "work_off", work_off),
        mock.patch.object(tasks, "_start", start),
        mock.patch.object(tasks, "_result", lambda function, reference: reference()),
        mock.patch.object(tasks.ray, "wait", wait),
    ):
        yield


def damaged(path: Path, way: str) -> bytes:
    """The contents of a file after damage, other than before where it had any."""
    content = path.read_bytes()
    if way == "flip":
        changed = bytearray(content)
        if changed:
            changed[len(changed) // 2] ^= 1
        return bytes(changed)
    if way == "cut":
        return content[: len(content) // 2]
    if way == "zero":
        return b""
    others = [other for other in sorted(path.parent.glob(f"*{path.suffix}")) if other.is_file() and other != path]
    swapped = others[0].read_bytes() if others else content[::-1]
    swapped = (swapped * (len(content) // max(len(swapped), 1) + 1))[: len(content)]
    return swapped if swapped != content else content[::-1]


def readers_of(name: str) -> list[Reader]:
    """Those of a file; none for a file that is only looked at by people."""
    return [reader for reader in READERS if fnmatch.fnmatch(name, reader.pattern)]


def attacks(files: Sequence[str], ways: Sequence[str]) -> Iterator[tuple[Reader, str, str]]:
    """Every damage of every file to every verb that reads it, one verb's after the other."""
    return ((reader, name, way) for reader in READERS for name in files if reader in readers_of(name) for way in ways)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--only", nargs="+", default=[], help="artifacts: corpus, mask, model, ... (default: all)")
    parser.add_argument("--every", type=int, default=1, help="every N-th file alone")
    parser.add_argument("--folder", type=Path, help="keep the run here, and take it from here (default: nowhere)")
    options = parser.parse_args(arguments)
    configure_logging()
    with tempfile.TemporaryDirectory(prefix="attack-") as scratch:
        print(json.dumps(attack(Attack((options.folder or Path(scratch)).resolve()), options)))
    return 0


def attack(subject: Attack, options: argparse.Namespace) -> dict[str, Any]:
    """Carry the attacks out; the counts that are printed."""
    started = time.monotonic()
    chosen = [name for name in subject.files() if not options.only or name.split("/")[0] in options.only]
    unread = [name for name in chosen if not readers_of(name)]
    files = [name for name in chosen if readers_of(name)][:: options.every]
    counts = Counter[str]()
    for reader, name, way in attacks(files, options.ways):
        outcome, said = subject.outcome(reader, name, way)
        counts[outcome] += 1
        if outcome not in ("refused", "redone"):
            print(f"{outcome}: {name}, {way}, {reader.verb}: {said[:300]}", flush=True)
    return {
        "files": len(files),
        "damages": counts.total(),
        "refused_or_redone": counts.total() - counts["silent"],
        "silent": counts["silent"],
        **{outcome: counts[outcome] for outcome in ("refused", "redone", "unnamed", "crashed")},
        "unread": len(unread),
        "seconds": round(time.monotonic() - started),
    }


if __name__ == "__main__":
    raise SystemExit(main())
