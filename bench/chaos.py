"""Kill -9 drivers, actors and whole nodes of a scoring run, and compare every file with an undisturbed run's.

    python bench/chaos.py [--kills 200] [--seed 0] [--folder DIR] [--scorer exact|cascade]

A cluster of two nodes is started on this machine, on loopback. A reference run scores a small corpus with one actor
and builds its mask. Then the same is scored again while a schedule drawn from the seed kills: the driver (and starts
it again, on another number of actors), an actor, or every process of the second node (and starts another node). Each
kill comes a random time after the last one was recovered from, or in the middle of that recovery. A run that
finishes is compared with the reference: the SHA-256 of every scores and mask file, and the fingerprints. Further runs
are begun until all kills are done. With --scorer cascade the run fits a student as well, and scores in two passes.
One JSON object is printed last.

tests/stages/test_kill.py does the same with 20 kills. Processes are ended by their ids; nothing else is touched.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml
from safetensors.torch import save_file

from bench.common.local_cluster import WAIT_SECONDS, LocalCluster, write_config
from bench.common.proxies import random_direction
from ifguide.artifacts import data_files, file_digest, open_artifact, read_manifest
from ifguide.config import ModelSource
from ifguide.demo import generate_demo
from ifguide.distributed.ledger import LEDGER
from ifguide.influence.query_file import DIRECTION
from ifguide.models import linearise, load_model, state_fingerprint

VERBS_OF: dict[str, tuple[str, ...]] = {"exact": ("score_corpus",), "cascade": ("fit_student", "score_corpus")}
CASCADE: dict[str, dict[str, Any]] = {
    "score_corpus": {"scorer": "cascade", "audit_fraction": 0.1, "recheck_fraction": 0.2, "min_recall": 0.0},
    "fit_student": {"sample_fraction": 0.2, "partitions": 8},
}
KINDS = {"actor": 14, "driver": 3, "node": 3}  # of twenty kills
ARCHITECTURE = {
    "model_type": "gpt_neox",
    "vocab_size": 512,
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 512,
    "max_position_embeddings": 128,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--documents", type=int, default=500)
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary folder)")
    parser.add_argument("--scorer", choices=list(VERBS_OF), default="exact")
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="chaos-")))
        folder.mkdir(parents=True, exist_ok=True)
        given = {"kills": options.kills, "seed": options.seed, "documents": options.documents}
        result = chaos(folder, **given, scorer=options.scorer, say=print)
    print(json.dumps(result))


def chaos(
    folder: Path,
    *,
    kills: int,
    seed: int,
    documents: int = 500,
    scorer: str = "exact",
    say: Any = lambda text: None,
) -> dict[str, Any]:
    """The whole comparison; returns kills by kind, runs, shards per run, and how many files differed (0).

    Raises:
        RuntimeError: a run failed, hung, or gave other bytes than the reference.
    """
    rng = random.Random(seed)
    schedule = [kind for kind, share in KINDS.items() for _ in range(-(-kills * share // sum(KINDS.values())))]
    rng.shuffle(schedule)
    schedule = schedule[:kills]
    started, runs, compared, verbs = time.monotonic(), 0, 0, VERBS_OF[scorer]
    others = CASCADE if scorer == "cascade" else {}
    with LocalCluster(folder / "cluster") as cluster:
        reference = prepare(folder / "reference", cluster.run, documents, others)
        cluster.run(reference, *verbs, "build_mask")
        say(f"reference run: {len(data_files(reference / 'scores'))} shards, {time.monotonic() - started:.0f} s")
        left = list(schedule)
        while left or not runs:
            run_dir = copy_of(reference, folder / f"run{runs}")
            before = len(left)
            disturbed_run(run_dir, cluster, verbs, left, rng, say)
            cluster.run(run_dir, "build_mask")
            compared += compare(reference, run_dir)
            runs += 1
            say(f"run {runs}: {before - len(left)} kills, the same bytes; {len(left)} kills left")
            shutil.rmtree(run_dir)
    return {
        "kills": len(schedule),
        **{f"{kind}_kills": count for kind, count in sorted(collections.Counter(schedule).items())},
        "runs": runs,
        "shards": len(data_files(reference / "scores")),
        "files_compared": compared,
        "files_different": 0,
        "seconds": round(time.monotonic() - started, 1),
    }


def disturbed_run(
    run_dir: Path, cluster: LocalCluster, verbs: tuple[str, ...], left: list[str], rng: random.Random, say: Any
) -> None:
    """Score `run_dir` to its end, taking kills from `left` as long as it lasts."""
    actors = 2
    driver = cluster.start(run_dir, actors, *verbs)
    seen = finished = done(run_dir)
    patience = time.monotonic() + WAIT_SECONDS
    hasty = False
    try:
        while driver.poll() is None:
            time.sleep(0.02)
            count = done(run_dir)
            if count > finished:
                finished, patience = count, time.monotonic() + WAIT_SECONDS
            if time.monotonic() > patience:
                raise RuntimeError(f"nothing was finished for {WAIT_SECONDS:.0f} s; {cluster.log_of(run_dir)}")
            if not left or not (hasty or count > seen):
                continue
            time.sleep(rng.uniform(0, 0.6))
            if driver.poll() is not None:
                break
            kind = left[0]
            if kind == "driver":
                driver.kill()
                driver.wait()
                actors = 3 - actors
                driver = cluster.start(run_dir, actors, *verbs)
            elif not (cluster.kill_node() if kind == "node" else cluster.kill_actor(rng)):
                continue  # none is alive just now
            left.pop(0)
            say(f"killed: {kind} after {done(run_dir)} pieces")
            seen, patience = done(run_dir), time.monotonic() + WAIT_SECONDS
            # One time in five the next one does not wait until this one is recovered from.
            hasty = rng.random() < 0.2
    finally:
        if driver.poll() is None:
            driver.kill()
            driver.wait()
    if driver.returncode:
        raise RuntimeError(f"{verbs[-1]} ended with {driver.returncode}; {cluster.log_of(run_dir)}")


def done(run_dir: Path) -> int:
    """Pieces of work in the ledgers; of a verb that is complete, none."""
    return sum(len(list((run_dir / name / LEDGER).glob("*.json"))) for name in ("student", "scores/sample", "scores"))


def compare(reference: Path, run_dir: Path) -> int:
    """The number of files of student, scores and mask, all of the same SHA-256 as the reference's.

    Raises:
        RuntimeError: one is missing, one is more, or one differs.
    """
    count = 0
    for name in [name for name in ("student", "scores", "mask") if (reference / name).exists()]:
        expected, actual = (
            {path.name: file_digest(path) for path in data_files(run / name)} for run in (reference, run_dir)
        )
        if expected != actual:
            names = sorted(key for key in expected.keys() | actual.keys() if expected.get(key) != actual.get(key))
            raise RuntimeError(f"{run_dir / name} differs from the undisturbed run in {names[:5]}")
        if read_manifest(run_dir / name).fingerprint != read_manifest(reference / name).fingerprint:
            raise RuntimeError(f"{run_dir / name} has another fingerprint than the undisturbed run's")
        count += len(actual)
    return count


def prepare(
    run_dir: Path,
    run_verb: Callable[[Path, str], Any],
    documents: int,
    others: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
) -> Path:
    """A run directory with a corpus of many small shards, and a random direction of a random proxy as its query.
    `others`: further options of the config.

    `run_verb(run_dir, "pack_corpus")` runs that verb with the config that lies in the run directory."""
    data = run_dir / "data"
    generate_demo(data, seed=1, documents=documents, vocab_size=512, queries=2, prompts=2, cloze=2)
    proxy = load_model(ModelSource(architecture=ARCHITECTURE), seed=0)
    proxy.save_pretrained(data / "proxy")
    tree: dict[str, Any] = {
        "run_dir": str(run_dir),
        "tokenizer": str(data / "tokenizer"),
        "proxy": {"source": str(data / "proxy")},
        "pack_corpus": {"inputs": [str(data / "corpus.jsonl")], "block_size": 128, "blocks_per_shard": 8},
        "score_corpus": {
            "preset": "exact",
            "micro_batch_blocks": 4,
            "check_blocks": 0,
            # here a machine that is killed is the rule
            "resources": {"gpus": 0, "attempts": 1000},
        },
        "build_mask": {"quantile": 0.97},
    }
    for section, options in others.items():
        tree[section] = {**tree.get(section, {}), **options}
    write_config(run_dir, tree)
    run_verb(run_dir, "pack_corpus")
    proxy = linearise(load_model(ModelSource(source=str(data / "proxy"))))
    direction = random_direction(proxy)
    query = open_artifact(
        run_dir / "query",
        verb="build_query",
        options={},
        inputs={"proxy": state_fingerprint(proxy)},
        config_yaml=(run_dir / "config.yaml").read_text(),
    )
    save_file(direction, run_dir / "query" / DIRECTION)
    query.finish([run_dir / "query" / DIRECTION], rows={"modules": len(direction)}, summary={})
    return run_dir


def copy_of(reference: Path, run_dir: Path) -> Path:
    """A run directory with the reference's corpus and query, not yet scored."""
    for name in ("corpus", "query"):
        shutil.copytree(reference / name, run_dir / name)
    tree = yaml.safe_load((reference / "config.yaml").read_text())
    write_config(run_dir, {**tree, "run_dir": str(run_dir)})
    return run_dir


if __name__ == "__main__":
    main()
