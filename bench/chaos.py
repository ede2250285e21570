"""Kill -9 drivers, actors and whole nodes of a scoring run, and compare every file with an undisturbed run's.

    python bench/chaos.py [--kills 200] [--seed 0] [--folder DIR]

A cluster of two nodes is started on this machine, on loopback. A reference run scores a small corpus with one actor
and builds its mask. Then the same is scored again while a schedule drawn from the seed kills: the driver (and starts
it again, on another number of actors), an actor, or every process of the second node (and starts another node). Each
kill comes a random time after the last one was recovered from, or in the middle of that recovery. A run that
finishes is compared with the reference: the SHA-256 of every scores and mask file, and the fingerprints. Further runs
are begun until all kills are done. One JSON object is printed last.

tests/stages/test_kill.py does the same with 20 kills. Processes are ended by their ids; nothing else is touched.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import os
import random
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import yaml
from safetensors.torch import save_file

from bench.common.places import ROOT
from bench.common.proxies import random_direction
from ifguide.artifacts import data_files, file_digest, open_artifact, read_manifest
from ifguide.config import ModelSource, config_from_mapping
from ifguide.demo import generate_demo
from ifguide.distributed.ledger import LEDGER
from ifguide.influence.query_file import DIRECTION
from ifguide.models import linearise, load_model, state_fingerprint

KINDS = {"actor": 14, "driver": 3, "node": 3}  # of twenty kills
ACTOR = "MapWorker"  # Ray gives an actor's process the title ray::MapWorker(...)
VERBS = (
    "import sys; from ifguide.cli import main;"
    " sys.exit(next((1 for verb in sys.argv[2:] if main([verb, '--config', sys.argv[1]])), 0))"
)
ARCHITECTURE = {
    "model_type": "gpt_neox",
    "vocab_size": 512,
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 512,
    "max_position_embeddings": 128,
}
# How soon the head notices that a node is gone; Ray's defaults take 15 s or more.
DETECTION = {"health_check_initial_delay_ms": 1000, "health_check_period_ms": 500, "health_check_failure_threshold": 5}
WAIT_SECONDS = 120.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--documents", type=int, default=500)
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary folder)")
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="chaos-")))
        folder.mkdir(parents=True, exist_ok=True)
        result = chaos(folder, kills=options.kills, seed=options.seed, documents=options.documents, say=print)
    print(json.dumps(result))


def chaos(folder: Path, *, kills: int, seed: int, documents: int = 500, say: Any = lambda text: None) -> dict[str, Any]:
    """The whole comparison; returns kills by kind, runs, shards per run, and how many files differed (0).

    Raises:
        RuntimeError: a run failed, hung, or gave other bytes than the reference.
    """
    rng = random.Random(seed)
    schedule = [kind for kind, share in KINDS.items() for _ in range(-(-kills * share // sum(KINDS.values())))]
    rng.shuffle(schedule)
    schedule = schedule[:kills]
    started, runs, compared = time.monotonic(), 0, 0
    with LocalCluster(folder / "cluster") as cluster:
        reference = prepare(folder / "reference", cluster.run, documents)
        cluster.run(reference, "score_corpus", "build_mask")
        say(f"reference run: {len(data_files(reference / 'scores'))} shards, {time.monotonic() - started:.0f} s")
        left = list(schedule)
        while left or not runs:
            run_dir = copy_of(reference, folder / f"run{runs}")
            before = len(left)
            disturbed_run(run_dir, cluster, left, rng, say)
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


def disturbed_run(run_dir: Path, cluster: LocalCluster, left: list[str], rng: random.Random, say: Any) -> None:
    """Score `run_dir` to its end, taking kills from `left` as long as it lasts."""
    actors = 2
    driver = cluster.start(run_dir, actors, "score_corpus")
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
                driver = cluster.start(run_dir, actors, "score_corpus")
            elif not (cluster.kill_node() if kind == "node" else cluster.kill_actor(rng)):
                continue  # none is alive just now
            left.pop(0)
            say(f"killed: {kind} after {done(run_dir)} shards")
            seen, patience = done(run_dir), time.monotonic() + WAIT_SECONDS
            # One time in five the next one does not wait until this one is recovered from.
            hasty = rng.random() < 0.2
    finally:
        if driver.poll() is None:
            driver.kill()
            driver.wait()
    if driver.returncode:
        raise RuntimeError(f"score_corpus ended with {driver.returncode}; {cluster.log_of(run_dir)}")


def done(run_dir: Path) -> int:
    """Shards in the ledger; of a run that is complete, none."""
    return len(list((run_dir / "scores" / LEDGER).glob("*.json")))


def compare(reference: Path, run_dir: Path) -> int:
    """The number of scores and mask files, all of the same SHA-256 as the reference's.

    Raises:
        RuntimeError: one is missing, one is more, or one differs.
    """
    count = 0
    for name in ("scores", "mask"):
        wanted, found = (
            {path.name: file_digest(path) for path in data_files(run / name)} for run in (reference, run_dir)
        )
        if wanted != found:
            names = sorted(key for key in wanted.keys() | found.keys() if wanted.get(key) != found.get(key))
            raise RuntimeError(f"{run_dir / name} differs from the undisturbed run in {names[:5]}")
        if read_manifest(run_dir / name).fingerprint != read_manifest(reference / name).fingerprint:
            raise RuntimeError(f"{run_dir / name} has another fingerprint than the undisturbed run's")
        count += len(found)
    return count


def prepare(run_dir: Path, run_verb: Callable[[Path, str], Any], documents: int) -> Path:
    """A run directory with a corpus of many small shards, and a random direction of a random proxy as its query.

    `run_verb(run_dir, "pack_corpus")` runs that verb with the config that lies in the run directory."""
    data = run_dir / "data"
    generate_demo(data, seed=1, documents=documents, vocab_size=512, queries=2, prompts=2, cloze=2)
    proxy = load_model(ModelSource(architecture=ARCHITECTURE), seed=0)
    proxy.save_pretrained(data / "proxy")
    tree = {
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


def write_config(run_dir: Path, tree: dict[str, Any]) -> None:
    """The run's config as a file in its directory, after a check."""
    config_from_mapping(tree)
    (run_dir / "config.yaml").write_text(yaml.safe_dump(tree))


def copy_of(reference: Path, run_dir: Path) -> Path:
    """A run directory with the reference's corpus and query, not yet scored."""
    for name in ("corpus", "query"):
        shutil.copytree(reference / name, run_dir / name)
    tree = yaml.safe_load((reference / "config.yaml").read_text())
    write_config(run_dir, {**tree, "run_dir": str(run_dir)})
    return run_dir


class LocalCluster:
    """Two Ray nodes of one CPU each on 127.0.0.1, started by `ray start`; the second can be killed and replaced."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.port = _free_port()
        self.address = f"127.0.0.1:{self.port}"
        self.head: subprocess.Popen[bytes] | None = None
        self.node: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> LocalCluster:
        self.folder.mkdir(parents=True, exist_ok=True)
        token = self.folder / "auth_token"
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32))
        self.temp = Path(tempfile.mkdtemp(prefix="chaos-"))  # short: socket paths have at most 107 bytes
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        self.environment = {
            **inherited,
            **{f"RAY_{name}": str(value) for name, value in DETECTION.items()},
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_ADDRESS": self.address,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
        }
        self.head = self._start_node("--head", f"--port={self.port}", "--include-dashboard=false")
        deadline = time.monotonic() + WAIT_SECONDS
        while not _listens(self.port):
            if self.head.poll() is not None or time.monotonic() > deadline:
                self.__exit__()
                raise RuntimeError(f"the head node did not start: {(self.folder / 'nodes.log').read_text()[-2000:]}")
            time.sleep(0.1)
        self.node = self._start_node(f"--address={self.address}")
        return self

    def __exit__(self, *_: object) -> None:
        for process in (self.node, self.head):
            if process is not None:
                _kill_tree(process)
        shutil.rmtree(self.temp, ignore_errors=True)

    def run(self, run_dir: Path, *verbs: str) -> None:
        """Run verbs to their end on one actor.

        Raises:
            RuntimeError: one failed; with its last lines.
        """
        process = self.start(run_dir, 1, *verbs)
        try:
            if process.wait(timeout=600):
                raise RuntimeError(f"{verbs} ended with {process.returncode}; {self.log_of(run_dir)}")
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()

    def start(self, run_dir: Path, actors: int, *verbs: str) -> subprocess.Popen[bytes]:
        """Start a driver for verbs on that many actors."""
        tree = yaml.safe_load((run_dir / "config.yaml").read_text())
        tree["score_corpus"] |= {"min_actors": 1, "max_actors": actors}
        write_config(run_dir, tree)
        with (run_dir / "driver.log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-c", VERBS, str(run_dir / "config.yaml"), *verbs],
                stdout=log,
                stderr=log,
                env=self.environment,
                cwd=ROOT,
            )

    def log_of(self, run_dir: Path) -> str:
        """The last lines that the drivers of a run wrote."""
        return (run_dir / "driver.log").read_text(errors="replace")[-3000:]

    def kill_actor(self, rng: random.Random) -> bool:
        """Kill -9 one actor of the scoring pool; False when none is alive."""
        processes = [*_tree(self.head), *_tree(self.node)]
        actors = [process for process in processes if ACTOR in _title(process)]
        if not actors:
            return False
        with contextlib.suppress(psutil.NoSuchProcess):
            rng.choice(actors).kill()
            return True
        return False

    def kill_node(self) -> bool:
        """Kill -9 every process of the second node, and start another one."""
        assert self.node is not None
        if not any(ACTOR in _title(process) for process in _tree(self.node)):
            return False
        _kill_tree(self.node)
        self.node = self._start_node(f"--address={self.address}")
        return True

    def _start_node(self, *arguments: str) -> subprocess.Popen[bytes]:
        ray = Path(sys.executable).with_name("ray")
        # Free ports for workers and agents, because nodes share one address; --block: the process lives with its node.
        command = [
            str(ray), "start", *arguments, "--block", "--node-ip-address=127.0.0.1", "--num-cpus=1",
            "--object-store-memory=100000000", "--disable-usage-stats", f"--temp-dir={self.temp}",
            "--min-worker-port=0", "--max-worker-port=0", "--dashboard-agent-listen-port=0",
        ]  # fmt: skip
        with (self.folder / "nodes.log").open("ab") as log:
            return subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=self.environment)


def _title(process: psutil.Process) -> str:
    try:
        return "".join(process.cmdline()[:1])
    except psutil.NoSuchProcess:
        return ""


def _tree(process: subprocess.Popen[bytes] | None) -> list[psutil.Process]:
    """A process and all that came of it."""
    if process is None or process.poll() is not None:
        return []
    try:
        root = psutil.Process(process.pid)
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _kill_tree(process: subprocess.Popen[bytes]) -> None:
    for member in _tree(process):
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    process.wait()


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


if __name__ == "__main__":
    main()
