"""ifguide.records.delimited: every row of a separated table is a row or a reason, whatever its cells hold."""

from __future__ import annotations

import csv
import gzip
import io
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ifguide.config import Input
from ifguide.corpus.reading import list_chunks, read_documents
from ifguide.records.delimited import Cell, cell_rows
from ifguide.toxicity.prompts import read_grouped_prompts, read_labelled, read_prompts


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def documents(path: Path, **columns: str) -> list[tuple[str, str | None]]:
    source = Input(path=str(path), **columns)
    (chunk,) = list_chunks(source, 0, chunk_bytes=1, dotted_key="k")
    return [(document.text, document.reason) for document in read_documents(chunk, source, first_row=0)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tables")


@settings(deadline=None, max_examples=100)
@given(
    texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=20), max_size=8),
    tabbed=st.booleans(),
    ending=st.sampled_from(["\n", "\r\n"]),
)
def test_what_a_writer_of_tables_wrote_is_read_back(folder, texts, tabbed, ending) -> None:
    held = io.StringIO()
    quoting = csv.QUOTE_ALL if "\r" in "".join(texts) else csv.QUOTE_MINIMAL  # it leaves a lone \r bare
    writer = csv.writer(held, delimiter="\t" if tabbed else ",", lineterminator=ending, quoting=quoting)
    writer.writerows([("id", "text"), *enumerate(texts)])
    path = write(folder / ("a.TSV" if tabbed else "a.csv"), held.getvalue())
    assert documents(path) == [(text, None) for text in texts]


@pytest.mark.parametrize("header", ["text,n", '"text","n"'])
def test_a_table_may_be_compressed_and_begin_with_a_byte_order_mark(header, tmp_path) -> None:
    path = write(tmp_path / "a.csv.gz", gzip.compress(f'\ufeff{header}\n"a, ""b""\nc",1\n\nd,2\n'.encode()))
    assert documents(path) == [('a, "b"\nc', None), ("d", None)]


def test_rows_that_are_none_have_reasons_and_their_neighbours_are_read(tmp_path) -> None:
    path = write(tmp_path / "a.csv", b'text,n\nfine,1\nshort\nlong,1,2\n\xff,1\n"open" quote,1\nlast,2\n')
    found = documents(path)
    assert [text for text, _ in found] == ["fine", "", "", "", "", "last"]
    reasons = [reason for _, reason in found if reason]
    assert reasons[0] == "has 1 cells, and the first line names 2 columns"
    assert reasons[1] == "has 3 cells, and the first line names 2 columns"
    assert reasons[2].startswith("not UTF-8 (a lone surrogate at character 0")
    assert reasons[3].startswith("not CSV (")


@pytest.mark.parametrize(
    ("content", "reason", "rows"),
    [
        ('text,b\n"a,1\nfine,2\nmore,"3"\nlast,4\n', "not CSV (',' expected after '\"'); lines 2 to 4 of the file", 3),
        ('text,b\nlast,4\n"a,1\nb,2\n', "not CSV (unexpected end of data); lines 3 to 4 of the file", 2),
        ('text,b\n"a,1\nb"\nlast,4\n', "has 1 cells, and the first line names 2 columns; lines 2 to 3 of the file", 1),
    ],
)
def test_a_stray_quote_says_which_lines_it_took_and_each_is_a_bad_row(content, reason, rows, tmp_path) -> None:
    """A row whose quotes fit is one row, however many lines it has."""
    assert sorted(documents(write(tmp_path / "a.csv", content))) == [*[("", reason)] * rows, ("last", None)]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is empty: its first line must name the columns"),
        ("text,a\nx,y\n".encode("utf-16"), "is not text in UTF-8"),
        (b"text,text\n", "two columns have the name 'text'"),
        (b"body,n\nx,1\n", "has no column 'text'; it has body, n"),
    ],
)
def test_a_table_that_cannot_be_used_is_named(tmp_path, content, reason) -> None:
    path = write(tmp_path / "a.csv", content)
    with pytest.raises(ValueError, match=rf"{path}.*{reason}"):
        documents(path)


def test_a_table_that_is_cut_off_is_named(tmp_path) -> None:
    whole = gzip.compress(b"text\n" + b"".join(b"%d\n" % (i * i) for i in range(9000)))
    for kept in (0, 9, len(whole) // 2, len(whole) - 1):
        with pytest.raises(ValueError, match=r"a\.csv\.gz: damaged or cut off"):
            documents(write(tmp_path / "a.csv.gz", whole[:kept]))


def test_spans_and_token_ids_are_lists_as_json_writes_them(tmp_path) -> None:
    path = write(tmp_path / "a.csv", 'text,spans,ids\nabcd,"[[1, 3]]","[5, 6]"\nefgh,,[7]\nijkl,odd,odd\n')
    source = Input(path=str(path), spans_column="spans")
    (chunk,) = list_chunks(source, 0, chunk_bytes=1, dotted_key="k")
    found = list(read_documents(chunk, source, first_row=0))
    assert [document.spans for document in found] == [((1, 3),), (), ()]
    assert found[2].reason == "column 'spans' is not a list of [start, end) pairs"
    source = Input(path=str(path), tokens_column="ids")
    ids = [document.tokens for document in read_documents(chunk, source, first_row=0)]
    assert [None if tokens is None else tokens.tolist() for tokens in ids] == [[5, 6], [7], None]


def test_a_cell_is_text_and_the_value_that_it_writes(tmp_path) -> None:
    (row,) = cell_rows(write(tmp_path / "a.csv", "a,b,c,d,e\n1.5,TRUE,,nan,1x\n"))
    assert isinstance(row, dict)
    assert [cell.value for cell in row.values()] == [1.5, True, None, None, "1x"]
    assert Cell("007") == "007"


def test_prompts_and_labelled_texts_may_be_separated_tables(tmp_path) -> None:
    path = write(tmp_path / "a.csv", "prompt.text,prompt.toxicity,continuation.text,continuation.toxicity\n7,0.2,b,\n")
    (prompt,) = read_prompts(path)
    assert (prompt.prompt, prompt.continuation) == ("7", "b")
    assert (prompt.prompt_scores, prompt.continuation_scores) == ({"toxicity": 0.2}, {})
    path = write(tmp_path / "b.tsv", "text\ttoxic\tinsult\n1\t0.7\t0.4\nb\tfalse\t\nc\t\t1\n")
    first, second = read_labelled(path)
    assert (first.text, first.label, first.share, first.scores) == ("1", True, 0.7, {"insult": 0.4})
    assert (second.text, second.label, second.scores) == ("b", False, {})
    (attack,) = read_grouped_prompts([write(tmp_path / "c.csv", "input,label\nx,3\n")], text_column="input",
                                     group_column="label")  # fmt: skip
    assert (attack.prompt, attack.group) == ("x", "3")


@pytest.mark.parametrize(("line", "by"), [("id;text", "semicolons"), ("id\ttext", "tabs"), ("id|text", "bars")])
def test_a_table_that_something_else_separates_is_no_table_of_one_column(line: str, by: str, tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text(f"{line}\n1;hello\n")
    with pytest.raises(ValueError, match=rf"a\.csv: its first line, .* is separated by {by}"):
        list(cell_rows(path))
