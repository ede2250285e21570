"""`pack_corpus`: documents -> packed token blocks, where each token stops in its text, and a document table.

Two passes, each a task per chunk or shard: tokenise chunks (scratch Parquet), pack shards. Of inputs of which only some
`rows` are taken, chunks are counted before, until they have as many rows as are asked for. The driver holds one
integer per document (its token count), never text or tokens. A copy of the tokenizer is kept in the corpus before the
first chunk, and every chunk is tokenised with it: the source may move or change before a pack that was ended goes on.
Where the target has another tokenizer, the same documents are packed in its tokens too.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ifguide.artifacts import MANIFEST, Manifest, discard_if_mended, remove_tree
from ifguide.config import ConfigError, PackCorpus
from ifguide.config.resources import WorkerResources
from ifguide.corpus.bad_rows import list_bad_rows, read_bad_rows
from ifguide.corpus.chunks import KeyedChunk, keyed_chunks, number_rows, placed_chunks, plan_chunks, uncounted_chunks
from ifguide.corpus.inputs import (
    InputFile,
    at_commits,
    hub_commits,
    input_files,
    input_marks,
    require_marks,
    write_commits,
    write_inputs,
)
from ifguide.corpus.reading import Chunk
from ifguide.corpus.stream import TOKENS, StreamPlan
from ifguide.corpus.tables import TOKENIZER, require_same_documents
from ifguide.corpus.workers import CountRows, PackShard, TokeniseChunk, TokeniseSettings, train_on_chunks
from ifguide.distributed.session import connect, require_resources
from ifguide.distributed.shards import LEDGER, Pool, StageError, run_shards
from ifguide.distributed.tasks import run_task, run_tasks
from ifguide.run import Run
from ifguide.storage import location
from ifguide.telemetry import log
from ifguide.tokenizer import load_tokenizer, require_kept, save_tokenizer

VERB = "pack_corpus"
SHOWN_BAD_ROWS = 10
COUNTS = "counts"  # scratch folder of the row counts
ONE_CPU = WorkerResources(gpus=0.0)


def pack_corpus(run: Run, *, dry_run: bool = False) -> Manifest | None:
    """Make `corpus/`, and `target/corpus/` where the target has another tokenizer.

    Raises:
        FileNotFoundError: an input is missing. ConfigError: none is named, or the machine is too small for a task.
        StageError: more than `max_bad_rows` bad rows.
        ValueError: no documents, or fewer tokens than one block; an input is written to meanwhile.
        MismatchError: a finished corpus that is there is of other inputs, or an unfinished one of another tokenizer.
    """
    if not run.config.pack_corpus.inputs:
        raise ConfigError("pack_corpus.inputs: name at least one file, folder or hf:// dataset")
    own = location(run.config.run_dir)
    manifest = _pack(run, own, run.corpus, dry_run=dry_run)
    if run.target is not run:
        packed = _pack(run.target, own, run.corpus, dry_run=dry_run)
        if manifest and packed:
            require_same_documents(run.corpus, manifest, run.target.corpus, packed)
    return manifest


def _pack(run: Run, own: Path, documents: Path, *, dry_run: bool) -> Manifest | None:
    """`own`: the run's directory, which is no input though it may lie in one. `documents`: the corpus whose documents
    these are, at the same commits of the hub."""
    config, source = run.config.pack_corpus, run.tokenizer_source
    ask_hub = not dry_run and not (run.corpus / MANIFEST).exists()
    commits = hub_commits([run.corpus, documents], config.inputs) if ask_hub else {}
    config = replace(config, inputs=at_commits(config.inputs, commits))
    marks = {} if dry_run else input_marks(config.inputs, apart=own)
    chunks = plan_chunks(config, open_hub=ask_hub, apart=own)
    if dry_run:
        paths = {chunk.path for chunk in chunks}
        log(VERB, f"would tokenise {len(chunks)} chunks of {len(paths)} inputs with {source}")
        return None
    files = _input_files(run, chunks)
    require_marks(marks, files, {chunk.path for chunk in chunks if chunk.kind != "hub"})
    contents = {path: {"bytes": file.bytes, "sha256": file.sha256} for path, file in files.items()}
    if discard_if_mended(run.corpus, contents):
        log(VERB, "inputs have changed since this corpus was begun; it is begun anew")
    artifact = run.open(run.corpus, VERB, inputs={}, extra={"files": contents})
    write_inputs(run.corpus, files)
    write_commits(run.corpus, commits)
    if artifact.manifest:
        log(VERB, f"complete: {artifact.manifest.rows}")
        return artifact.manifest
    connect(run.config.cluster)
    require_resources(run.config.cluster, VERB, config.resources)
    pool = Pool.filling_cluster(config.resources)
    tokenised = _tokenise(run.corpus, source, config, keyed_chunks(chunks, config.inputs, files), pool)
    _check_bad_rows(run.corpus, tokenised, config.max_bad_rows)
    plan = StreamPlan(run.corpus, config, chunks, tokenised, load_tokenizer(str(run.corpus / TOKENIZER)))
    results = run_shards(
        VERB,
        plan.shards(),
        PackShard,
        plan.settings(),
        folder=run.corpus,
        pool=pool,
        unit="tokens",
        amount=lambda shard: shard.num_tokens,
    )
    rows = {name: sum(result[name] for result in results.values()) for name in plan.rows}
    if rows != plan.rows:
        raise StageError(f"{VERB}: packed {rows} where {plan.rows} were read")
    summary = {
        "tokenizer": source,
        "block_size": config.block_size,
        "vocab_size": plan.vocab_size,
        "annotated": plan.annotate,
        "bad_rows": sum(result["bad_rows"] for result in tokenised.values()),
        "special_texts": sum(result["special_texts"] for result in tokenised.values()),
        **({"commits": commits} if commits else {}),
    }
    if summary["special_texts"]:
        what = f"as {config.special_tokens} (pack_corpus.special_tokens)"
        log(VERB, f"documents name special tokens {summary['special_texts']:,} times; packed {what}")
    outputs = [run.corpus / f"{kind}-{key}.parquet" for kind in ("shard", "documents", "offsets") for key in results]
    outputs += [path for path in (run.corpus / TOKENIZER).glob("*") if path.is_file()]
    manifest = artifact.finish(
        outputs, rows=rows, summary=summary, remove=(LEDGER, TOKENS, COUNTS), digests=results.files
    )
    counts = ", ".join(f"{rows[name]:,} {name}" for name in ("documents", "tokens", "blocks"))
    log(VERB, f"{counts} in {run.corpus}")
    return manifest


def _input_files(run: Run, chunks: Sequence[Chunk]) -> dict[str, InputFile]:
    """What the chunks' files hold; the cluster reads those that are not known yet."""

    def on_cluster(function: Callable[..., Any], calls: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
        connect(run.config.cluster)
        return run_tasks(ONE_CPU)(function, calls)

    paths = {chunk.path for chunk in chunks if chunk.kind != "hub"}
    paths |= {source.rows for source in run.config.pack_corpus.inputs if isinstance(source.rows, str)}
    return input_files(run.corpus, paths, on_cluster)


def _tokenise(
    corpus: Path, source: str, config: PackCorpus, keyed: Sequence[KeyedChunk], pool: Pool
) -> dict[str, dict[str, Any]]:
    """The result of every chunk by key, with the `first_row` of its file. `source`: of the tokenizer."""
    inputs, vocab_size, kept = config.inputs, config.train_tokenizer, corpus / TOKENIZER
    settings = TokeniseSettings(
        inputs=inputs,
        tokenizer=str(kept),
        folder=str(corpus / TOKENS),
        special_text=config.special_tokens == "token",
    )
    counted: dict[str, dict[str, Any]] = {}
    while following := uncounted_chunks(keyed, inputs, counted, pool.size):
        counted |= run_shards(
            VERB, following, CountRows, settings, folder=corpus / COUNTS, pool=pool, unit="chunks counted"
        )
    keyed = placed_chunks(keyed, inputs, counted)
    if _keeps_tokenizer(corpus):
        if vocab_size is None:
            require_kept(source, kept)
    elif vocab_size is None:
        save_tokenizer(load_tokenizer(source), kept)
    else:
        log(VERB, f"training a tokenizer of {vocab_size:,} tokens")
        run_task(train_on_chunks, keyed, inputs, vocab_size, str(kept), resources=ONE_CPU)
    tokenised = run_shards(
        VERB,
        keyed,
        TokeniseChunk,
        settings,
        folder=corpus / TOKENS,
        pool=pool,
        unit="chunks tokenised",
    )
    number_rows(keyed, tokenised)
    return tokenised


def _keeps_tokenizer(corpus: Path) -> bool:
    """Whether chunks were begun with the tokenizer that the corpus keeps. It is whole then: on an object store one that
    was cut off may be there before. Tokens without a tokenizer are of an unknown one, and removed."""
    if not (corpus / TOKENS).exists():
        return False
    if (corpus / TOKENIZER).exists():
        return True
    log(VERB, f"{corpus / TOKENIZER} is not there: its chunks are tokenised anew")
    for scratch in (LEDGER, TOKENS):
        remove_tree(corpus / scratch)
    return False


def _check_bad_rows(corpus: Path, tokenised: dict[str, dict[str, Any]], limit: int) -> None:
    count = sum(result["bad_rows"] for result in tokenised.values())
    if not count:
        return
    listing = corpus / "bad_rows.csv"
    first_rows = {key: result["first_row"] for key, result in tokenised.items() if result["bad_rows"]}
    list_bad_rows(read_bad_rows(corpus / TOKENS, first_rows), listing)
    first = itertools.islice(read_bad_rows(corpus / TOKENS, first_rows), SHOWN_BAD_ROWS)
    shown = "\n".join(f"  {row.source} row {row.row}: {row.reason}" for row in first)
    log(VERB, f"{count} bad rows (rows count from 0), listed in {listing}:\n{shown}")
    if count > limit:
        raise StageError(
            f"{VERB}: {count} bad rows, more than pack_corpus.max_bad_rows = {limit}; mend them or raise it."
            f" They are listed in {listing}, the first:\n{shown}"
        )
