"""`score_corpus`: one influence score per token, a corpus shard per descriptor over a pool of Ray Data actors.

An actor loads proxy and direction once, reads a corpus shard, writes the scores shard of the same name, and
returns a ledger row. The bytes do not depend on the number of actors, on order, or on retries.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file

from ifguide import schemas
from ifguide.artifacts import Manifest, data_files, publish, require, require_same
from ifguide.influence.scorer import TokenScorer
from ifguide.models import check_vocabulary, load_tokenizer, state_fingerprint
from ifguide.stages.build_query import DIRECTION
from ifguide.stages.proxy import describe_proxy, load_proxy
from ifguide.stages.run import Run, model_mapping
from ifguide.stages.shards import LEDGER, Pool, StageError, run_shards
from ifguide.telemetry import log

VERB = "score_corpus"


def score_corpus(run: Run, *, dry_run: bool = False) -> Manifest | None:
    """Make `scores/`.

    Raises:
        MismatchError: the query is of another proxy. StageError: a shard failed (NaN scores name shard and block).
    """
    config = run.config.score_corpus
    if dry_run:
        log(
            VERB,
            f"would score every token ({config.attribution}) with {config.actors} actors of {config.cpus_per_actor:g}"
            f" CPU, {config.gpus_per_actor:g} GPU, {config.micro_batch_blocks} blocks at a time",
        )
        return None
    corpus, query = require(run.corpus, "pack_corpus"), require(run.query, "build_query")
    proxy = describe_proxy(run, VERB)
    require_same(
        f"the proxy of {run.query}",
        query.inputs["proxy"],
        f"the proxy {run.proxy_source.source}",
        proxy.fingerprint,
        "build the query of this proxy, or name the query's own",
    )
    check_vocabulary(
        proxy.vocab_size,
        load_tokenizer(run.config.tokenizer_source),
        model_name=run.proxy_source.source or "proxy",
        tokenizer_name=run.config.tokenizer_source,
    )
    inputs = {"corpus": corpus.fingerprint, "query": query.fingerprint, "proxy": proxy.fingerprint}
    artifact = run.open(run.scores, VERB, keys=("score_corpus",), inputs=inputs)
    if artifact.manifest:
        log(VERB, f"complete: {artifact.manifest.rows}")
        return artifact.manifest
    descriptors: list[dict[str, Any]] = [
        {"key": path.stem, "shard": path.name, "bytes": path.stat().st_size} for path in data_files(run.corpus)
    ]
    tokens_per_byte = corpus.rows["tokens"] / sum(descriptor["bytes"] for descriptor in descriptors)
    results = run_shards(
        VERB,
        descriptors,
        ScoreShard,
        {
            "corpus": str(run.corpus),
            "scores": str(run.scores),
            "direction": str(run.query / DIRECTION),
            "proxy": model_mapping(run.proxy_source),
            "proxy_fingerprint": proxy.fingerprint,
            "attribution": config.attribution,
            "micro_batch_blocks": config.micro_batch_blocks,
            "gpus": config.gpus_per_actor,
        },
        folder=run.scores,
        pool=Pool(
            size=config.actors,
            cpus=config.cpus_per_actor,
            gpus=config.gpus_per_actor,
            max_attempts=config.max_attempts,
        ),
        unit="tokens",
        amount=lambda descriptor: descriptor["bytes"] * tokens_per_byte,
    )
    rows = {name: sum(result[name] for result in results.values()) for name in ("blocks", "tokens")}
    expected = {name: corpus.rows[name] for name in rows}
    if rows != expected:
        raise StageError(f"{VERB}: scored {rows} of a corpus of {expected}")
    actor_seconds = sum(result["seconds"] for result in results.values())
    summary = {
        "attribution": config.attribution,
        "score_min": min(result["score_min"] for result in results.values()),
        "score_max": max(result["score_max"] for result in results.values()),
        "tokens_per_second_per_actor": round(rows["tokens"] / actor_seconds, 1),
    }
    manifest = artifact.finish(data_files(run.scores), rows=rows, summary=summary, remove=(LEDGER,))
    log(VERB, f"{rows['tokens']:,} tokens, {summary['tokens_per_second_per_actor']:,.0f} tok/s per actor, {run.scores}")
    return manifest


class ScoreShard:
    """Worker: corpus shard in, scores shard out."""

    def __init__(
        self,
        corpus: str,
        scores: str,
        direction: str,
        proxy: dict[str, Any],
        proxy_fingerprint: str,
        attribution: Any,
        micro_batch_blocks: int,
        gpus: float,
    ):
        self.corpus, self.scores, self.micro_batch_blocks = Path(corpus), Path(scores), micro_batch_blocks
        model = load_proxy(proxy, gpus=gpus)
        if gpus == 0:  # the driver hashed the same model on the CPU; another node may see another one
            require_same(
                "the proxy on this node", state_fingerprint(model), "the driver's", proxy_fingerprint, "sync it"
            )
        self.scorer = TokenScorer(model, load_file(direction), attribution=attribution)

    def process(self, descriptor: dict[str, Any]) -> dict[str, Any]:
        started = time.monotonic()
        table = schemas.read_table(self.corpus / descriptor["shard"])
        tokens_BT = schemas.per_token_array(table, "tokens")
        lengths_B = table.column("length").to_numpy()
        scores_BT = self._score(tokens_BT, lengths_B)
        self._require_finite(scores_BT, table, descriptor["shard"])
        schema = schemas.scores(tokens_BT.shape[1])
        columns = [table.column("block_id"), schemas.per_token_column(scores_BT, schema, "token_score")]
        with publish(self.scores / descriptor["shard"]) as part:
            pq.write_table(pa.Table.from_arrays(columns, schema=schema), part)
        return {
            "blocks": len(scores_BT),
            "tokens": int(lengths_B.sum()),
            "score_min": float(scores_BT.min()),
            "score_max": float(scores_BT.max()),
            "seconds": time.monotonic() - started,
        }

    def _score(self, tokens_BT: np.ndarray, lengths_B: np.ndarray) -> np.ndarray:
        """Micro-batches always start at multiples of their size: the same batches whoever scores the shard."""
        parts = []
        for start in range(0, len(tokens_BT), self.micro_batch_blocks):
            rows = slice(start, start + self.micro_batch_blocks)
            tokens = torch.from_numpy(tokens_BT[rows].astype(np.int64))
            lengths = torch.from_numpy(lengths_B[rows].astype(np.int64))
            parts.append(self.scorer.score(tokens, lengths).float().cpu().numpy())
        return np.concatenate(parts)

    def _require_finite(self, scores_BT: np.ndarray, table: pa.Table, shard: str) -> None:
        broken = np.argwhere(~np.isfinite(scores_BT))
        if len(broken):
            block = table.column("block_id")[int(broken[0][0])].as_py()
            value = scores_BT[tuple(broken[0])]
            raise ValueError(
                f"scores of {shard}: {len(broken)} are not finite, the first is {value} at token {broken[0][1]} of"
                f" block {block}; the proxy or the query overflows, check both for NaN"
            )
