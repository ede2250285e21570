"""Token scores of a corpus by a method that is fitted once: n-grams, a probe, excess loss, or words by influence.

The finder is fitted in one worker and kept in `finder/` of the folder of scores. Then every shard of the corpus gets a
table of scores of the same schema as `score_corpus` makes, rows in as rows out: whatever reads those reads these. Both
steps are resumed. Words by influence are counted shard by shard before.

Bytes are the same for any number of workers. Another number of threads in a worker moves scores by rounding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from ifguide import schemas
from ifguide.artifacts import FileEntry, publish
from ifguide.config import OWN, ModelSource
from ifguide.config.compare import ExcessLoss, Ngrams, Probe
from ifguide.config.resources import Resources
from ifguide.config.typed_yaml import result_part
from ifguide.distributed.shards import Pool, StageError, run_shards
from ifguide.influence.proxy import load_same_proxy
from ifguide.influence.query_file import read_queries
from ifguide.influence.score_tables import write_scores
from ifguide.methods.excess_loss import ExcessLossFinder, load_excess_loss, tune_excess_loss
from ifguide.methods.influence_words import USES, score_words, sum_uses, summary_of, word_finder
from ifguide.methods.labelled_blocks import labelled_blocks
from ifguide.methods.ngrams import CONTEXT, NgramFinder, Words, fit_ngrams, load_ngrams
from ifguide.methods.probes import ProbeFinder, fit_cross_probe, fit_query_probe, load_probe
from ifguide.methods.reading import QuerySets
from ifguide.selection.top import ScoredCorpus
from ifguide.spans.tables import PackedCorpus, document_numbers, shard_name
from ifguide.storage import local_copy
from ifguide.tokenizer import load_tokenizer

FINDER = "finder"  # scratch folder of what is fitted, within that of the scores
FILES = {
    "ngrams": f"{FINDER}/ngrams.json",
    "probe": f"{FINDER}/probe.npz",
    "span_probe": f"{FINDER}/probe.npz",
    "excess_loss": f"{FINDER}/tuned.safetensors",
    "influence_words": "words.parquet",  # stays beside the scores: people read it
}
WITHOUT_PROXY = ("ngrams", "influence_words")
WITHOUT_QUERY = ("span_probe", "influence_words")
Finder = NgramFinder | ProbeFinder | ExcessLossFinder


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """How a corpus is scored: a kind of `Method.mask`, its options, and what it learns from.

    `queries` is the folder of the query, `max_tokens` of one. `proxy_fingerprint` is that of the query's proxy, or of
    the run's where it has no query; `beginning` is the proxy's. `gpus` are a worker's. `scored`: the scores that words
    are found by, of `influence_words` alone, which needs no proxy."""

    kind: str
    options: Ngrams | Probe | ExcessLoss | None
    queries: Path
    max_tokens: int
    tokenizer: str
    proxy: ModelSource
    seed: int
    proxy_fingerprint: str = ""
    beginning: int | None = None
    gpus: float = 0.0
    scored: ScoredCorpus | None = None

    def result_options(self) -> dict[str, Any]:
        """What decides the scores, besides the corpus and the query, or the scores that words are found by."""
        if self.scored is not None:
            return {"scores": self.kind, "column": self.scored.column}
        return {"scores": self.kind, self.kind: result_part(self.options), "seed": self.seed}

    def file(self, folder: Path) -> Path:
        """Where the finder lies in the folder of the scores."""
        return folder / FILES[self.kind]


@dataclass(frozen=True, kw_only=True)
class ScoredShards:
    """What was scored: blocks and tokens, what the finder says of itself and the range of the scores; `files`, and of
    these `further` ones beside the tables of scores."""

    rows: dict[str, int]
    summary: dict[str, Any]
    files: Mapping[str, FileEntry]
    further: tuple[Path, ...] = ()


def score_tokens(
    scoring: Scoring, corpus: PackedCorpus, folder: Path, *, verb: str, resources: Resources
) -> ScoredShards:
    """Fit the finder and write the scores of every shard of the corpus in `folder`.

    Raises:
        StageError: the fit or a shard failed, or not every block was scored.
    """
    gpus = 0.0 if scoring.kind in WITHOUT_PROXY else resources.gpus
    scoring, resources = replace(scoring, gpus=gpus), replace(resources, gpus=gpus)
    settings, pool = ScoringSettings(scoring=scoring, corpus=corpus, folder=folder), Pool.filling_cluster(resources)
    if scoring.scored is not None:
        counts = [ShardTask(key=f"count-{shard_name(i)}", shard=i) for i in range(corpus.num_shards)]
        run_shards(verb, counts, CountWords, settings, folder=folder, pool=pool, unit="shards counted")
    fitted = run_shards(
        verb,
        [FitTask(key=f"fit-{scoring.kind}")],
        FitFinder,
        settings,
        folder=folder,
        pool=Pool(size=1, resources=resources),
        unit="finders fitted",
    )
    shards = [ShardTask(key=f"score-{shard_name(i)}", shard=i) for i in range(corpus.num_shards)]
    results = run_shards(verb, shards, ScoreByFinder, settings, folder=folder, pool=pool, unit="shards scored")
    rows = {name: sum(result[name] for result in results.values()) for name in ("blocks", "tokens")}
    if rows != {"blocks": corpus.num_blocks, "tokens": corpus.num_tokens}:
        raise StageError(f"{verb}: scored {rows} of {corpus.num_blocks} blocks, {corpus.num_tokens} tokens")
    summary = {
        **next(iter(fitted.values())),
        "score_min": min(result["score_min"] for result in results.values()),
        "score_max": max(result["score_max"] for result in results.values()),
    }
    further = () if scoring.scored is None else (scoring.file(folder),)
    return ScoredShards(rows=rows, summary=summary, files={**fitted.files, **results.files}, further=further)


@dataclass(frozen=True, kw_only=True)
class ScoringSettings:
    """Of the workers: the corpus, and the folder of its scores."""

    scoring: Scoring
    corpus: PackedCorpus
    folder: Path


@dataclass(frozen=True, kw_only=True)
class FitTask:
    """The finder."""

    key: str


@dataclass(frozen=True, kw_only=True)
class ShardTask:
    """One shard of the corpus, by its number."""

    key: str
    shard: int


class CountWords:
    """Worker: one shard of the corpus and its scores -> the sums of its words."""

    def __init__(self, settings: ScoringSettings):
        assert settings.scoring.scored is not None
        self.folder, self.scored = settings.folder, settings.scoring.scored
        self.words = Words(load_tokenizer(settings.scoring.tokenizer))

    def process(self, task: ShardTask) -> dict[str, Any]:
        uses = sum_uses(self.scored, task.shard, self.words)
        with publish(_counted(self.folder, task.shard)) as part:
            pq.write_table(uses, part)
        return {"words": len(uses)}


class FitFinder:
    """Worker: the queries, annotated documents, or sums of words -> the finder."""

    def __init__(self, settings: ScoringSettings):
        self.settings, self.scoring = settings, settings.scoring

    def process(self, task: FitTask) -> dict[str, Any]:
        file = self.scoring.file(self.settings.folder)
        if self.scoring.scored is not None:
            shards = range(self.settings.corpus.num_shards)
            table, k = score_words(schemas.read_table(_counted(self.settings.folder, i), USES) for i in shards)
            with publish(file) as part:
                pq.write_table(table, part)
            return summary_of(table, k)
        finder = self._fit()
        with publish(file) as part:
            finder.save(part)
        return finder.summary

    def _fit(self) -> Finder:
        scoring, tokenizer = self.scoring, load_tokenizer(self.scoring.tokenizer)
        options, seed, corpus = scoring.options, scoring.seed, self.settings.corpus
        if scoring.kind == "span_probe":
            assert isinstance(options, Probe)
            blocks, labels, documents = labelled_blocks(corpus, options.tokens // 2, seed)
            return fit_cross_probe(
                _proxy(scoring), blocks, labels, documents, options=options, seed=seed, beginning=scoring.beginning
            )
        queries = read_queries(scoring.queries)
        sets = QuerySets.of(queries, max_tokens=scoring.max_tokens, beginning=scoring.beginning)
        if isinstance(options, Ngrams):
            return fit_ngrams(tokenizer, sets, options=options)
        if isinstance(options, Probe):
            return fit_query_probe(_proxy(scoring), tokenizer, sets, options=options, seed=seed)
        assert isinstance(options, ExcessLoss)
        return tune_excess_loss(_proxy(scoring), tokenizer, sets, options=options, seed=seed)


class ScoreByFinder:
    """Worker: one shard of the corpus -> its scores."""

    def __init__(self, settings: ScoringSettings):
        self.corpus, self.folder, self.scoring = settings.corpus, settings.folder, settings.scoring
        file, beginning = local_copy(self.scoring.file(self.folder)), self.scoring.beginning
        self.finder: Finder
        if self.scoring.kind == "ngrams":
            self.finder = load_ngrams(file, load_tokenizer(self.scoring.tokenizer))
        elif self.scoring.kind == "influence_words":
            self.finder = word_finder(file, Words(load_tokenizer(self.scoring.tokenizer)))
        elif self.scoring.kind == "excess_loss":
            assert isinstance(self.scoring.options, ExcessLoss)
            precision = self.scoring.options.precision
            self.finder = load_excess_loss(file, _proxy(self.scoring), beginning=beginning, precision=precision)
        else:
            self.finder = load_probe(file, _proxy(self.scoring), beginning=beginning)

    def process(self, task: ShardTask) -> dict[str, Any]:
        begin, end = self.corpus.extent(task.shard)
        values, size = self._score(task.shard, begin, end), self.corpus.block_size
        num_blocks = -(-len(values) // size)
        scores_BT = np.zeros((num_blocks, size), np.float32)
        scores_BT.reshape(-1)[: len(values)] = values
        scores_BT[:, 0] = 0
        block_ids = pa.array(begin // size + np.arange(num_blocks), pa.int64())
        write_scores(self.folder / f"shard-{shard_name(task.shard)}.parquet", block_ids, {OWN: scores_BT})
        return {
            "blocks": num_blocks,
            "tokens": end - begin,
            "score_min": float(scores_BT.min()),
            "score_max": float(scores_BT.max()),
        }

    def _score(self, shard: int, begin: int, end: int) -> NDArray[np.float32]:
        """The scores (n,) of the shard's tokens."""
        corpus = self.corpus
        if self.finder.in_stream:
            low, high = corpus.extent(shard, CONTEXT)
            (scores,) = self.finder.score([corpus.read(corpus.folder, "shard", "tokens", low, high).tolist()])
            return scores[begin - low : end - low]
        blocks = _in_blocks(corpus.read(corpus.folder, "shard", "tokens", begin, end), corpus.block_size)
        if self.scoring.kind == "span_probe":
            assert isinstance(self.finder, ProbeFinder)
            documents = _in_blocks(document_numbers(corpus, shard), corpus.block_size)
            return np.concatenate(self.finder.score([block.tolist() for block in blocks], documents))
        return np.concatenate(self.finder.score([block.tolist() for block in blocks]))


def _counted(folder: Path, shard: int) -> Path:
    return folder / FINDER / f"uses-{shard_name(shard)}.parquet"


def _in_blocks(values: np.ndarray, block_size: int) -> list[np.ndarray]:
    return [values[start : start + block_size] for start in range(0, len(values), block_size)]


def _proxy(scoring: Scoring) -> Any:
    """The proxy that the query was made with, or this scoring begun.

    Raises:
        MismatchError: another one lies there by now."""
    whose = "this run's" if scoring.kind in WITHOUT_QUERY else "the query's"
    model = load_same_proxy(scoring.proxy, gpus=scoring.gpus, fingerprint=scoring.proxy_fingerprint, whose=whose)
    return model.requires_grad_(False)
