"""ifguide.corpus.packing: tokens decode to their text, and every shard can be packed alone."""

import dataclasses
import gzip
import itertools
import json
from fractions import Fraction
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from ifguide.config import Input
from ifguide.corpus import packing
from ifguide.corpus.packing import Read, merge_order, pack, stream_order, token_tables, tokenise
from ifguide.corpus.reading import RawDocument, list_chunks, read_documents
from ifguide.tokenizer import load_tokenizer, save_tokenizer, train_tokenizer
from tests.unit.corpus.tables import token_table
from tests.unit.corpus.test_reading import TEXTS, write_jsonl


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(TEXTS * 3, vocab_size=300)


def test_tokens_decode_to_the_text_and_end_with_eos(tokenizer):
    documents = [RawDocument(row=i, text=text) for i, text in enumerate(TEXTS)]
    for document, (tokens, _, flags) in zip(documents, tokenise(documents, tokenizer, annotate=False), strict=True):
        assert flags is None
        assert tokens.dtype == np.int32
        assert tokens[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(tokens[:-1]) == document.text


@pytest.mark.parametrize(
    ("spans", "marked"),
    [
        ([(4, 7)], " cat"),
        ([(5, 6)], " cat"),
        ([(0, 3), (16, 22)], "the the mat"),
        ([(3, 4)], ""),
        ([(4, 4)], ""),
        ([(5, 5)], ""),
        ([(5, 5), (17, 19)], " the"),
        ([(0, 22)], TEXTS[0]),
    ],
)
def test_tokens_that_overlap_a_span_are_annotated_and_eos_never(tokenizer, spans, marked):
    documents = [RawDocument(row=0, text=TEXTS[0], spans=tuple(spans)), RawDocument(row=1)]
    (tokens, _, flags), (empty, _, empty_flags) = tokenise(documents, tokenizer, annotate=True)
    assert tokenizer.decode(tokens[flags]) == marked  # this tokenizer has a token for every word of the text
    assert not flags[-1]
    assert (empty.tolist(), empty_flags.tolist()) == ([tokenizer.eos_token_id], [False])


@pytest.mark.parametrize("annotate", [False, True])
def test_token_table_keeps_the_rows_asked_for_counted_over_the_whole_input(tmp_path, tokenizer, annotate):
    source = write_jsonl(tmp_path / "a.jsonl", [f"text {i}" for i in range(700)])
    path = Path(source.path)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(b"bad\n" if i in (99, 150, 680) else line for i, line in enumerate(lines)))
    (chunk,) = list_chunks(source, 0, chunk_bytes=10**9, dotted_key="k")
    ranged = dataclasses.replace(source, rows=(1100, 1680))
    table, bad, read = token_table(chunk, ranged, tokenizer, first_input_row=1000, annotate=annotate)
    assert read == 680, "rows behind the last one taken are not read"
    rows = [row for row in range(100, 680) if row != 150]  # more than one tokeniser batch
    assert table.column("row").to_pylist() == rows
    assert [(entry["row"], entry["source"]) for entry in bad] == [(150, source.path)]
    expected = [[*tokenizer(f"text {row}")["input_ids"], tokenizer.eos_token_id] for row in rows]
    assert table.column("tokens").to_pylist() == expected
    assert table.column("num_tokens").to_pylist() == [len(tokens) for tokens in expected]
    assert table.column("num_chars").to_pylist() == [len(f"text {row}") for row in rows]
    assert ("annotated" in table.column_names) == annotate


def test_token_table_of_no_good_row_has_no_rows(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_bytes(b"[]\n[]\n")
    source = Input(path=str(tmp_path / "a.jsonl"))
    (chunk,) = list_chunks(source, 0, chunk_bytes=9, dotted_key="k")
    table, bad, read = token_table(chunk, source, tokenizer, first_input_row=0, annotate=True)
    assert (table.num_rows, read) == (0, 2)
    assert [entry["reason"] for entry in bad] == ["a list, not an object"] * 2


def test_a_compressed_file_is_not_held_in_memory_whole(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(packing, "GROUP_CHARS", 100)
    texts = [f"text {i} " * (30 if i == 7 else 1) for i in range(50)]
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    source = Input(path=str(tmp_path / "a.jsonl.gz"))
    (chunk,) = list_chunks(source, 0, chunk_bytes=1, dotted_key="k")
    read = Read()
    tables = token_tables(chunk, source, tokenizer, first_input_row=0, annotate=False, read=read)
    first = next(tables)
    assert read.rows == first.num_rows + 1
    sizes = [sum(table.column("num_chars").to_pylist()) for table in (first, *tables)]
    assert max(size for size in sizes if size != len(texts[7])) <= 100
    assert len(texts[7]) in sizes, "a long document is alone"
    assert sum(sizes) == sum(map(len, texts))
    assert read.rows == 50


COUNTS = st.lists(st.integers(0, 12), max_size=4)


@settings(deadline=None)
@given(counts=COUNTS)
def test_interleaving_orders_documents_by_their_exact_share_ties_by_input(counts):
    inputs, indices = stream_order(counts, interleave=True)
    everything = [(k, i) for k, n in enumerate(counts) for i in range(n)]
    expected = sorted(everything, key=lambda at: (Fraction(2 * at[1] + 1, 2 * counts[at[0]]), at[0]))
    assert list(zip(inputs.tolist(), indices.tolist(), strict=True)) == expected


@settings(deadline=None)
@given(counts=COUNTS)
def test_without_interleaving_inputs_follow_each_other(counts):
    inputs, indices = stream_order(counts, interleave=False)
    found = list(zip(inputs.tolist(), indices.tolist(), strict=True))
    assert found == [(k, i) for k, n in enumerate(counts) for i in range(n)]


@settings(deadline=None)
@given(counts=COUNTS, data=st.data())
def test_a_run_of_the_stream_is_one_range_per_input_merged_into_the_global_order(counts, data):
    inputs, indices = stream_order(counts, interleave=True)
    lo = data.draw(st.integers(0, len(inputs)))
    hi = data.draw(st.integers(lo, len(inputs)))
    here_inputs, here_indices = inputs[lo:hi], indices[lo:hi]
    ranges, rows = [], []
    for k in range(len(counts)):
        own = here_indices[here_inputs == k].tolist()
        start = own[0] if own else 0
        assert own == list(range(start, start + len(own)))
        ranges.append((start, start + len(own)))
        rows += [(k, i) for i in own]
    merged = [rows[i] for i in merge_order(ranges, counts)]
    assert merged == list(zip(here_inputs.tolist(), here_indices.tolist(), strict=True))


@settings(deadline=None)
@given(lengths=st.lists(st.integers(0, 9), min_size=1, max_size=8), block_size=st.integers(2, 7), data=st.data())
def test_packed_blocks_are_the_stream_and_only_the_last_is_padded(lengths, block_size, data):
    bounds = np.cumsum([0, *lengths])
    arrays = [np.arange(start, stop, dtype=np.int32) for start, stop in itertools.pairwise(bounds)]
    total = int(bounds[-1]) + 1
    arrays.append(np.array([total - 1], np.int32))
    skip = data.draw(st.integers(0, total - 1))
    num_tokens = data.draw(st.integers(1, total - skip))
    blocks, valid = pack(arrays, skip=skip, num_tokens=num_tokens, block_size=block_size, fill=-7)
    assert (blocks.dtype, valid.dtype) == (np.int32, np.int32)
    assert blocks.shape == (len(valid), block_size)
    flat = blocks.reshape(-1)
    assert flat[:num_tokens].tolist() == list(range(skip, skip + num_tokens))
    assert (flat[num_tokens:] == -7).all()
    assert valid.sum() == num_tokens
    assert (valid[:-1] == block_size).all()
    assert 1 <= valid[-1] <= block_size


@pytest.mark.parametrize("special_text", [False, True])
def test_the_name_of_a_special_token_in_a_text_is_text_unless_asked_otherwise(tmp_path, tokenizer, special_text):
    save_tokenizer(tokenizer, tmp_path / "tokenizer")
    name = tokenizer.eos_token
    (tmp_path / "a.txt").write_text(f"one {name} two {name}")
    source = Input(path=str(tmp_path / "a.txt"))
    (chunk,) = list_chunks(source, 0, chunk_bytes=9, dotted_key="k")
    reader = load_tokenizer(str(tmp_path / "tokenizer"), special_text=special_text)
    table, _, _ = token_table(chunk, source, reader, first_input_row=0, annotate=False)
    assert table.column("special_texts").to_pylist() == [2]
    assert table.column("tokens").to_pylist()[0].count(tokenizer.eos_token_id) == (3 if special_text else 1)


# ---- documents of token ids ------------------------------------------------------------------------------


def test_token_ids_are_packed_as_they_are(tmp_path, tokenizer):
    """As the paper's own blocks: no EOS between documents, what is left over dropped, one row a block."""
    stream = tokenizer(" ".join(TEXTS))["input_ids"]
    rows = [stream[i : i + 4] for i in range(0, len(stream) - 3, 4)]
    pq.write_table(pa.table({"input_ids": rows, "labels": rows}), tmp_path / "chunks.parquet")
    Dataset.from_dict({"input_ids": rows}).save_to_disk(tmp_path / "saved")
    (tmp_path / "chunks.jsonl").write_text("".join(json.dumps({"input_ids": ids}) + "\n" for ids in rows))
    for path in ("chunks.parquet", "saved", "chunks.jsonl"):
        source = Input(path=str(tmp_path / path), tokens_column="input_ids")
        (chunk,) = list_chunks(source, 0, chunk_bytes=10**9, dotted_key="k")
        table, bad, read = token_table(chunk, source, tokenizer, first_input_row=0, annotate=True)
        assert (read, bad) == (len(rows), [])
        assert table.column("tokens").to_pylist() == rows
        assert table.column("num_chars").to_pylist() == [3] * len(rows)
        assert table.column("stops").to_pylist() == [[1, 2, 3, 4]] * len(rows)  # the last one closes the document
        assert table.column("annotated").to_pylist() == [[False] * 4] * len(rows)
        assert table.column("special_texts").to_pylist() == [0] * len(rows)


@pytest.mark.parametrize(
    ("ids", "reason"),
    [
        (None, "is missing"),
        ([], "is not a list of token ids"),
        ("12", "is not a list of token ids"),
        ([1.0, 2.0], "is not a list of token ids"),
        ([True, False], "is not a list of token ids"),
        (["1"], "is not a list of token ids"),
        ([1, None], "is not a list of token ids"),
        ([[1], [2]], "is not a list of token ids"),
        ([[1], [2, 3]], "is not a list of token ids"),
        ([2**80], "is not a list of token ids"),
        ([1, -1], "holds -1, which is no token id"),
        ([1, 2**40], "holds 1099511627776, which is no token id"),
        ([1, 300], "token id 300 is none of the tokenizer's "),
    ],
)
def test_what_is_no_list_of_token_ids_is_a_bad_row(tmp_path, tokenizer, ids, reason):
    (tmp_path / "a.jsonl").write_text(json.dumps({"ids": [1, 2]}) + "\n" + json.dumps({"ids": ids}) + "\n")
    source = Input(path=str(tmp_path / "a.jsonl"), tokens_column="ids")
    (chunk,) = list_chunks(source, 0, chunk_bytes=10**9, dotted_key="k")
    table, (bad,), _ = token_table(chunk, source, tokenizer, first_input_row=0, annotate=False)
    assert (table.column("tokens").to_pylist(), bad["row"]) == ([[1, 2]], 1)
    assert reason in bad["reason"]


def test_ids_are_not_looked_for_in_text_files_and_their_column_must_be_there(tmp_path):
    (tmp_path / "a.txt").write_text("1 2 3")
    with pytest.raises(ValueError, match=r"^k: not read are .*a\.txt; what is read ends in \.jsonl"):
        list_chunks(Input(path=str(tmp_path), tokens_column="ids"), 0, chunk_bytes=9, dotted_key="k")
    pq.write_table(pa.table({"input_ids": [[1]]}), tmp_path / "a.parquet")
    source = Input(path=str(tmp_path / "a.parquet"), tokens_column="ids")
    (chunk,) = list_chunks(source, 0, chunk_bytes=9, dotted_key="k")
    with pytest.raises(ValueError, match=r"a\.parquet has no column 'ids'; it has input_ids"):
        list(read_documents(chunk, source, first_row=0))
    (tmp_path / "a.json").write_text("[[1, 2], [3]]")
    source = Input(path=str(tmp_path / "a.json"), tokens_column="ids")
    (chunk,) = list_chunks(source, 0, chunk_bytes=9, dotted_key="k")
    with pytest.raises(ValueError, match=r"a\.json: neither a list of objects, nor one object with 'ids'"):
        list(read_documents(chunk, source, first_row=0))
