"""`pack_corpus`: documents -> packed token blocks, where each token stops in its text, and a document table.

Two passes, each a task per chunk or shard: tokenise chunks (scratch Parquet), pack shards. Inputs of which only some
`rows` are taken are read once more before, to count them. The driver holds one integer per document (its token count),
never text or tokens.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray

from ifguide import schemas
from ifguide.artifacts import Manifest, publish, write_text
from ifguide.config import Config, ConfigError, Input, to_mapping
from ifguide.corpus.reading import (
    HUB_PREFIX,
    Chunk,
    chunk_from_mapping,
    chunk_to_mapping,
    count_rows,
    list_chunks,
    merge_order,
    pack,
    read_documents,
    token_table,
)
from ifguide.corpus.stream import TOKENS, StreamPlan
from ifguide.corpus.tables import TOKENIZER
from ifguide.distributed.session import connect
from ifguide.distributed.shards import LEDGER, Pool, StageError, run_shards
from ifguide.run import Run
from ifguide.storage import location, readable
from ifguide.telemetry import log
from ifguide.tokenizer import load_tokenizer, save_tokenizer, train_tokenizer

VERB = "pack_corpus"
TOKENIZER_CHARS = 200_000_000  # what a tokenizer is trained on at most: more changes its merges little
COUNTS = "counts"  # scratch folder of the row counts


def pack_corpus(run: Run, *, dry_run: bool = False) -> Manifest | None:
    """Make `corpus/`.

    Raises:
        FileNotFoundError: an input is missing. StageError: more than `max_bad_rows` bad rows.
        ValueError: no documents, or fewer tokens than one block.
    """
    config = run.config.pack_corpus
    if not config.inputs:
        raise ConfigError("pack_corpus.inputs: name at least one file, folder or hf:// dataset")
    chunks = _plan_chunks(run, open_hub=not dry_run)
    if dry_run:
        files = sorted({chunk.path for chunk in chunks})
        log(
            VERB,
            f"would tokenise {len(chunks)} chunks of {len(files)} inputs with {run.config.tokenizer_source}",
        )
        return None
    artifact = run.open(
        run.corpus,
        VERB,
        keys=("pack_corpus", "tokenizer"),
        inputs={},
        extra={"tokenizer": run.config.tokenizer_source, "files": _file_sizes(chunks)},
    )
    if artifact.manifest:
        log(VERB, f"complete: {artifact.manifest.rows}")
        return artifact.manifest
    connect(run.config.cluster)
    pool = Pool.filling_cluster(config.resources)
    tokenised = _tokenise_chunks(run, chunks, pool)
    _check_bad_rows(run, tokenised)
    tokenizer = load_tokenizer(run.config.tokenizer_source)
    plan = StreamPlan(run, chunks, tokenised, tokenizer)
    if config.train_tokenizer is None:  # a trained one is there already; the source of another may move or change
        save_tokenizer(tokenizer, run.corpus / TOKENIZER)
    results = run_shards(
        VERB,
        plan.shard_descriptors(),
        PackShard,
        {"folder": str(run.corpus), "plan": plan.settings(), "block_size": config.block_size},
        folder=run.corpus,
        pool=pool,
        unit="tokens",
        amount=lambda descriptor: descriptor["num_tokens"],
        output=lambda descriptor: f"shard-{descriptor['key']}.parquet",
    )
    rows = {name: sum(result[name] for result in results.values()) for name in ("blocks", "documents", "tokens")}
    expected = {"blocks": plan.num_blocks, "documents": plan.num_documents, "tokens": plan.num_tokens}
    if rows != expected:
        raise StageError(f"{VERB}: packed {rows} where {expected} were read")
    summary = {
        "tokenizer": run.config.tokenizer_source,
        "block_size": config.block_size,
        "vocab_size": plan.vocab_size,
        "annotated": plan.annotate,
        "bad_rows": sum(result["bad_rows"] for result in tokenised.values()),
    }
    outputs = [run.corpus / f"{kind}-{key}.parquet" for kind in ("shard", "documents", "offsets") for key in results]
    outputs += [path for path in (run.corpus / TOKENIZER).glob("*") if path.is_file()]
    manifest = artifact.finish(outputs, rows=rows, summary=summary, remove=(LEDGER, TOKENS, COUNTS))
    log(
        VERB,
        f"{rows['documents']:,} documents, {rows['tokens']:,} tokens, {rows['blocks']:,} blocks in {run.corpus}",
    )
    return manifest


class CountRows:
    """Worker of the pass before: rows per chunk."""

    def process(self, descriptor: dict[str, Any]) -> dict[str, Any]:
        return {"rows": count_rows(chunk_from_mapping(descriptor["chunk"]))}


class TokeniseChunk:
    """Worker of the first pass: one chunk -> one scratch table, with its bad rows beside it."""

    def __init__(self, inputs: list[dict[str, Any]], tokenizer: str, folder: str, annotate: bool):
        self.inputs = [Input(**{**item, "rows": tuple(item["rows"]) if item["rows"] else None}) for item in inputs]
        self.tokenizer = load_tokenizer(tokenizer)
        self.folder, self.annotate = location(folder), annotate

    def process(self, descriptor: dict[str, Any]) -> dict[str, Any]:
        chunk = chunk_from_mapping(descriptor["chunk"])
        table, bad, rows = token_table(
            chunk,
            self.inputs[chunk.input_index],
            self.tokenizer,
            first_input_row=descriptor["first_input_row"],
            annotate=self.annotate,
        )
        with publish(self.folder / f"{descriptor['key']}.parquet") as part:
            pq.write_table(table, part, row_group_size=1024)
        return {"rows": rows, "documents": table.num_rows, "bad_rows": len(bad), "bad": bad[:1000]}


class PackShard:
    """Worker of the second pass: blocks [first_block, ...) of the stream and the documents that start in them."""

    def __init__(self, folder: str, plan: dict[str, Any], block_size: int):
        self.folder, self.plan, self.block_size = location(folder), plan, block_size

    def process(self, descriptor: dict[str, Any]) -> dict[str, Any]:
        table = self._documents(descriptor["ranges"])
        lengths = table.column("num_tokens").to_numpy()
        starts = descriptor["first_token_start"] + np.concatenate([[0], np.cumsum(lengths)[:-1]])
        stream_start = descriptor["first_block"] * self.block_size
        shape = {
            "skip": stream_start - int(starts[0]),
            "num_tokens": descriptor["num_tokens"],
            "block_size": self.block_size,
        }
        blocks_BT, lengths_B = pack([_flat(table, "tokens")], fill=self.plan["eos"], **shape)
        schema = schemas.blocks(self.block_size, annotated=self.plan["annotate"])
        columns = [
            pa.array(descriptor["first_block"] + np.arange(len(blocks_BT)), type=pa.int64()),
            pa.array(lengths_B, type=pa.int32()),
            schemas.per_token_column(blocks_BT, schema, "tokens"),
        ]
        if self.plan["annotate"]:
            flags_BT, _ = pack([_flat(table, "annotated")], fill=0, **shape)
            columns.append(schemas.per_token_column(flags_BT, schema, "annotated"))
        with publish(self.folder / f"shard-{descriptor['key']}.parquet") as part:
            pq.write_table(pa.Table.from_arrays(columns, schema=schema), part)
        stops_BT, _ = pack([_flat(table, "stops")], fill=0, **shape)
        self._write_offsets(descriptor["key"], columns[0], stops_BT)
        documents = self._document_table(table, starts, descriptor)
        with publish(self.folder / f"documents-{descriptor['key']}.parquet") as part:
            pq.write_table(documents, part)
        return {"blocks": len(blocks_BT), "documents": documents.num_rows, "tokens": int(lengths_B.sum())}

    def _write_offsets(self, key: str, block_ids: pa.Array, stops_BT: np.ndarray) -> None:
        schema = schemas.offsets(self.block_size)
        columns = [block_ids, schemas.per_token_column(stops_BT, schema, "stops")]
        with publish(self.folder / f"offsets-{key}.parquet") as part:
            table = pa.Table.from_arrays(columns, schema=schema)
            pq.write_table(table, part, use_dictionary=False, column_encoding=schemas.OFFSETS_ENCODING)

    def _documents(self, ranges: list[list[int]]) -> pa.Table:
        """The documents `ranges` (per input: [lo, hi)) in stream order."""
        tables = []
        for files, (lo, hi) in zip(self.plan["files"], ranges, strict=True):
            bounds = np.concatenate([[0], np.cumsum([count for *_, count in files])])
            for (key, source, first_row, count), first in zip(files, bounds[:-1], strict=True):
                start, stop = max(lo - int(first), 0), min(hi - int(first), count)
                if start < stop:
                    part = _read_rows(self.folder / TOKENS / f"{key}.parquet", start, stop)
                    place = part.schema.get_field_index("row")
                    part = part.set_column(place, "row", pc.add(part.column(place), first_row))
                    tables.append(part.append_column("source", pa.array([source] * part.num_rows, pa.string())))
        table = pa.concat_tables(tables)
        if self.plan["interleave"]:
            table = table.take(pa.array(merge_order([tuple(r) for r in ranges], self.plan["counts"])))  # type: ignore[misc]
        return table.combine_chunks()

    def _document_table(self, table: pa.Table, starts: np.ndarray, descriptor: dict[str, Any]) -> pa.Table:
        here = np.flatnonzero(starts >= descriptor["first_block"] * self.block_size)
        kept, starts = table.take(pa.array(here)), starts[here]
        return pa.Table.from_arrays(
            [
                pa.array(descriptor["first_doc_id"] + here, pa.int64()),
                *(kept.column(name).combine_chunks() for name in ("source", "row", "num_chars", "num_tokens")),
                pa.array(starts, pa.int64()),
                pa.array(starts // self.block_size, pa.int64()),
                pa.array(starts % self.block_size, pa.int32()),
            ],
            schema=schemas.DOCUMENTS,
        )


def _plan_chunks(run: Run, *, open_hub: bool) -> list[Chunk]:
    config = run.config.pack_corpus
    chunk_bytes = max(1, int(config.chunk_megabytes * 2**20))
    chunks: list[Chunk] = []
    for index, source in enumerate(config.inputs):
        if source.path.startswith(HUB_PREFIX) and not open_hub:
            chunks.append(Chunk(input_index=index, kind="hub", path=source.path, stop=1))
            continue
        key = f"pack_corpus.inputs[{index}].path"
        chunks += list_chunks(source, index, chunk_bytes=chunk_bytes, dotted_key=key)
    return chunks


def _tokenise_chunks(run: Run, chunks: list[Chunk], pool: Pool) -> dict[str, dict[str, Any]]:
    descriptors: list[dict[str, Any]] = [
        {"key": f"chunk-{i:05d}", "chunk": chunk_to_mapping(chunk)} for i, chunk in enumerate(chunks)
    ]
    _count_rows(run, chunks, descriptors, pool)
    if run.config.pack_corpus.train_tokenizer is not None and not location(run.config.tokenizer_source).exists():
        log(VERB, f"training a tokenizer of {run.config.pack_corpus.train_tokenizer:,} tokens")
        ray.get(ray.remote(num_cpus=1)(_train_tokenizer).remote(run.config, descriptors))
    settings = {
        "inputs": [to_mapping(source) for source in run.config.pack_corpus.inputs],
        "tokenizer": run.config.tokenizer_source,
        "folder": str(run.corpus / TOKENS),
        "annotate": any(source.spans_column for source in run.config.pack_corpus.inputs),
    }
    tokenised = run_shards(
        VERB,
        descriptors,
        TokeniseChunk,
        settings,
        folder=run.corpus / TOKENS,
        pool=pool,
        unit="chunks tokenised",
        output=lambda descriptor: f"{descriptor['key']}.parquet",
    )
    read: dict[tuple[int, str], int] = {}  # of a file so far; one may be two inputs, of different rows
    for chunk, result in zip(chunks, tokenised.values(), strict=True):
        file = (chunk.input_index, chunk.path)
        result["first_row"] = read.get(file, 0)
        read[file] = result["first_row"] + result["rows"]
        for row in result["bad"]:
            row["row"] += result["first_row"]
    return tokenised


def _count_rows(run: Run, chunks: list[Chunk], descriptors: list[dict[str, Any]], pool: Pool) -> None:
    """Give each descriptor its chunk's `first_input_row`, if only some rows of that input are taken; else 0."""
    inputs = run.config.pack_corpus.inputs
    todo = [item for chunk, item in zip(chunks, descriptors, strict=True) if inputs[chunk.input_index].rows]
    counted = run_shards(VERB, todo, CountRows, {}, folder=run.corpus / COUNTS, pool=pool, unit="chunks counted")
    rows_of_input = [0] * len(inputs)
    for chunk, descriptor in zip(chunks, descriptors, strict=True):
        descriptor["first_input_row"] = rows_of_input[chunk.input_index]
        rows_of_input[chunk.input_index] += counted.get(descriptor["key"], {"rows": 0})["rows"]
    for index, source in enumerate(inputs):
        if source.rows and source.rows[1] > rows_of_input[index]:
            raise ConfigError(
                f"pack_corpus.inputs[{index}].rows: ends at {source.rows[1]}, but {source.path} has"
                f" {rows_of_input[index]} rows"
            )


def _train_tokenizer(config: Config, descriptors: list[dict[str, Any]]) -> None:
    """Train on up to TOKENIZER_CHARS characters, an equal share of every chunk; publish in `corpus/tokenizer`."""
    share = TOKENIZER_CHARS // max(1, len(descriptors))

    def texts() -> Iterator[str]:
        for descriptor in descriptors:
            chunk = chunk_from_mapping(descriptor["chunk"])
            source = config.pack_corpus.inputs[chunk.input_index]
            start, stop = source.rows or (0, np.iinfo(np.int64).max)
            left = share
            for document in read_documents(chunk, source, first_row=descriptor["first_input_row"]):
                if left <= 0 or document.row >= stop:
                    break
                if document.reason is None and document.row >= start:
                    left -= len(document.text)
                    yield document.text

    assert config.pack_corpus.train_tokenizer is not None
    tokenizer = train_tokenizer(texts(), vocab_size=config.pack_corpus.train_tokenizer)
    save_tokenizer(tokenizer, location(config.tokenizer_source))


def _check_bad_rows(run: Run, tokenised: dict[str, dict[str, Any]]) -> None:
    bad = [row for result in tokenised.values() for row in result["bad"]]
    count = sum(result["bad_rows"] for result in tokenised.values())
    if not count:
        return
    listing = run.corpus / "bad_rows.csv"
    lines = [f"{row['source']},{row['row']},{row['reason']}" for row in bad]
    write_text(listing, "\n".join(["source,row,reason", *lines]) + "\n")
    shown = "\n".join(f"  {row['source']} row {row['row']}: {row['reason']}" for row in bad[:10])
    limit = run.config.pack_corpus.max_bad_rows
    log(VERB, f"{count} bad rows (rows count from 0), listed in {listing}:\n{shown}")
    if count > limit:
        raise StageError(
            f"{VERB}: {count} bad rows, more than pack_corpus.max_bad_rows = {limit}; mend them or raise it."
            f" They are listed in {listing}, the first:\n{shown}"
        )


def _file_sizes(chunks: list[Chunk]) -> dict[str, int]:
    paths = sorted({chunk.path for chunk in chunks if chunk.kind != "hub"})
    return {path: location(path).stat().st_size for path in paths}


def _read_rows(path: Path, start: int, stop: int) -> pa.Table:
    """Rows [start, stop) of a Parquet file, reading only the row groups that hold them."""
    with pq.ParquetFile(readable(path)) as file:
        sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
        bounds = [0, *np.cumsum(sizes).tolist()]
        first = bisect_right(bounds, start) - 1
        last = bisect_right(bounds, stop - 1)
        return file.read_row_groups(list(range(first, last))).slice(start - bounds[first], stop - start)


def _flat(table: pa.Table, name: str) -> np.ndarray:
    column = table.column(name).combine_chunks()
    return column.flatten().to_numpy(zero_copy_only=False)
