"""`pack_corpus`: documents -> packed token blocks, where each token stops in its text, and a document table.

Two passes, each a task per chunk or shard: tokenise chunks (scratch Parquet), pack shards. Inputs of which only some
`rows` are taken are read once more before, to count them. The driver holds one integer per document (its token count),
never text or tokens. Where the target has another tokenizer, the same documents are packed in its tokens too.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ifguide.artifacts import Manifest, write_text
from ifguide.config import Config, ConfigError, PackCorpus
from ifguide.config.resources import WorkerResources
from ifguide.corpus.reading import HUB_PREFIX, Chunk, list_chunks
from ifguide.corpus.stream import TOKENS, StreamPlan
from ifguide.corpus.tables import TOKENIZER, require_same_documents
from ifguide.corpus.workers import CountRows, KeyedChunk, PackShard, TokeniseChunk, TokeniseSettings, train_on_chunks
from ifguide.distributed.session import connect
from ifguide.distributed.shards import LEDGER, Pool, StageError, run_shards
from ifguide.distributed.tasks import run_task
from ifguide.run import Run
from ifguide.storage import location
from ifguide.telemetry import log
from ifguide.tokenizer import load_tokenizer, save_tokenizer

VERB = "pack_corpus"
COUNTS = "counts"  # scratch folder of the row counts
SHOWN_BAD_ROWS = 10


def pack_corpus(run: Run, *, dry_run: bool = False) -> Manifest | None:
    """Make `corpus/`, and `target/corpus/` where the target has another tokenizer.

    Raises:
        FileNotFoundError: an input is missing. StageError: more than `max_bad_rows` bad rows.
        ValueError: no documents, or fewer tokens than one block.
        MismatchError: a corpus that is there is of other inputs.
    """
    if not run.config.pack_corpus.inputs:
        raise ConfigError("pack_corpus.inputs: name at least one file, folder or hf:// dataset")
    manifest = _pack(run, dry_run=dry_run)
    if run.target is not run:
        packed = _pack(run.target, dry_run=dry_run)
        if manifest and packed:
            require_same_documents(run.corpus, manifest, run.target.corpus, packed)
    return manifest


def _pack(run: Run, *, dry_run: bool) -> Manifest | None:
    config, source = run.config.pack_corpus, run.config.tokenizer_source
    chunks = _plan_chunks(config, open_hub=not dry_run)
    if dry_run:
        files = {chunk.path for chunk in chunks}
        log(VERB, f"would tokenise {len(chunks)} chunks of {len(files)} inputs with {source}")
        return None
    artifact = run.open(
        run.corpus,
        VERB,
        keys=("pack_corpus", "tokenizer"),
        inputs={},
        extra={"tokenizer": source, "files": _file_sizes(chunks)},
    )
    if artifact.manifest:
        log(VERB, f"complete: {artifact.manifest.rows}")
        return artifact.manifest
    connect(run.config.cluster)
    pool = Pool.filling_cluster(config.resources)
    tokenised = _tokenise(run.corpus, run.config, chunks, pool)
    _check_bad_rows(run.corpus, tokenised, config.max_bad_rows)
    tokenizer = load_tokenizer(source)
    plan = StreamPlan(run.corpus, config, chunks, tokenised, tokenizer)
    if config.train_tokenizer is None:  # a trained one is there already; the source of another may move or change
        save_tokenizer(tokenizer, run.corpus / TOKENIZER)
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
    }
    outputs = [run.corpus / f"{kind}-{key}.parquet" for kind in ("shard", "documents", "offsets") for key in results]
    outputs += [path for path in (run.corpus / TOKENIZER).glob("*") if path.is_file()]
    manifest = artifact.finish(
        outputs, rows=rows, summary=summary, remove=(LEDGER, TOKENS, COUNTS), digests=results.files
    )
    counts = ", ".join(f"{rows[name]:,} {name}" for name in ("documents", "tokens", "blocks"))
    log(VERB, f"{counts} in {run.corpus}")
    return manifest


def _plan_chunks(config: PackCorpus, *, open_hub: bool) -> list[Chunk]:
    chunk_bytes = max(1, int(config.chunk_megabytes * 2**20))
    chunks: list[Chunk] = []
    for index, source in enumerate(config.inputs):
        if source.path.startswith(HUB_PREFIX) and not open_hub:
            chunks.append(Chunk(input_index=index, kind="hub", path=source.path, stop=1))
            continue
        key = f"pack_corpus.inputs[{index}].path"
        chunks += list_chunks(source, index, chunk_bytes=chunk_bytes, dotted_key=key)
    return chunks


def _tokenise(corpus: Path, config: Config, chunks: Sequence[Chunk], pool: Pool) -> dict[str, dict[str, Any]]:
    """The result of every chunk by key, with the `first_row` of its file."""
    inputs, source = config.pack_corpus.inputs, config.tokenizer_source
    keyed = _keyed_chunks(corpus, config.pack_corpus, chunks, pool)
    vocab_size = config.pack_corpus.train_tokenizer
    if vocab_size is not None and not location(source).exists():
        log(VERB, f"training a tokenizer of {vocab_size:,} tokens")
        run_task(train_on_chunks, keyed, inputs, vocab_size, source, resources=WorkerResources(gpus=0))
    tokenised = run_shards(
        VERB,
        keyed,
        TokeniseChunk,
        TokeniseSettings(inputs=inputs, tokenizer=source, folder=str(corpus / TOKENS)),
        folder=corpus / TOKENS,
        pool=pool,
        unit="chunks tokenised",
    )
    rows_read: dict[tuple[int, str], int] = {}  # of a file so far; one may be two inputs, of different rows
    for chunk, result in zip(chunks, tokenised.values(), strict=True):
        file = (chunk.input_index, chunk.path)
        result["first_row"] = rows_read.get(file, 0)
        rows_read[file] = result["first_row"] + result["rows"]
        for row in result["bad"]:
            row["row"] += result["first_row"]
    return tokenised


def _keyed_chunks(corpus: Path, config: PackCorpus, chunks: Sequence[Chunk], pool: Pool) -> list[KeyedChunk]:
    """The chunks by key, each with its `first_input_row` if only some rows of its input are taken; else 0."""
    keyed = [KeyedChunk(key=f"chunk-{number:05d}", chunk=chunk) for number, chunk in enumerate(chunks)]
    todo = [item for item in keyed if config.inputs[item.chunk.input_index].rows]
    counted = run_shards(VERB, todo, CountRows, None, folder=corpus / COUNTS, pool=pool, unit="chunks counted")
    rows_of_input = [0] * len(config.inputs)
    placed = []
    for item in keyed:
        index = item.chunk.input_index
        placed.append(KeyedChunk(key=item.key, chunk=item.chunk, first_input_row=rows_of_input[index]))
        rows_of_input[index] += counted.get(item.key, {"rows": 0})["rows"]
    for index, source in enumerate(config.inputs):
        if source.rows and source.rows[1] > rows_of_input[index]:
            raise ConfigError(
                f"pack_corpus.inputs[{index}].rows: ends at {source.rows[1]}, but {source.path} has"
                f" {rows_of_input[index]} rows"
            )
    return placed


def _check_bad_rows(corpus: Path, tokenised: dict[str, dict[str, Any]], limit: int) -> None:
    bad = [row for result in tokenised.values() for row in result["bad"]]
    count = sum(result["bad_rows"] for result in tokenised.values())
    if not count:
        return
    listing = corpus / "bad_rows.csv"
    lines = [f"{row['source']},{row['row']},{row['reason']}" for row in bad]
    write_text(listing, "\n".join(["source,row,reason", *lines]) + "\n")
    shown = "\n".join(f"  {row['source']} row {row['row']}: {row['reason']}" for row in bad[:SHOWN_BAD_ROWS])
    log(VERB, f"{count} bad rows (rows count from 0), listed in {listing}:\n{shown}")
    if count > limit:
        raise StageError(
            f"{VERB}: {count} bad rows, more than pack_corpus.max_bad_rows = {limit}; mend them or raise it."
            f" They are listed in {listing}, the first:\n{shown}"
        )


def _file_sizes(chunks: Sequence[Chunk]) -> dict[str, int]:
    paths = sorted({chunk.path for chunk in chunks if chunk.kind != "hub"})
    return {path: location(path).stat().st_size for path in paths}
