"""Prompts and labelled texts by the one rule of `records.files`: folders, links, compressed and damaged files."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from ifguide.config import LabelledTexts, Prompts, PromptSet, config_from_mapping
from ifguide.evaluation.agreement import check_classifiers
from ifguide.evaluation.prompts import chosen_sets
from ifguide.toxicity import read_grouped_prompts, read_labelled, read_prompts
from ifguide.toxicity.prompts import read_prompt_rows


def record(text: str) -> dict[str, Any]:
    """A row that is one of a prompt table, of a prompt set and of labelled texts."""
    return {"prompt": {"text": text}, "continuation": {"text": "b"}, "input": text, "text": text, "toxic": True}


def lines(*texts: str) -> bytes:
    return b"".join(json.dumps(record(text)).encode() + b"\n" for text in texts)


def prompt_texts(path: Path) -> list[str]:
    return [row.prompt for row in read_prompts(path)]


def set_texts(path: Path) -> list[str]:
    return [row.prompt for row in read_grouped_prompts([path], text_column="input")]


def labelled_texts(path: Path) -> list[str]:
    return [row.text for row in read_labelled(path)]


READERS = pytest.mark.parametrize("read", [prompt_texts, set_texts, labelled_texts])
Read = Callable[[Path], list[str]]


@READERS
def test_every_format_gives_the_same_rows(tmp_path: Path, read: Read) -> None:
    rows = [record("a"), record("é")]
    contents = {
        "a.jsonl": lines("a", "é"),
        "a.NDJSON": b"\xef\xbb\xbf" + lines("a", "é").replace(b"\n", b"\r\n\r\n"),
        "a.jsonl.gz": gzip.compress(lines("a", "é")),
        "a.json": json.dumps(rows, indent=1).encode("utf-8-sig"),
        "b.json": lines("a", "é"),
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        assert read(tmp_path / name) == ["a", "é"], name
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    assert read(tmp_path / "a.parquet") == read(tmp_path / "saved") == ["a", "é"]


@READERS
def test_a_folder_is_read_below_links_too_and_a_pattern_by_its_matches(tmp_path: Path, read: Read) -> None:
    for name in ("ds/one/a.jsonl", "elsewhere/b.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(lines(Path(name).stem))
    os.symlink("../elsewhere", tmp_path / "ds" / "two")
    for name in ("README.md", ".b.jsonl.swp", "dataset_infos.json"):
        (tmp_path / "ds" / name).write_text("none of it")
    assert read(tmp_path / "ds") == read(tmp_path / "ds" / "**" / "*.jsonl") == ["a", "b"]
    assert [row.row for row in read_prompts(tmp_path / "ds")] == [0, 1]  # as generations are known by
    (tmp_path / "ds" / "notes.txt").write_text("is it one?")
    with pytest.raises(ValueError, match=r"not read are .*notes\.txt"):
        read(tmp_path / "ds")


@READERS
def test_a_damaged_file_is_named_with_the_row(tmp_path: Path, read: Read) -> None:
    for content, message in (
        (lines("a") + lines("b").replace(b'"b"', b'"\xe9"'), r"a\.jsonl, row 1: not UTF-8"),
        (lines("a") + b"\n \n" + lines("\ud83d"), r"a\.jsonl, row 1: not UTF-8 \(a lone surrogate"),
        (lines("a") + b"null\n", r"a\.jsonl, row 1: "),
        (lines("a").decode().encode("utf-16"), r"a\.jsonl, row 0: not UTF-8"),
        (lines("a").decode().encode("utf-16-le"), r"a\.jsonl, row 0: not JSON"),
        (lines("a")[:-9], r"a\.jsonl, row 0: not JSON"),
        (b"\n \r\n", r"a\.jsonl.* is empty"),
        (b"[" * 100_000, r"a\.jsonl, row 0: not JSON"),
    ):
        (tmp_path / "a.jsonl").write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read(tmp_path / "a.jsonl")
    noise = lines(*(os.urandom(300).hex() for _ in range(300)))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(noise)[:-100])
    with pytest.raises(ValueError, match=r"a\.jsonl\.gz: damaged or cut off"):
        read(tmp_path / "a.jsonl.gz")


def test_bold_s_files_are_read_with_a_mark_and_compressed_and_refused_in_latin_1(tmp_path: Path) -> None:
    content = json.dumps({"g": {"x": ["né"]}}, ensure_ascii=False)
    for name, data in {
        "race_prompt.json": content.encode("utf-8-sig"), "race_prompt.json.gz": gzip.compress(content.encode()),
    }.items():  # fmt: skip
        (tmp_path / name).write_bytes(data)
        (row,) = read_grouped_prompts([tmp_path / name])
        assert (row.prompt, row.group, row.domain) == ("né", "g", "race")
    for data, message in (
        (content.encode("latin-1"), "is not one JSON value in UTF-8"),
        (b'{"g": {"x": ["\\ud800"]}}', r"g\.x holds .*lone surrogate"),
        (b'{"g": {"x": "one text"}}', "not in BOLD's schema"),
    ):
        (tmp_path / "race_prompt.json").write_bytes(data)
        with pytest.raises(ValueError, match=rf"race_prompt\.json.* {message}|race_prompt\.json: {message}"):
            read_grouped_prompts([tmp_path / "race_prompt.json"])


def test_a_table_that_is_not_there_is_named_with_its_key(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"^build_query\.prompts\.path: .*gone\.jsonl does not exist"):
        read_prompt_rows(Prompts(path=str(tmp_path / "gone.jsonl")), "build_query.prompts")
    (tmp_path / "a.txt").touch()
    with pytest.raises(ValueError, match=r"^build_query\.prompts\.path: not read are .*a\.txt"):
        read_prompt_rows(Prompts(path=str(tmp_path / "a.txt")), "build_query.prompts")
    (tmp_path / "p.jsonl").write_bytes(lines("a"))
    options: dict[str, Any] = {"prompts": str(tmp_path / "p.jsonl")}
    sets = {"more": PromptSet(path=str(tmp_path / "a.txt"))}
    evaluate = config_from_mapping({"evaluate": {**options, "prompt_sets": {"more": vars(sets["more"])}}}).evaluate
    with pytest.raises(ValueError, match=r"^evaluate\.prompt_sets\.more\.path: not read are .*a\.txt"):
        chosen_sets(evaluate, 0)
    data = vars(LabelledTexts(path=str(tmp_path / "a.txt")))
    evaluate = config_from_mapping({"evaluate": {"check_data": [data], "classifier": "alt-profanity-check"}}).evaluate
    with pytest.raises(ValueError, match=r"^evaluate\.check_data\[0\]\.path: not read are .*a\.txt"):
        check_classifiers(evaluate, 0)


def test_a_prompt_with_scores_needs_no_continuation_and_may_stand_in_a_set(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": {"text": "a", "toxicity": 0.3}}\n{"prompt": "b"}\n')
    rows = read_prompts(path)
    assert [(row.prompt, row.continuation, row.prompt_scores) for row in rows] == [
        ("a", "", {"toxicity": 0.3}),
        ("b", "", {}),
    ]
    assert [row.prompt for row in read_grouped_prompts([path])] == ["a", "b"]
    for text in ("prompt.text", "prompt"):
        (tmp_path / "p.csv").write_text(f"{text},prompt.toxicity,prompt.threat\nc,0.5,\n")
        (row,) = read_prompts(tmp_path / "p.csv")
        assert (row.prompt, row.prompt_scores) == ("c", {"toxicity": 0.5})
    (tmp_path / "n.jsonl").write_text('{"q": {"text": "d"}}\n')
    for column in ("q", "q.text"):
        assert [row.prompt for row in read_grouped_prompts([tmp_path / "n.jsonl"], text_column=column)] == ["d"]


def test_scores_beside_a_plain_text_are_read_of_either_part_and_checked(tmp_path: Path) -> None:
    path, row = tmp_path / "p.jsonl", {"prompt": "a", "prompt.toxicity": 0.9, "continuation": "b"}
    path.write_text(json.dumps(row | {"continuation.toxicity": 0.1}) + "\n")
    (read,) = read_prompts(path)
    assert (read.prompt, read.prompt_scores) == ("a", {"toxicity": 0.9})
    assert (read.continuation, read.continuation_scores) == ("b", {"toxicity": 0.1})
    path.write_text(json.dumps(row | {"prompt.toxicity": 9}) + "\n")
    with pytest.raises(ValueError, match=r"row 0: prompt\.toxicity is 9, not a score"):
        read_prompts(path)


def test_a_group_may_lie_in_a_nested_column(tmp_path: Path) -> None:
    (tmp_path / "n.jsonl").write_text('{"q": {"text": "d", "kind": "pii"}}\n')
    (tmp_path / "n.csv").write_text("q.text,q.kind\nd,pii\n")
    for name in ("n.jsonl", "n.csv"):
        (row,) = read_grouped_prompts([tmp_path / name], text_column="q.text", group_column="q.kind")
        assert (row.prompt, row.group) == ("d", "pii")


def test_a_string_in_a_list_of_rows_is_named_as_one(tmp_path: Path) -> None:
    (tmp_path / "s.json").write_text('["Hello there", "You are"]')
    with pytest.raises(ValueError, match=r"s\.json, row 0: a str, not an object"):
        read_prompts(tmp_path / "s.json")


def test_a_group_called_as_all_prompts_are_is_refused_with_its_row(tmp_path: Path) -> None:
    rows = [{"input": "a", "label": "all of them"}, {"input": "b", "label": "all"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(
        ValueError, match=r"a\.jsonl, row 1: label is 'all', as all prompts of a set are called; rename"
    ):
        read_grouped_prompts([tmp_path / "a.jsonl"], text_column="input", group_column="label")
    (tmp_path / "race_prompt.json").write_text(json.dumps({"all": {"x": ["a"]}}))
    (row,) = read_grouped_prompts([tmp_path / "race_prompt.json"])
    assert row.group_name == "race/all"
