"""ifguide.records.choice: the rows that a file lists are taken, each once, and nothing else passes for such a file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from ifguide.config import ConfigError, Input, config_from_mapping
from ifguide.corpus.chunks import keyed_chunks, placed_chunks
from ifguide.corpus.reading import list_chunks
from ifguide.evaluation.texts import read_texts
from ifguide.records.choice import RowChoice
from ifguide.tokenizer import train_tokenizer
from tests.unit.corpus.tables import token_table


def write(path: Path, indices: list[int]) -> str:
    if path.suffix == ".npy":
        np.save(path, np.array(indices))
    else:
        path.write_text("".join(f"{index}\n" for index in indices) + "\n")
    return str(path)


@pytest.mark.parametrize("name", ["rows.npy", "rows.txt"])
def test_the_rows_that_a_file_lists_are_taken_in_the_order_of_the_input(tmp_path, name) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"the {i}"}) + "\n" for i in range(40)))
    listed = write(tmp_path / name, [31, 0, 7, 8])
    source = Input(path=str(tmp_path / "a.jsonl"), rows=listed)
    assert read_texts(source, "k") == ["the 0", "the 7", "the 8", "the 31"]
    rows, first, tokenizer = [], 0, train_tokenizer(["the end"] * 3, vocab_size=300)
    for chunk in list_chunks(source, 0, chunk_bytes=100, dotted_key="k"):
        table, bad, read = token_table(chunk, source, tokenizer, first_input_row=first, annotate=False)
        rows += [first + row for row in table.column("row").to_pylist()]
        first += read
        assert not bad
    assert rows == [0, 7, 8, 31]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("none.txt", None, r"does not exist: name a \.npy or text file of row numbers"),
        ("a.txt", "", "lists no row"),
        ("a.txt", "1\nx\n", "line 2: b'x' is no row number; one on each line"),
        ("a.txt", "1\n-1\n", "lists row -1; rows count from 0"),
        ("a.txt", "3\n1\n3\n", "lists row 3 twice"),
        ("a.npy", "3\n", r"is no \.npy file of numbers"),
        ("a.npy", "", r"is no \.npy file of numbers"),
    ],
)
def test_what_lists_no_rows_is_named(tmp_path, name, content, reason) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises((ValueError, FileNotFoundError), match=rf"{name} {reason}"):
        RowChoice.of(str(tmp_path / name))


@pytest.mark.parametrize("array", [np.ones((2, 2), int), np.array([0.5]), np.array([True])], ids=str)
def test_an_array_of_something_else_is_named(tmp_path, array) -> None:
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(ValueError, match=r"a\.npy holds .*; one list of row numbers is needed"):
        RowChoice.of(str(tmp_path / "a.npy"))


def test_a_list_that_is_written_anew_is_read_anew(tmp_path) -> None:
    assert 3 in RowChoice.of(write(tmp_path / "a.txt", [3]))
    choice = RowChoice.of(write(tmp_path / "a.txt", [14, 5]))
    assert [row in choice for row in (3, 5, 6, 14, 15)] == [False, True, False, True, False]


def test_rows_beyond_the_input_are_refused(tmp_path) -> None:
    source = Input(path="a", rows=write(tmp_path / "a.txt", [2, 9]))
    with pytest.raises(ConfigError, match=r"pack_corpus\.inputs\[0\]\.rows: ends at 10, but a has 0 rows"):
        placed_chunks(keyed_chunks([], [], {}), [source], {})


def test_a_config_names_a_range_or_a_file() -> None:
    def rows(value: object) -> object:
        return (
            config_from_mapping({"pack_corpus": {"inputs": [{"path": "a", "rows": value}]}}).pack_corpus.inputs[0].rows
        )

    assert rows([1, 3]) == (1, 3)
    assert rows("rows.npy") == "rows.npy"
    for wrong in (3, [3, 1], [1]):
        with pytest.raises(ConfigError, match=r"pack_corpus\.inputs\[0\]\.rows"):
            rows(wrong)
