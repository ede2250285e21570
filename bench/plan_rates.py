"""Rates of one CPU core and of the driver that `ifguide plan` rests on, where no other bench gives them.

    python bench/plan_rates.py [--text data/real_text/wikitext2_articles.jsonl] [--tokenizer FOLDER] [--shards 600]

- `tokenise_tokens_per_second`: `ifguide.corpus.tokenise` on one core, with the parsing of its JSON lines.
- `eigen_gflops`: eigendecomposition of a random symmetric float64 matrix of 1,024 rows on one core, at 9 n^3 FLOP.
- `seconds_per_shard`: `run_shards` on shards that take no time, by as many actors as there are cores; difference of
  two numbers of shards. The ledger's files and the actors' share are in it: an upper bound of the driver's own time.

One JSON object is printed last, with the load average before and after.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
import torch

from bench.common.places import ABSENT, DATA
from ifguide.config import Cluster, Input
from ifguide.corpus.packing import tokenise
from ifguide.corpus.reading import list_chunks, read_documents
from ifguide.planning.flops import EIGEN_FLOP
from ifguide.tokenizer import load_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, default=DATA / "wikitext2_articles.jsonl")
    parser.add_argument("--tokenizer", default=str(DATA / "pythia_tokenizer"))
    parser.add_argument(
        "--shards", type=int, default=600, help="of the longer of the two runs; the shorter has a third"
    )
    options = parser.parse_args()
    if DATA in options.text.parents and not options.text.exists():
        parser.error(f"{options.text} is absent: {ABSENT}")
    load = os.getloadavg()[0]
    result = {
        "tokenise_tokens_per_second": round(tokenise_rate(options.text, options.tokenizer)),
        "eigen_gflops": round(eigen_rate() / 1e9, 2),
        "seconds_per_shard": round(seconds_per_shard(options.shards), 4),
        "shards": options.shards,
        "load": [round(load, 2), round(os.getloadavg()[0], 2)],
    }
    print(json.dumps(result))


def tokenise_rate(text: Path, tokenizer_source: str) -> float:
    """Tokens a second on one core."""
    tokenizer = load_tokenizer(tokenizer_source)
    source = Input(path=str(text))
    chunks = list_chunks(source, 0, chunk_bytes=32 << 20, dotted_key="--text")
    started, tokens = time.process_time(), 0
    for chunk in chunks:
        documents = list(read_documents(chunk, source, first_row=0))
        tokens += sum(len(document.tokens) for document in tokenise(documents, tokenizer, annotate=False))
    return tokens / (time.process_time() - started)


def eigen_rate(size: int = 1024, repeats: int = 3) -> float:
    """FLOP a second on one core, best of `repeats`."""
    torch.set_num_threads(1)
    matrix = torch.randn(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    matrix = matrix @ matrix.T
    times = []
    for _ in range(repeats):
        started = time.process_time()
        torch.linalg.eigh(matrix)
        times.append(time.process_time() - started)
    return EIGEN_FLOP * size**3 / min(times)


@dataclass(frozen=True)
class Numbered:
    """A shard of no work."""

    key: str


class Nothing:
    """Worker that does nothing."""

    def __init__(self, settings: None):
        pass

    def process(self, shard: Numbered) -> dict[str, Any]:
        return {}


def seconds_per_shard(shards: int) -> float:
    """Of a pool on shards that take no time."""
    from ifguide.config.resources import Resources
    from ifguide.distributed.session import connect
    from ifguide.distributed.shards import Pool, run_shards

    connect(Cluster())
    times = {}
    pool = Pool(size=os.cpu_count() or 1, resources=Resources(gpus=0), in_flight=2)
    for count in (shards // 3, shards):
        with tempfile.TemporaryDirectory(prefix="plan-rates-") as folder:
            started = time.monotonic()
            work = [Numbered(f"{i:06d}") for i in range(count)]
            run_shards("rates", work, Nothing, None, folder=Path(folder), pool=pool)
            times[count] = time.monotonic() - started
    print(json.dumps({"seconds": times}), file=sys.stderr)
    return (times[shards] - times[shards // 3]) / (shards - shards // 3)


if __name__ == "__main__":
    main()
