"""The tables of a packed corpus, as its readers need them."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa

from ifguide import schemas
from ifguide.artifacts import data_files, read_manifest

TOKENIZER = "tokenizer"  # its folder in the corpus


def document_table(corpus: Path) -> pa.Table:
    """The whole document table of a corpus, ordered by `doc_id`."""
    tables = [schemas.read_table(path, schemas.DOCUMENTS) for path in data_files(corpus, "documents-*.parquet")]
    return pa.concat_tables(tables)


def corpus_block_size(corpus: Path) -> int:
    """T of a packed corpus."""
    return int(read_manifest(corpus).summary["block_size"])
