"""What selecting tokens costs as a corpus grows: time per score, and the memory of the largest process.

    python bench/selection_scale.py [--sizes 10 100 1000] [--rounds 3] [--folder runs/bench/selection]

For each size, in millions of scores, a synthetic corpus is written as the stages write it (blocks of 1,024 tokens in
shards of 4,096 blocks, a document table whose documents go over the edges of shards, normal scores), then the
`build_mask` stage runs on it with one task at a time. A size's time is that of the passes, from the first read of a
score to the last mask; the manifests of inputs and outputs, about 0.1 s whatever the size, are in `stage_ns_per_score`
only. It is the median of the rounds, after a first small run that starts Ray's worker. CPU time, of all processes, is
printed beside it, for machines that do other work too.

All processes of the session (the driver, Ray's workers and its daemons) are sampled every 20 ms: `peak_rss_mb` is the
resident memory of the largest, shared libraries and the object store included. A size takes 6.6 bytes of disk a token
while it runs. One JSON object is printed last.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from bench.common.places import CACHE
from ifguide import schemas
from ifguide.artifacts import data_files, open_artifact
from ifguide.config import config_from_mapping
from ifguide.run import Run
from ifguide.selection import masks
from ifguide.selection.distributed import select
from ifguide.stages.build_mask import build_mask

BLOCK_SIZE, BLOCKS_PER_SHARD, VOCABULARY = 1024, 4096, 50_000
DOCUMENT_TOKENS = 600.0  # on average
CHARACTERS = 4  # of a token
WARM_UP = 1  # million scores
MEGABYTE = 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10, 100, 1000], help="millions of scores")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=CACHE / "selection")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one is not None:
        print(json.dumps(measure(options.folder, options.one, options.rounds)))
        return
    measurements: dict[int, dict[str, Any]] = {}
    for size in options.sizes:  # each in a process of its own, for its memory
        command = [sys.executable, "-m", "bench.selection_scale", "--one", str(size), "--folder", str(options.folder)]
        rounds = options.rounds if size < 1000 else 1
        output = subprocess.run([*command, "--rounds", str(rounds)], check=True, stdout=subprocess.PIPE, text=True)
        measurements[size] = json.loads(output.stdout.splitlines()[-1])
        print(json.dumps({"millions": size, **measurements[size]}), flush=True)
    result = {f"ns_per_score_{_name(size)}": round(x["ns_per_score"], 2) for size, x in measurements.items()}
    print(json.dumps({**result, "peak_rss_mb": max(x["peak_rss_mb"] for x in measurements.values())}))


def _name(millions: int) -> str:
    return f"{millions}m" if millions < 1000 else f"{millions // 1000}b"


def measure(folder: Path, millions: int, rounds: int) -> dict[str, Any]:
    """Time and memory of one size, in this process."""
    shutil.rmtree(folder, ignore_errors=True)
    try:
        build_mask(make_run(folder / "warm", WARM_UP))
        started = time.perf_counter()
        run = make_run(folder / "run", millions)
        generated, seconds, in_passes, cpu_seconds = time.perf_counter() - started, [], [], []

        def timed(*arguments: Any) -> Any:
            started, cpu_started = time.perf_counter(), _cpu_seconds()
            selection = select(*arguments)
            in_passes.append(time.perf_counter() - started)
            cpu_seconds.append(_cpu_seconds() - cpu_started)
            return selection

        masks.select = timed  # type: ignore[assignment]
        with Peak() as peak:
            for _ in range(rounds):
                shutil.rmtree(run.ranking, ignore_errors=True)
                shutil.rmtree(run.mask, ignore_errors=True)
                started = time.perf_counter()
                manifest = build_mask(run)
                seconds.append(time.perf_counter() - started)
        assert manifest is not None
        num_scores = manifest.summary["predicted_tokens"]
        assert manifest.summary["tokens_masked"] == manifest.summary["token_budget"]
        return {
            "ns_per_score": statistics.median(in_passes) / num_scores * 1e9,
            "stage_ns_per_score": statistics.median(seconds) / num_scores * 1e9,
            "cpu_ns_per_score": statistics.median(cpu_seconds) / num_scores * 1e9,
            "seconds": [round(value, 2) for value in seconds],
            "generated_seconds": round(generated, 1),
            "units_ranked": manifest.summary["units_above_tau"],
            **peak.result(),
        }
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _cpu_seconds() -> float:
    """CPU time of all processes of this session so far, whatever else the machine does."""
    driver = psutil.Process()
    return sum(sum(process.cpu_times()[:2]) for process in [driver, *driver.children(recursive=True)])


def make_run(folder: Path, millions: float) -> Run:
    """A run directory with a corpus and its scores."""
    run = Run(config=config_from_mapping({"run_dir": str(folder), "cluster": {"num_cpus": 1}}))
    num_blocks = math.ceil(millions * 1_000_000 / BLOCK_SIZE)
    plan: dict[str, Any] = {"options": {"pack_corpus": {"blocks_per_shard": BLOCKS_PER_SHARD}}, "config_yaml": ""}
    corpus = open_artifact(run.corpus, verb="pack_corpus", inputs={}, **plan)
    rng = np.random.default_rng(int(millions))
    documents = _documents(rng, num_blocks * BLOCK_SIZE)
    starts, num_documents = np.zeros(0, np.int64), 0
    for number, first in enumerate(range(0, num_blocks, BLOCKS_PER_SHARD)):
        shape = (min(BLOCKS_PER_SHARD, num_blocks - first), BLOCK_SIZE)
        tokens = (VOCABULARY * rng.random(shape, dtype=np.float32) ** 3).astype(np.int32)
        schema = schemas.blocks(BLOCK_SIZE, annotated=False)
        lengths = pa.array(np.full(shape[0], BLOCK_SIZE, np.int32))
        block_ids = pa.array(np.arange(first, first + shape[0]))
        columns = [block_ids, lengths, schemas.per_token_column(tokens, schema, "tokens")]
        name = f"{number:05d}.parquet"
        pq.write_table(pa.Table.from_arrays(columns, schema=schema), run.corpus / f"shard-{name}", use_dictionary=False)
        table = documents.send((first + shape[0]) * BLOCK_SIZE)
        pq.write_table(table, run.corpus / f"documents-{name}")
        starts = np.append(starts[-1:], table.column("token_start").to_numpy())
        num_documents += len(table)
        _write_offsets(run.corpus / f"offsets-{name}", block_ids, starts)
    files = [path for kind in ("shard", "documents", "offsets") for path in data_files(run.corpus, f"{kind}-*.parquet")]
    rows = {"blocks": num_blocks, "documents": num_documents, "tokens": num_blocks * BLOCK_SIZE}
    made = corpus.finish(files, rows=rows, summary={"block_size": BLOCK_SIZE})
    scores = _write_scores(run, rng, made.fingerprint, plan)
    scores.finish(data_files(run.scores), rows={"blocks": num_blocks}, summary={})
    return run


def _write_offsets(path: Path, block_ids: pa.Array, starts: np.ndarray) -> None:
    """Every token has four characters; `starts` are those of all documents that reach into the shard."""
    places = np.arange(block_ids[0].as_py() * BLOCK_SIZE, (block_ids[-1].as_py() + 1) * BLOCK_SIZE)
    stops = CHARACTERS * (places + 1 - starts[np.searchsorted(starts, places, side="right") - 1])
    schema = schemas.offsets(BLOCK_SIZE)
    column = schemas.per_token_column(stops.astype(np.int32).reshape(-1, BLOCK_SIZE), schema, "stops")
    table = pa.Table.from_arrays([block_ids, column], schema=schema)
    pq.write_table(table, path, use_dictionary=False, column_encoding=schemas.OFFSETS_ENCODING)


def _write_scores(run: Run, rng: np.random.Generator, corpus: str, plan: dict[str, Any]) -> Any:
    scores = open_artifact(run.scores, verb="score_corpus", inputs={"corpus": corpus}, **plan)
    schema = schemas.scores(BLOCK_SIZE)
    for path in data_files(run.corpus):
        block_ids = pq.read_table(path, columns=["block_id"], partitioning=None).column(0)
        values = rng.standard_normal((len(block_ids), BLOCK_SIZE), dtype=np.float32)
        table = pa.Table.from_arrays(
            [block_ids, schemas.per_token_column(values, schema, "token_score")], schema=schema
        )
        pq.write_table(table, run.scores / path.name, use_dictionary=False)
    return scores


def _documents(rng: np.random.Generator, num_tokens: int) -> Any:
    """A generator of document tables: sent the end of a shard, it gives the documents that begin before that."""
    generator = _document_tables(rng, num_tokens)
    next(generator)
    return generator


def _document_tables(rng: np.random.Generator, num_tokens: int) -> Generator[Any, int, None]:
    first_id, begin = 0, 0
    table = None
    while True:
        end = yield table
        sizes: list[np.ndarray] = []
        while begin + sum(int(own.sum()) for own in sizes) < end:
            sizes.append(1 + rng.exponential(DOCUMENT_TOKENS, 1000).astype(np.int64))
        all_sizes = np.concatenate([*sizes, np.zeros(0, np.int64)])
        starts = begin + np.cumsum(all_sizes) - all_sizes
        starts = starts[starts < end]
        lasts = np.append(starts[1:], starts[-1:] + all_sizes[len(starts) - 1 : len(starts)])
        lasts = np.minimum(lasts, num_tokens)
        ids = first_id + np.arange(len(starts))
        table = pa.Table.from_arrays(
            [
                pa.array(ids),
                pa.array(["synthetic"] * len(ids), pa.string()),
                *(pa.array(column) for column in (ids, CHARACTERS * (lasts - starts), lasts - starts, starts)),
                pa.array(starts // BLOCK_SIZE),
                pa.array((starts % BLOCK_SIZE).astype(np.int32)),
            ],
            schema=schemas.DOCUMENTS,
        )
        first_id, begin = first_id + len(ids), int(lasts[-1]) if len(ids) else begin


class Peak:
    """The greatest resident memory of any one process of this session, sampled by a thread."""

    def __init__(self) -> None:
        self.largest: dict[str, float] = {}
        self.private: dict[str, float] = {}
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> Peak:
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.done.set()
        self.thread.join()

    def _sample(self) -> None:
        driver = psutil.Process()
        processes: list[psutil.Process] = []
        turn = 0
        while not self.done.wait(0.02):
            if turn % 50 == 0:
                processes = [driver, *driver.children(recursive=True)]
            turn += 1
            for process in processes:
                try:
                    memory, name = process.memory_info(), "driver" if process == driver else process.name()
                except psutil.NoSuchProcess:
                    continue
                self.largest[name] = max(self.largest.get(name, 0.0), memory.rss / MEGABYTE)
                self.private[name] = max(self.private.get(name, 0.0), (memory.rss - memory.shared) / MEGABYTE)

    def result(self) -> dict[str, Any]:
        """The peak, in MB, and those of each kind of process, without shared pages too."""
        by_process = {
            name: [round(value), round(self.private[name])]
            for name, value in sorted(self.largest.items(), key=lambda item: -item[1])[:5]
        }
        return {"peak_rss_mb": round(max(self.largest.values()), 1), "rss_and_private_mb": by_process}


if __name__ == "__main__":
    main()
