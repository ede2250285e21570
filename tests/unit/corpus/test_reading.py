"""ifguide.corpus.reading: chunking changes no row, and a bad row has a reason."""

import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ifguide.config import Input
from ifguide.corpus import reading
from ifguide.corpus.reading import RawDocument, count_rows, list_chunks, read_documents

TEXTS = ["the cat sat on the mat", "", "a naïve 日本 cat\r\nsat", "mat mat", "the end"]
MEGABYTE_LINE = json.dumps({"text": "x" * 2**20}).encode()


def short_id(value: object) -> str:
    return ascii(value)[:40]


def read(source: Input, *, chunk_bytes: int = 10**9) -> list[RawDocument]:
    """All rows of an input through its chunks, each also counted, numbered as a run numbers them."""
    documents: list[RawDocument] = []
    for chunk in list_chunks(source, 0, chunk_bytes=chunk_bytes, dotted_key="k"):
        rows = list(read_documents(chunk, source, first_row=len(documents)))
        assert count_rows(chunk, source) == len(rows)
        documents += rows
    assert [document.row for document in documents] == list(range(len(documents)))
    return documents


def read_lines(folder: Path, content: bytes, *, spans_column: str | None = None, chunk_bytes: int = 10**9) -> list:
    path = folder / "lines.jsonl"
    path.write_bytes(content)
    return read(Input(path=str(path), spans_column=spans_column), chunk_bytes=chunk_bytes)


def write_jsonl(path: Path, texts: list[str]) -> Input:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return Input(path=str(path))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("corpus")


@settings(deadline=None, max_examples=150)
@given(
    lines=st.lists(st.none() | st.text(max_size=40), max_size=12),
    ending=st.sampled_from([b"\n", b"\r\n"]),
    closed=st.booleans(),
    chunk_bytes=st.integers(1, 200),
)
def test_jsonl_gives_the_same_rows_at_any_chunk_size(folder, lines, ending, closed, chunk_bytes):
    encoded = [b"" if text is None else json.dumps({"text": text}).encode() for text in lines]
    content = ending.join(encoded) + (ending if closed else b"")
    expected = [line for line in content.split(b"\n") if line.strip()]
    found = read_lines(folder, content, chunk_bytes=chunk_bytes)
    assert len(found) == len(expected)
    for line, document in zip(expected, found, strict=True):
        assert (document.text, document.reason) == (json.loads(line)["text"], None)


@pytest.mark.parametrize("chunk_bytes", [2**16, 2**20 + 8, 2**22])
def test_a_line_longer_than_the_chunks_is_read_once(folder, chunk_bytes):
    short = json.dumps({"text": "short"}).encode()
    found = read_lines(folder, b"\n".join([short, MEGABYTE_LINE, short]), chunk_bytes=chunk_bytes)
    assert [len(document.text) for document in found] == [5, 2**20, 5]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "\xff"}', "not UTF-8 (invalid start byte at byte 10)"),
        (b'{"text": "a"', "not JSON (Expecting ',' delimiter at column 13)"),
        (b"1" * 5000, "not JSON that can be read (Exceeds the limit"),
        (b"[" * 100_000, "not JSON that can be read (maximum recursion depth"),
        (b'{"txt": "a"}', "column 'text' is missing"),
        (b'{"text": null}', "column 'text' is missing"),
        (b'{"text": ["a"]}', "column 'text' is a list, not a string"),
        (b'["text"]', "a list, not an object"),
        (b'"text"', "a str, not an object"),
        (b"null", "a NoneType, not an object"),
        (rb'{"text": "ab\ud800"}', "not UTF-8 (a lone surrogate at character 2)"),
        (b'{"text": "abc", "spans": 3}', "column 'spans' is not a list of [start, end) pairs"),
        (b'{"text": "abc", "spans": [3]}', "column 'spans' is not a list of [start, end) pairs"),
        (b'{"text": "abc", "spans": [[0, 1, 2]]}', "column 'spans' is not a list of [start, end) pairs"),
        (b'{"text": "abc", "spans": [["x", 1]]}', "column 'spans' is not a list of [start, end) pairs"),
        (b'{"text": "abc", "spans": [[0, 1e999]]}', "column 'spans' is not a list of [start, end) pairs"),
        (b'{"text": "abc", "spans": [[0, 4]]}', "column 'spans' has a span outside the text"),
        (b'{"text": "abc", "spans": [[-1, 2]]}', "column 'spans' has a span outside the text"),
        (b'{"text": "abc", "spans": [[2, 1]]}', "column 'spans' has a span outside the text"),
    ],
    ids=short_id,
)
def test_bad_row_has_its_reason_and_its_neighbours_are_read(folder, line, reason):
    good = b'{"text": "abc", "spans": [[1, 3], [3, 3]]}'
    before, bad, after = read_lines(folder, b"\n".join([good, line, good]), spans_column="spans")
    assert bad.reason is not None
    assert bad.reason.startswith(reason)
    assert before.spans == after.spans == ((1, 3), (3, 3))
    assert before.reason is after.reason is None


@pytest.mark.parametrize("spans", [{}, {"spans": None}, {"spans": []}])
def test_row_without_spans_is_a_good_row(folder, spans):
    content = json.dumps({"text": "abc", **spans}).encode()
    assert read_lines(folder, content, spans_column="spans") == [RawDocument(row=0, text="abc")]


@pytest.mark.parametrize("chunk_bytes", [1, 300, 10**9])
@pytest.mark.parametrize("row_group_size", [1, 2, 100])
def test_parquet_gives_the_same_rows_at_any_row_group_and_chunk_size(tmp_path, row_group_size, chunk_bytes):
    table = pa.table({"n": range(5), "body": TEXTS, "marks": [[[0, len(text)]] for text in TEXTS]})
    pq.write_table(table, tmp_path / "t.parquet", row_group_size=row_group_size)
    source = Input(path=str(tmp_path / "t.parquet"), text_column="body", spans_column="marks")
    found = read(source, chunk_bytes=chunk_bytes)
    assert [(document.text, document.spans) for document in found] == [(text, ((0, len(text)),)) for text in TEXTS]
    if chunk_bytes == row_group_size == 1:
        assert len(list_chunks(source, 0, chunk_bytes=1, dotted_key="k")) == 5


def test_bad_parquet_rows_have_reasons(tmp_path):
    offsets, data = pa.py_buffer(np.array([0, 1, 3, 4], np.int32)), pa.py_buffer(b"a\xff\xfeb")
    pq.write_table(pa.table({"text": pa.StringArray.from_buffers(3, offsets, data)}), tmp_path / "t.parquet")
    first, bad, last = read(Input(path=str(tmp_path / "t.parquet")))
    assert (first.text, last.text) == ("a", "b")
    assert bad.reason == "not UTF-8 (invalid start byte at byte 0)"
    pq.write_table(pa.table({"text": pa.array([1, None])}), tmp_path / "n.parquet")
    reasons = [document.reason for document in read(Input(path=str(tmp_path / "n.parquet")))]
    assert reasons == ["column 'text' is a int, not a string", "column 'text' is missing"]


def test_parquet_that_cannot_be_used_is_named(tmp_path):
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"body": ["a"]}), path)
    with pytest.raises(ValueError, match=r"t\.parquet has no column 'text'; it has body"):
        read(Input(path=str(path)))
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"t\.parquet cannot be read as Parquet"):
        read(Input(path=str(path)))


def test_text_file_is_one_document_and_json_one_per_listed_string(tmp_path):
    (tmp_path / "b.txt").write_bytes("naïve\r\nline\n".encode())
    (tmp_path / "a.json").write_text(json.dumps({"k": {"deep": ["x", "y"]}, "l": ["z"], "m": []}))
    (tmp_path / "c.txt").write_bytes(b"\xff")
    (tmp_path / ".hidden").write_text("q")
    rows = read(Input(path=str(tmp_path)))
    assert [document.text for document in rows[:4]] == ["x", "y", "z", "naïve\r\nline\n"]
    assert [document.reason for document in rows[4:]] == ["not UTF-8 (invalid start byte at byte 0)"]


@pytest.mark.parametrize(
    ("content", "texts"),
    [
        ([{"id": "1", "text": "a"}, {"id": "2", "text": "b"}], ["a", "b"]),
        ({"id": "1", "text": "a"}, ["a"]),
        (["a", "b"], ["a", "b"]),
        ({"text": ["a"]}, []),  # one object, whose text is none: a bad row
    ],
)
def test_json_of_rows_gives_their_text_column(tmp_path, content, texts):
    (tmp_path / "a.json").write_text(json.dumps(content, indent=1))
    rows = read(Input(path=str(tmp_path / "a.json")))
    assert [document.text for document in rows if document.reason is None] == texts


@pytest.mark.parametrize(
    "content", [{"id": "1", "body": "a"}, {"data": [{"text": "a"}], "n": 3}, 3, {"k": ["a", None]}]
)
def test_json_whose_documents_cannot_be_told_is_refused(tmp_path, content):
    (tmp_path / "a.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"a\.json: neither a list of objects"):
        read(Input(path=str(tmp_path / "a.json")))


@pytest.mark.parametrize("count", [1, 3])
def test_json_lines_under_the_name_of_json_are_rows(tmp_path, count):
    (tmp_path / "a.json").write_text("\n".join(json.dumps({"id": "1", "text": text}) for text in "abc"[:count]))
    assert [document.text for document in read(Input(path=str(tmp_path / "a.json")))] == list("abc"[:count])


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "a"}\n{"text": "b"}\n')
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfc")
    (tmp_path / "c.json").write_bytes(b'\xef\xbb\xbf["d"]')
    assert [document.text for document in read(Input(path=str(tmp_path)), chunk_bytes=16)] == ["a", "b", "c", "d"]


def test_json_lines_under_the_name_of_json_without_a_text_are_bad_rows(tmp_path):
    (tmp_path / "a.json").write_text('{"id": "1"}\n{"id": "2", "text": "a"}\n')
    first, second = read(Input(path=str(tmp_path / "a.json")))
    assert (first.reason, second.text) == ("column 'text' is missing", "a")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_other_encodings_than_utf8_are_bad_rows_and_no_text(tmp_path, encoding):
    (tmp_path / "a.txt").write_bytes("plain words".encode(encoding))
    (tmp_path / "b.jsonl").write_bytes('{"text": "plain words"}\n'.encode(encoding))
    rows = read(Input(path=str(tmp_path)))
    assert len(rows) >= 2
    assert all(re.match(r"not (UTF-8|text in UTF-8|JSON)", row.reason or "") for row in rows)


def test_files_with_byte_order_marks_may_be_put_end_to_end(tmp_path):
    line = b'\xef\xbb\xbf{"text": "a"}\r\n'
    (tmp_path / "a.jsonl").write_bytes(line * 3 + b"\xef\xbb\xbf\r\n")
    for chunk_bytes in (1, 20, 10**6):
        assert [row.text for row in read(Input(path=str(tmp_path)), chunk_bytes=chunk_bytes)] == ["a"] * 3


def test_lists_of_strings_have_no_text_column_but_the_default(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"ids": ["1", "2"], "titles": ["a", "b"]}))
    with pytest.raises(ValueError, match=r"a\.json: neither a list of objects, nor one object with 'body'"):
        read(Input(path=str(tmp_path), text_column="body"))


@pytest.mark.parametrize("content", [b"{", b"\xff", b"1" * 5000, b"[" * 100_000], ids=short_id)
def test_json_file_that_is_no_json_is_named(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.json is not one JSON value in UTF-8"):
        read(Input(path=str(tmp_path / "a.json")))


def test_folder_and_glob_give_their_files_sorted_and_a_literal_name_wins(tmp_path):
    for name in ("b", "a", "[a]"):
        (tmp_path / f"{name}.txt").write_text(name)
    assert [document.text for document in read(Input(path=str(tmp_path)))] == ["[a]", "a", "b"]
    assert [document.text for document in read(Input(path=str(tmp_path / "?.txt")))] == ["a", "b"]
    assert [document.text for document in read(Input(path=str(tmp_path / "[a].txt")))] == ["[a]"]


def test_unknown_suffix_and_missing_files_name_the_config_key(tmp_path):
    (tmp_path / "a.xlsx").write_text("x")
    for path, kind in (("a.xlsx", ValueError), ("none.jsonl", FileNotFoundError), (".", ValueError)):
        with pytest.raises(kind, match=r"^pack_corpus\.inputs\[3\]\.path: "):
            list_chunks(Input(path=str(tmp_path / path)), 3, chunk_bytes=1, dotted_key="pack_corpus.inputs[3].path")


def test_empty_file_has_no_rows(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"")
    assert read(Input(path=str(tmp_path / "a.jsonl"))) == []


def test_hub_dataset_is_read_by_its_shards(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    data = tmp_path / "data"
    data.mkdir()
    for i in range(2):
        write_jsonl(data / f"train-{i}.jsonl", [f"{i} {text}" for text in TEXTS])
    for path, split in ((f"hf://{data}", None), (f"hf://{data}:train", None), (f"hf://{data}", "train")):
        source = Input(path=path, split=split)
        chunks = list_chunks(source, 0, chunk_bytes=1, dotted_key="k")
        assert [(chunk.start, chunk.stop) for chunk in chunks] == [(0, 2), (1, 2)]
        assert [document.text for document in read(source)] == [f"{i} {text}" for i in range(2) for text in TEXTS]
    with pytest.raises(FileNotFoundError, match=r"hf://.*none cannot be opened"):
        list_chunks(Input(path=f"hf://{tmp_path / 'none'}"), 0, chunk_bytes=1, dotted_key="k")


@pytest.mark.parametrize("named", [True, False])
def test_a_column_that_a_hub_dataset_lacks_is_said_before_it_is_read(tmp_path, monkeypatch, named):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    write_rows(tmp_path / "train.parquet", [{"code": "x", "meta": {"spans": [[0, 1]]}}])
    opened = reading._open_hub

    def unnamed(source):
        dataset = opened(source)
        dataset._info.features = None if not named else dataset._info.features
        assert (dataset.column_names is not None) == named
        return dataset

    monkeypatch.setattr(reading, "_open_hub", unnamed)
    name = f"hf://{tmp_path}"
    for source, column in (
        (Input(path=name), "text"),
        (Input(path=name, text_column="code", spans_column="spans"), "spans"),
    ):
        with pytest.raises(ValueError, match=f"hf://.* has no column '{column}'; it has code, meta"):
            list_chunks(source, 0, chunk_bytes=1, dotted_key="k")
    assert list_chunks(Input(path=name, text_column="code", spans_column="meta.spans"), 0, chunk_bytes=1, dotted_key="")


def test_a_configuration_of_a_hub_dataset_is_named_and_a_missing_one_said(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("de", "en"):
        (tmp_path / name).mkdir()
        write_jsonl(tmp_path / name / "train.jsonl", [f"{name} {text}" for text in TEXTS])
    configs = "".join(f"- config_name: {name}\n  data_files: {name}/train.jsonl\n" for name in ("de", "en"))
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    found = read(Input(path=f"hf://{tmp_path}", subset="de"))
    assert [document.text for document in found] == [f"de {text}" for text in TEXTS]
    for subset in (None, "fr"):
        with pytest.raises(FileNotFoundError, match=r"(?s)cannot be opened .*'?de'?, '?en"):
            read(Input(path=f"hf://{tmp_path}", subset=subset))


def test_chunks_are_cut_at_bytes(tmp_path):
    chunk = list_chunks(write_jsonl(tmp_path / "a.jsonl", TEXTS), 2, chunk_bytes=9, dotted_key="k")[1]
    assert (chunk.input_index, chunk.start, chunk.stop) == (2, 9, 18)


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "arrow"])
def test_a_column_of_nested_rows_is_named_with_dots(tmp_path, kind):
    rows = [{"id": i, "doc": {"body": {"text": text}, "spans": [[0, 0]]}} for i, text in enumerate(TEXTS)]
    path = tmp_path / f"a.{kind}"
    write_rows(path, rows)
    found = read(Input(path=str(path), text_column="doc.body.text", spans_column="doc.spans"))
    assert [(document.text, document.spans) for document in found] == [(text, ((0, 0),)) for text in TEXTS]


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("several", [False, True])
def test_a_column_of_nested_rows_is_found_in_json(tmp_path, indent, several):
    rows = [{"doc": {"body": text}} for text in TEXTS]
    (tmp_path / "a.json").write_text(json.dumps(rows if several else rows[0], indent=indent))
    found = read(Input(path=str(tmp_path / "a.json"), text_column="doc.body"))
    assert [document.text for document in found] == (TEXTS if several else TEXTS[:1])


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "arrow"])
def test_a_column_whose_own_name_has_dots_comes_first(tmp_path, kind):
    path = tmp_path / f"a.{kind}"
    write_rows(path, [{"a": {"b": "within"}, "a.b": text} for text in TEXTS])
    assert [document.text for document in read(Input(path=str(path), text_column="a.b"))] == TEXTS


def write_rows(path: Path, rows: list[dict]) -> None:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return
    table = pa.Table.from_pylist(rows)
    if path.suffix == ".parquet":
        pq.write_table(table, path, row_group_size=2)
    else:
        with pa.ipc.new_stream(path, table.schema) as writer:
            writer.write_table(table)


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
@pytest.mark.parametrize(
    "column",
    [
        pa.array(TEXTS, pa.large_string()),
        pa.array(TEXTS).dictionary_encode(),
        pa.array(TEXTS, pa.large_string()).dictionary_encode(),
        pa.array(TEXTS, pa.string_view()),
    ],
    ids=lambda column: str(column.type)[:30],
)
def test_texts_may_be_of_any_type_of_string(tmp_path, kind, column):
    path, table = tmp_path / f"a.{kind}", pa.table({"id": range(len(TEXTS)), "text": column})
    if kind == "parquet":
        pq.write_table(table, path, row_group_size=2)
    else:
        with pa.ipc.new_file(path, table.schema) as writer:
            writer.write_table(table)
    assert [document.text for document in read(Input(path=str(path)), chunk_bytes=1)] == TEXTS


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_a_nested_column_that_is_not_there_is_named_with_those_that_are(tmp_path, kind):
    path = tmp_path / f"a.{kind}"
    write_rows(path, [{"doc": {"body": "x"}}])
    with pytest.raises(ValueError, match=r"has no column 'doc.text'; it has doc, doc.body"):
        read(Input(path=str(path), text_column="doc.text"))
