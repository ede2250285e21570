"""`score_corpus`: one influence score per token, a corpus shard per descriptor over a pool of Ray Data actors.

An actor loads proxy and directions once, reads a corpus shard, writes the scores shard of the same name, and
returns a ledger row; while it computes, it reads the next shard and writes the last one. The bytes do not depend
on the number of actors, on order, or on retries: method, steps, threads and micro-batch are decided once
(`scoring_method`). A shard that had to halve its micro-batch says so.
"""

from __future__ import annotations

import logging
import threading
import time
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file

from ifguide import schemas
from ifguide.artifacts import Manifest, data_files, publish, require, require_same, verified
from ifguide.config import OWN, to_mapping
from ifguide.distributed.session import require_resources
from ifguide.distributed.shards import LEDGER, Pool, StageError, run_shards
from ifguide.influence.memory import is_out_of_memory, keep_memory
from ifguide.influence.scorer import Method, TokenScorer
from ifguide.models import check_vocabulary, state_fingerprint
from ifguide.run import Run
from ifguide.stages.build_query import DIRECTION
from ifguide.stages.proxy import describe_proxy, load_proxy
from ifguide.stages.scoring_method import METHOD, chosen_method, decide
from ifguide.storage import local_copy, location
from ifguide.telemetry import log
from ifguide.tokenizer import load_tokenizer

VERB = "score_corpus"
logger = logging.getLogger(__name__)


def score_corpus(run: Run, *, dry_run: bool = False) -> Manifest | None:
    """Make `scores/`.

    Raises:
        MismatchError: the query is of another proxy. StageError: a shard failed (NaN scores name shard and block).
    """
    config = run.config.score_corpus
    method = chosen_method(config)
    if dry_run:
        log(
            VERB,
            f"would score every token ({config.attribution}, {method.precision}, rank {method.rank or 'full'}) of"
            f" {1 + len(config.queries)} behaviours with {config.min_actors} to {config.max_actors} actors of"
            f" {config.resources.cpus:g} CPU, {config.resources.gpus:g} GPU",
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
    directions = {OWN: str(run.query / DIRECTION)}
    for name, folder in config.queries.items():
        further = require(location(folder), "build_query")
        require_same(
            f"the proxy of {folder}", further.inputs["proxy"], "this run's", proxy.fingerprint, "build it of this proxy"
        )
        inputs[f"query.{name}"] = further.fingerprint
        directions[name] = str(location(folder) / DIRECTION)
    artifact = run.open(run.scores, VERB, keys=("score_corpus",), inputs=inputs)
    if artifact.manifest:
        log(VERB, f"complete: {artifact.manifest.rows}")
        return artifact.manifest
    require_resources(run.config.cluster, VERB, config.resources)
    descriptors: list[dict[str, Any]] = [
        {"key": path.stem, "shard": path.name, "bytes": corpus.files[path.name]["bytes"]}
        for path in data_files(run.corpus)
    ]
    tokens_per_byte = corpus.rows["tokens"] / sum(descriptor["bytes"] for descriptor in descriptors)
    model = to_mapping(run.proxy_source)
    decision = decide(
        run.scores, config, proxy=model, directions=directions, first_shard=run.corpus / descriptors[0]["shard"]
    )
    results = run_shards(
        VERB,
        descriptors,
        ScoreShard,
        {
            "corpus": str(run.corpus),
            "scores": str(run.scores),
            "directions": directions,
            "proxy": model,
            "proxy_fingerprint": proxy.fingerprint,
            "attribution": config.attribution,
            "decision": {name: decision[name] for name in ("method", "steps", "micro_batch_blocks", "threads")},
            "gpus": config.resources.gpus,
        },
        folder=run.scores,
        pool=Pool(
            size=config.max_actors,
            min_size=config.min_actors,
            resources=config.resources,
            in_flight=2,
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
        **{name: decision[name] for name in ("method", "engine", "steps", "micro_batch_blocks", "threads", "check")},
        "energy": {name: decision["energy"][name] for name in ("least", "mean")},
        "shards_with_halved_micro_batch": sorted(key for key, result in results.items() if result["halvings"]),
        "score_min": min(result["score_min"] for result in results.values()),
        "score_max": max(result["score_max"] for result in results.values()),
        "tokens_per_second_per_actor": round(rows["tokens"] / actor_seconds, 1),
    }
    files = [*(run.scores / descriptor["shard"] for descriptor in descriptors), run.scores / METHOD]
    manifest = artifact.finish(files, rows=rows, summary=summary, remove=(LEDGER,), digests=results.files)
    log(VERB, f"{rows['tokens']:,} tokens, {summary['tokens_per_second_per_actor']:,.0f} tok/s per actor, {run.scores}")
    return manifest


class ScoreShard:
    """Worker: corpus shard in, scores shard out. Two threads call it: one computes, one reads or writes."""

    def __init__(
        self,
        corpus: str,
        scores: str,
        directions: dict[str, str],
        proxy: dict[str, Any],
        proxy_fingerprint: str,
        attribution: Any,
        decision: dict[str, Any],
        gpus: float,
    ):
        keep_memory()
        self.corpus, self.scores, self.computing = location(corpus), location(scores), threading.Lock()
        self.behaviours = list(directions)
        self.micro_batch_blocks = decision["micro_batch_blocks"]
        torch.set_num_threads(decision["threads"])  # of the run, whatever this run's actors have: it changes the bytes
        model = load_proxy(proxy, gpus=gpus)
        # Another node may see another model of that name.
        require_same("the proxy on this node", state_fingerprint(model), "the driver's", proxy_fingerprint, "sync it")
        self.scorer = TokenScorer(
            model,
            [load_file(local_copy(path)) for path in directions.values()],
            attribution=attribution,
            method=Method(**decision["method"]),
            steps=decision["steps"],
        )

    def process(self, descriptor: dict[str, Any]) -> dict[str, Any]:
        table = schemas.read_table(verified(self.corpus, descriptor["shard"]))
        tokens_BT = schemas.per_token_array(table, "tokens")
        lengths_B = table.column("length").to_numpy()
        with self.computing:
            started = time.monotonic()
            scores_KBT, halvings = self._score(tokens_BT, lengths_B)
            seconds = time.monotonic() - started
        for scores_BT in scores_KBT:
            self._require_finite(scores_BT, table, descriptor["shard"])
        schema = schemas.scores(tokens_BT.shape[1], self.behaviours)
        names = [schemas.score_column(behaviour) for behaviour in self.behaviours]
        columns = [
            schemas.per_token_column(scores_BT, schema, name) for name, scores_BT in zip(names, scores_KBT, strict=True)
        ]
        with publish(self.scores / descriptor["shard"]) as part:
            # Hardly two scores are equal: a dictionary of them is longer than they are.
            scored = pa.Table.from_arrays([table.column("block_id"), *columns], schema=schema)
            pq.write_table(scored, part, use_dictionary=False)
        return {
            "blocks": len(tokens_BT),
            "tokens": int(lengths_B.sum()),
            "score_min": float(scores_KBT.min()),
            "score_max": float(scores_KBT.max()),
            "seconds": seconds,
            "halvings": halvings,
        }

    def _score(self, tokens_BT: np.ndarray, lengths_B: np.ndarray) -> tuple[np.ndarray, int]:
        """(K, B, T), and how often the micro-batch had to be halved.

        Micro-batches start at multiples of their size: the same batches whoever scores the shard.
        """
        size, halvings, start, parts = self.micro_batch_blocks, 0, 0, []
        while start < len(tokens_BT):
            rows = slice(start, start + size)
            tokens = torch.from_numpy(tokens_BT[rows].astype(np.int64))
            lengths = torch.from_numpy(lengths_B[rows].astype(np.int64))
            try:
                parts.append(self.scorer.score(tokens, lengths, usual_blocks=size).float().cpu().numpy())
            except (RuntimeError, MemoryError) as error:
                if size == 1 or not is_out_of_memory(error):
                    raise
                size, halvings = size // 2, halvings + 1
                logger.warning("out of memory at %d blocks, going on with %d", 2 * size, size)
                continue
            start += size
        return np.concatenate(parts, axis=1), halvings

    def _require_finite(self, scores_BT: np.ndarray, table: pa.Table, shard: str) -> None:
        broken = np.argwhere(~np.isfinite(scores_BT))
        if len(broken):
            block = table.column("block_id")[int(broken[0][0])].as_py()
            value = scores_BT[tuple(broken[0])]
            raise ValueError(
                f"scores of {shard}: {len(broken)} are not finite, the first is {value} at token {broken[0][1]} of"
                f" block {block}; the proxy or the query overflows, check both for NaN"
            )
