"""Marks of texts as spans of the documents' own characters, in tokenizers that change a text too."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, decoders, normalizers
from transformers import PreTrainedTokenizerFast

from ifguide import schemas
from ifguide.artifacts import data_files
from ifguide.methods.marks import Find, find_documents, find_words, mark_texts
from ifguide.spans.mapping import mask_of_spans, token_edges, token_stops
from ifguide.spans.tables import SPANS, PackedCorpus
from tests.sharded import write_corpus
from tests.tokenizers import tokenizers

TEXT = "The cafe\u0301 owner is an idiot."
TEXTS = [TEXT, "No idiot.", "", f"{TEXT} 🤡 {TEXT}", "e\u0301"]


def changed(name: str, **parts: object) -> PreTrainedTokenizerFast:
    """A tokenizer of `tests.tokenizers` with another normalizer or decoder."""
    raw = Tokenizer.from_str(tokenizers()[name].backend_tokenizer.to_str())
    for part, value in parts.items():
        setattr(raw, part, value)
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=tokenizers()[name].eos_token)


def marked(folder: Path, texts: list[str], tokenizer: PreTrainedTokenizerFast, find: Find) -> list[np.ndarray]:
    """The spans (K, 2) of each text, by way of a corpus of several shards."""
    corpus, _ = write_corpus(folder / "corpus", texts, tokenizer, block_size=8, blocks_per_shard=3)
    return spans_of(corpus, folder / "marks", tokenizer, find)


def spans_of(corpus: PackedCorpus, folder: Path, tokenizer: PreTrainedTokenizerFast, find: Find) -> list[np.ndarray]:
    folder.mkdir(parents=True)
    for shard in range(corpus.num_shards):
        mark_texts(corpus, folder, shard, tokenizer, find)
    table = pa.concat_tables([schemas.read_table(path, schemas.SPANS) for path in data_files(folder, SPANS)])
    spans = [[(span["start"], span["stop"]) for span in row] for row in table.column("spans").to_pylist()]
    return [np.array(row).reshape(-1, 2) for row in spans]


def edges_of(tokenizer: PreTrainedTokenizerFast, text: str) -> np.ndarray:
    """The edges (n + 1,) of the tokens of a text and of its EOS."""
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    return token_edges(token_stops([stop for _, stop in offsets], len(text)))


@pytest.mark.parametrize("name", ["bpe", "bytes"])
def test_marks_of_a_text_that_nfc_shortens_are_of_the_tokens_of_the_marked_words(tmp_path: Path, name: str) -> None:
    tokenizer, find = changed(name, normalizer=normalizers.NFC()), find_words(["caf\u00e9", "idiot"])
    for text, spans in zip(TEXTS, marked(tmp_path, TEXTS, tokenizer, find), strict=True):
        composed = unicodedata.normalize("NFC", text)
        (words,) = find([composed])
        found = mask_of_spans(spans, edges_of(tokenizer, text))
        wanted = mask_of_spans(np.array(words, float).reshape(-1, 2), edges_of(tokenizer, composed))
        np.testing.assert_array_equal(found, wanted)
        assert found.any() == bool(words)
        if name == "bytes":
            tokens = np.array([*tokenizer(text)["input_ids"], 0])[found]
            assert tokenizer.decode(tokens.tolist()) == "".join(composed[start:stop] for start, stop in words)


def test_all_of_a_text_that_nfc_shortens_is_marked_with_its_end(tmp_path: Path) -> None:
    tokenizer = changed("bpe", normalizer=normalizers.NFC())
    spans = marked(tmp_path, TEXTS, tokenizer, find_documents(lambda texts: np.ones(len(texts)), 0.5))
    assert [own.tolist() for own in spans] == [[[0, len(text) + 1]] for text in TEXTS]


def test_a_document_of_token_ids_is_marked_by_its_tokens(tmp_path: Path) -> None:
    tokenizer, text = tokenizers()["bpe"], "You are a clown"
    corpus, ((*_, closing),) = write_corpus(tmp_path / "ids", [text], tokenizer, block_size=64, blocks_per_shard=1)
    assert closing == len(text) + 1
    for name, column, value in (
        ("documents", "num_chars", pa.array([corpus.num_tokens - 1])),
        (
            "offsets",
            "stops",
            schemas.per_token_column(np.arange(1, 65, dtype=np.int32)[None], schemas.offsets(64), "stops"),
        ),
    ):
        path = corpus.folder / f"{name}-00000.parquet"
        table = pq.read_table(path)
        place = table.schema.get_field_index(column)
        pq.write_table(table.set_column(place, table.schema.field(place), value), path)
    (spans,) = spans_of(corpus, tmp_path / "marks", tokenizer, find_words(["clown"]))
    offsets = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    of_word = [index for index, (_, stop) in enumerate(offsets) if stop > text.index("clown")]
    assert spans.tolist() == [[of_word[0], of_word[-1] + 1]]


def test_a_marked_text_whose_tokens_have_no_places_is_refused_by_name(tmp_path: Path) -> None:
    decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace("ab", "x")])
    tokenizer = changed("bytes", decoder=decoder)
    corpus, _ = write_corpus(tmp_path / "c", ["so", "a cab"], tokenizer, block_size=8, blocks_per_shard=3)
    assert [len(own) for own in spans_of(corpus, tmp_path / "a", tokenizer, find_words(["so"]))] == [1, 0]
    with pytest.raises(ValueError, match="document 1 had 5 characters and decodes to 4, and its tokens do not tell"):
        spans_of(corpus, tmp_path / "b", tokenizer, find_words(["a"]))
