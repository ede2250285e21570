"""What Ray costs and what a second actor brings, in scoring on CPU: one thread each, the same shards, the same scorer.

    python bench/scaling.py [--shards 6] [--shard-seconds 12] [--rounds 3]

Three ways take turns, each in a process of its own: a bare loop that calls the stage's worker on one shard after the
other; the stage's pool with one actor; the same with two. A way's time runs from the beginning of its first shard to
the publication of its last, so loading Ray, the model and V is outside for all; publication, ledger, attempts,
verification of the input and Ray Data's scheduling are inside. Figures are medians over the rounds of the quotients
within a round: speed-up = one actor / two actors, overhead = one actor / bare loop - 1. Shards are as large as the
bare loop needs for `--shard-seconds`. One JSON object is printed last.

It needs two cores with nothing else on them.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import save_file

from bench.common.proxies import random_direction
from ifguide import schemas
from ifguide.artifacts import data_files, open_artifact, publish, read_manifest
from ifguide.config import OWN, Cluster, ModelSource
from ifguide.influence.method import PRESETS, Method
from ifguide.influence.products import bfloat16_pays
from ifguide.influence.proxy import Beginning
from ifguide.influence.query_file import DIRECTION
from ifguide.influence.scorer import TokenScorer
from ifguide.models import linearise, load_model, state_fingerprint
from ifguide.spans.tables import PackedCorpus

BLOCK_SIZE, VOCABULARY, MICRO_BATCH = 256, 2048, 4
ARCHITECTURE = {
    "model_type": "gpt_neox",
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "intermediate_size": 1024,
    "max_position_embeddings": BLOCK_SIZE,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=6)
    parser.add_argument("--shard-seconds", type=float, default=12.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--way", nargs=2, metavar=("ACTORS", "FOLDER"), help="one way alone; 0 actors: the bare loop")
    options = parser.parse_args()
    if options.way:
        print(json.dumps(run_way(int(options.way[0]), Path(options.way[1]))))
        return
    with tempfile.TemporaryDirectory(prefix="scaling-") as name:
        print(json.dumps(compare(Path(name), options.shards, options.shard_seconds, options.rounds)))


def compare(folder: Path, shards: int, shard_seconds: float, rounds: int) -> dict[str, Any]:
    """Medians over the rounds of the three ways."""
    blocks = prepare(folder, shards, shard_seconds)
    spans: dict[int, list[float]] = {0: [], 1: [], 2: []}
    for turn in range(rounds):
        for actors in (0, 1, 2) if turn % 2 == 0 else (2, 1, 0):
            span = in_a_process(actors, folder)
            spans[actors].append(span)
            print(f"round {turn}: {actors or 'no'} actors, {span:.1f} s", file=sys.stderr)
    bare, one, two = (spans[actors] for actors in (0, 1, 2))
    return {
        "speedup_two_actors": round(statistics.median(a / b for a, b in zip(one, two, strict=True)), 3),
        "ray_overhead": round(statistics.median(a / b - 1 for a, b in zip(one, bare, strict=True)), 4),
        "shards": shards,
        "blocks_per_shard": blocks,
        "seconds_per_shard": round(statistics.median(bare) / shards, 2),
        "seconds": {name: [round(x, 2) for x in spans[actors]] for actors, name in enumerate(("bare", "one", "two"))},
    }


def in_a_process(actors: int, folder: Path) -> float:
    """`run_way` in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "bench.scaling", "--way", str(actors), str(folder)]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, check=True)
    return float(json.loads(result.stdout.splitlines()[-1]))


def prepare(folder: Path, shards: int, shard_seconds: float) -> int:
    """Random proxy, direction and corpus in `folder`; returns the blocks of a shard, a multiple of the micro-batch."""
    torch.set_num_threads(1)
    load_model(ModelSource(architecture=ARCHITECTURE), seed=0).save_pretrained(folder / "proxy")
    proxy = linearise(load_model(ModelSource(source=str(folder / "proxy"))))
    direction = random_direction(proxy)
    query = open_artifact(folder / "query", verb="build_query", options={}, inputs={}, config_yaml="")
    save_file(direction, folder / "query" / DIRECTION)
    query.finish([folder / "query" / DIRECTION], rows={}, summary={})
    scorer = TokenScorer(proxy, [direction], attribution="target", method=fast_method())
    (folder / "settings.json").write_text(json.dumps({"steps": scorer.steps, "fingerprint": state_fingerprint(proxy)}))
    tokens = torch.randint(1, VOCABULARY, (MICRO_BATCH, BLOCK_SIZE), generator=torch.Generator().manual_seed(1))
    lengths = torch.full((MICRO_BATCH,), BLOCK_SIZE)
    times = []
    for _ in range(6):
        started = time.monotonic()
        scorer.score(tokens, lengths)
        times.append(time.monotonic() - started)
    per_batch = statistics.median(times[1:])
    blocks = MICRO_BATCH * max(1, round(shard_seconds / per_batch))
    _write_corpus(folder / "corpus", shards, blocks)
    return blocks


def _write_corpus(folder: Path, shards: int, blocks: int) -> None:
    options = {"pack_corpus": {"blocks_per_shard": blocks}}
    artifact = open_artifact(folder, verb="pack_corpus", options=options, inputs={}, config_yaml="")
    schema = schemas.blocks(BLOCK_SIZE, annotated=False)
    rng = np.random.default_rng(0)
    for index in range(shards):
        tokens_BT = rng.integers(1, VOCABULARY, size=(blocks, BLOCK_SIZE), dtype=np.int32)
        columns = [
            pa.array(np.arange(index * blocks, (index + 1) * blocks)),
            pa.array(np.full(blocks, BLOCK_SIZE, np.int32)),
            schemas.per_token_column(tokens_BT, schema, "tokens"),
        ]
        with publish(folder / f"shard-{index:05d}.parquet") as part:
            pq.write_table(pa.Table.from_arrays(columns, schema=schema), part)
    artifact.finish(
        data_files(folder),
        rows={"blocks": shards * blocks, "tokens": shards * blocks * BLOCK_SIZE},
        summary={"block_size": BLOCK_SIZE},
    )


def fast_method() -> Method:
    """The fast preset as the stage runs it on this CPU, nothing compiled."""
    precision = PRESETS["fast"].precision if bfloat16_pays(torch.device("cpu")) else "float32"
    return replace(PRESETS["fast"], precision=precision, fused=False)


def run_way(actors: int, folder: Path) -> float:
    """Seconds from the beginning of the first shard to the publication of the last."""
    from ifguide.config.resources import Resources
    from ifguide.distributed.session import connect
    from ifguide.distributed.shards import Pool, run_shards
    from ifguide.influence.decision import Decision, Energy
    from ifguide.influence.scoring_worker import CorpusShard, ScoreByProxy, ScoringSettings

    torch.set_num_threads(1)
    scores = folder / f"scores{actors}"
    shutil.rmtree(scores, ignore_errors=True)
    scores.mkdir()
    made = json.loads((folder / "settings.json").read_text())
    decision = Decision(
        method=fast_method(),
        engine="difference",
        steps=made["steps"],
        threads=1,
        micro_batch_blocks=MICRO_BATCH,
        energy=Energy(least=1.0, mean=1.0, of_module={}),
        check=None,
    )
    settings = ScoringSettings(
        corpus=PackedCorpus.of(folder / "corpus", read_manifest(folder / "corpus")),
        scores=scores,
        queries={OWN: folder / "query"},
        proxy=ModelSource(source=str(folder / "proxy")),
        proxy_fingerprint=made["fingerprint"],
        beginning=Beginning(None),
        attribution="target",
        decision=decision,
        gpus=0,
    )
    shards = [
        CorpusShard(key=path.stem, name=path.name, number=number, bytes=path.stat().st_size)
        for number, path in enumerate(data_files(folder / "corpus"))
    ]
    if not actors:
        worker = ScoreByProxy(settings)
        started = time.monotonic()
        for shard in shards:
            worker.process(shard)
        return time.monotonic() - started
    connect(Cluster(num_cpus=2))
    pool = Pool(size=actors, resources=Resources(gpus=0), in_flight=2)
    results = run_shards("scaling", shards, ScoreByProxy, settings, folder=scores, pool=pool, unit="shards")
    published = {path.stem: path.stat().st_mtime for path in data_files(scores)}
    begins = sorted(published[key] - result["seconds"] for key, result in results.items())
    began = begins[0]
    return max(published.values()) - began


if __name__ == "__main__":
    main()
