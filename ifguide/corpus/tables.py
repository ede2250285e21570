"""The tables of a packed corpus, as its readers need them."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa

from ifguide import schemas
from ifguide.artifacts import Manifest, MismatchError, read_manifest, verified_files

TOKENIZER = "tokenizer"  # its folder in the corpus


def document_table(corpus: Path) -> pa.Table:
    """The whole document table of a corpus, ordered by `doc_id`. ValueError where a file of it has changed."""
    tables = [schemas.read_table(path, schemas.DOCUMENTS) for path in verified_files(corpus, "documents-*.parquet")]
    return pa.concat_tables(tables)


def corpus_block_size(corpus: Path) -> int:
    """T of a packed corpus."""
    return int(read_manifest(corpus).summary["block_size"])


def require_same_documents(corpus: Path, source: Manifest, target: Path, packed: Manifest) -> None:
    """Refuse two corpora, by their manifests, that are not the same documents in two tokenizers' tokens.

    Raises:
        MismatchError: the inputs or the number of documents differ.
    """
    if (source.options["files"], source.rows["documents"]) != (packed.options["files"], packed.rows["documents"]):
        raise MismatchError(
            f"{corpus} was packed from {source.rows['documents']:,} documents of {source.options['files']},"
            f" {target} from {packed.rows['documents']:,} of {packed.options['files']}: the inputs have changed."
            f" Restore them and delete {target}, or pack and score the corpus again"
        )
