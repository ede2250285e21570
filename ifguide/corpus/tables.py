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
        MismatchError: the inputs, their commits on the hub or the number of documents differ.
    """
    own, other = _documents_of(source), _documents_of(packed)
    if own != other:
        raise MismatchError(
            f"{corpus} was packed from {own}, {target} from {other}: the inputs have changed."
            f" Restore them and delete {target}, or pack and score the corpus again"
        )


def _documents_of(corpus: Manifest) -> str:
    commits = corpus.summary.get("commits")
    at = f" at {commits}" if commits else ""
    return f"{corpus.rows['documents']:,} documents of {corpus.options['files']}{at}"
