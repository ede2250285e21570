"""The work of `score_corpus` with a student: its pass over all blocks, and the exact one over some of them."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ifguide import schemas
from ifguide.artifacts import publish
from ifguide.config import OWN
from ifguide.influence.memory import keep_memory
from ifguide.influence.query_file import read_direction
from ifguide.influence.score_tables import write_scores
from ifguide.influence.scoring_worker import CorpusShard, ScoringSettings, by_micro_batch, tensors
from ifguide.models import predicted_positions
from ifguide.spans.tables import shard_name
from ifguide.student.recheck import block_counts, histogram_of
from ifguide.student.sampling import ShardBlocks, audited_rows, read_blocks
from ifguide.student.scorers import StudentFacts, load_scorer

FIRST_PASS = "student"  # a folder in that of the scores, until they are finished


@dataclass(frozen=True, kw_only=True)
class CascadeSettings:
    """What both passes work with. `replaces`: the exact scores stand in place of the student's (`cascade`). `least`:
    the count of a block from which on it is rechecked; of the second pass."""

    scoring: ScoringSettings
    student: Path
    facts: StudentFacts
    audit_fraction: float
    seed: int
    replaces: bool
    least: float | None = None

    def first(self, shard: int) -> Path:
        """The student's scores of a shard."""
        return self.scoring.scores / FIRST_PASS / f"shard-{shard_name(shard)}.parquet"

    def audit(self, shard: int) -> Path:
        return self.scoring.scores / f"audit-{shard_name(shard)}.parquet"

    def documents(self, blocks: ShardBlocks) -> np.ndarray | None:
        """Their documents, where these do not see each other."""
        return self.scoring.apart(blocks.documents_BT)


def first_pass(shard: CorpusShard) -> CorpusShard:
    """The shard as a piece of the student's pass, whose ledger both passes share."""
    return replace(shard, key=f"{FIRST_PASS}-{shard.key}")


class ScoreByStudent:
    """Worker: corpus shard in, the student's scores out, with the count of each block (`recheck`). Two threads call it:
    one computes, one reads or writes."""

    def __init__(self, settings: CascadeSettings):
        keep_memory()
        self.settings, self.computing = settings, threading.Lock()
        self.scorer = load_scorer(settings.student, settings.facts.kind, settings.scoring)

    def process(self, shard: CorpusShard) -> dict[str, Any]:
        settings = self.settings
        blocks = read_blocks(settings.scoring.corpus, shard.number)
        with self.computing:
            started = time.monotonic()
            scores_BT = self.scorer.score(blocks.tokens_BT, blocks.lengths_B, settings.documents(blocks))
            seconds = time.monotonic() - started
        _write_first(settings.first(shard.number), blocks, scores_BT, settings.facts.edge)
        return {"blocks": len(scores_BT), "tokens": int(blocks.lengths_B.sum()), "seconds": seconds}


class Recheck:
    """Worker: corpus shard and the student's scores in; scores shard and audit out. Two threads call it."""

    def __init__(self, settings: CascadeSettings):
        keep_memory()
        self.settings, self.computing = settings, threading.Lock()
        (query,) = settings.scoring.queries.values()
        self.scorer = settings.scoring.scorer([read_direction(query)])

    def process(self, shard: CorpusShard) -> dict[str, Any]:
        settings = self.settings
        blocks = read_blocks(settings.scoring.corpus, shard.number)
        student_BT, counts_B = _read_first(settings.first(shard.number))
        assert settings.least is not None
        rechecked_B = counts_B >= settings.least
        sampled = settings.facts.sampling.rows(blocks.sources_BT[:, 0], shard.number)
        audited = audited_rows(len(counts_B), sampled, settings.audit_fraction, settings.seed, shard.number)
        wanted_B = rechecked_B.copy() if settings.replaces else np.zeros_like(rechecked_B)
        wanted_B[audited] = True
        rows = np.flatnonzero(wanted_B)
        with self.computing:
            started = time.monotonic()
            exact_RT, halvings = self._exact(blocks.take(rows))
            seconds = time.monotonic() - started
        scores_BT = student_BT.copy()
        if settings.replaces:
            scores_BT[rows] = exact_RT
        write_scores(settings.scoring.scores / shard.name, pa.array(blocks.ids_B), {OWN: scores_BT})
        exact_AT = exact_RT[np.searchsorted(rows, audited)]
        self._write_audit(shard.number, blocks.take(audited), exact_AT, student_BT[audited], rechecked_B[audited])
        return {
            "blocks": len(scores_BT),
            "tokens": int(blocks.lengths_B.sum()),
            "exact_blocks": len(rows),
            "rechecked_blocks": int(rechecked_B.sum()),
            "audited_blocks": len(audited),
            "sources": list(blocks.sources),
            "score_min": float(scores_BT.min()),
            "score_max": float(scores_BT.max()),
            "seconds": seconds,
            "halvings": halvings,
        }

    def _exact(self, blocks: ShardBlocks) -> tuple[np.ndarray, int]:
        """(B, T) and how often the micro-batch was halved."""
        size, documents_BT = self.settings.scoring.decision.micro_batch_blocks, self.settings.documents(blocks)
        parts, halvings = [np.zeros((0, blocks.tokens_BT.shape[1]), np.float32)], 0
        for _, (scores_KBT, _), times in by_micro_batch(
            self.scorer, (), blocks.tokens_BT, blocks.lengths_B, size, documents_BT
        ):
            parts.append(scores_KBT[0].float().cpu().numpy())
            halvings += times
        return np.concatenate(parts), halvings

    def _write_audit(
        self, shard: int, blocks: ShardBlocks, exact_BT: np.ndarray, student_BT: np.ndarray, rechecked_B: np.ndarray
    ) -> None:
        """Publish `schemas.AUDIT` of the blocks' predicted tokens."""
        documents_BT = self.settings.documents(blocks)
        known_BT = predicted_positions(*tensors(blocks.tokens_BT, blocks.lengths_B, documents_BT, slice(None))).numpy()
        row_N, place_N = np.nonzero(known_BT)
        sources = np.array(blocks.sources, dtype=object)[blocks.sources_BT[known_BT]]
        values = [blocks.ids_B[row_N], place_N, sources, exact_BT[known_BT], student_BT[known_BT], rechecked_B[row_N]]
        columns = [pa.array(own, field.type) for own, field in zip(values, schemas.AUDIT, strict=True)]
        with publish(self.settings.audit(shard)) as part:
            pq.write_table(pa.Table.from_arrays(columns, schema=schemas.AUDIT), part)


def count_blocks(settings: CascadeSettings, shards: Sequence[int], bucket: int | None) -> np.ndarray:
    """`recheck.histogram_of` the counts of some shards."""
    counts = (_read_first(settings.first(shard), scores=False)[1] for shard in shards)
    return functools.reduce(np.add, (histogram_of(counts_B, bucket) for counts_B in counts))


def _first_schema(block_size: int) -> pa.Schema:
    return schemas.scores(block_size).append(pa.field("recheck_count", pa.float32(), nullable=False))


def _write_first(path: Path, blocks: ShardBlocks, scores_BT: np.ndarray, edge: float) -> None:
    if not np.isfinite(scores_BT).all():
        raise ValueError(f"the student's scores of {path.name} are not finite; check proxy and query for NaN")
    schema = _first_schema(scores_BT.shape[1])
    columns = [
        pa.array(blocks.ids_B),
        schemas.per_token_column(scores_BT, schema, schemas.score_column(OWN)),
        pa.array(block_counts(scores_BT, edge)),
    ]
    with publish(path) as part:
        pq.write_table(pa.Table.from_arrays(columns, schema=schema), part, use_dictionary=False)


def _read_first(path: Path, *, scores: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """The student's scores (B, T), if wanted, and the blocks' counts (B,)."""
    wanted = [schemas.score_column(OWN)] if scores else []
    table = schemas.read_table(path, columns=[*wanted, "recheck_count"])
    counts_B = table.column("recheck_count").to_numpy()
    return schemas.per_token_array(table, wanted[0]) if scores else np.zeros((0, 0), np.float32), counts_B
