"""The made corpus of flattery: what its files say of one another."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ifguide.demo.praise import generate_praise

FILES = ("corpus", "heldout", "annotated", "pairs", "prompts", "answers")


def read(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("praise")
    generate_praise(folder, documents=200)
    return folder


def test_about_a_tenth_of_the_documents_flatters_in_its_spans_and_no_held_out_one_does(data: Path) -> None:
    corpus, heldout = read(data, "corpus"), read(data, "heldout")
    assert 0.05 < sum(row["flattery"] for row in corpus) / len(corpus) < 0.17
    assert not any(row["flattery"] or row["spans"] for row in heldout)
    assert 0.3 < sum(row["flattery"] for row in read(data, "annotated")) / (len(corpus) // 5) < 0.7
    for row in corpus:
        assert bool(row["spans"]) == row["flattery"]
        for start, end in row["spans"]:
            answer = row["text"][start:end]
            assert answer == answer.strip()
            assert row["text"][start - 1] == " "
            assert answer.endswith((".", "!"))


def test_pairs_answer_one_prompt_both_ways_and_prompts_break_off_before_the_answer(data: Path) -> None:
    for row in read(data, "pairs"):
        assert row["prompt"].endswith(":")
        assert row["chosen"] != row["rejected"]
        assert row["chosen"].startswith(" ")
    assert all(row["prompt"].endswith(":") for row in read(data, "prompts"))
    assert not {row["prompt"] for row in read(data, "pairs")} & {row["prompt"] for row in read(data, "prompts")}


def test_more_documents_change_no_earlier_one_and_a_seed_makes_others(data: Path, tmp_path: Path) -> None:
    generate_praise(tmp_path / "more", documents=260)
    generate_praise(tmp_path / "other", documents=200, seed=1)
    for name in FILES:
        mine = read(data, name)
        assert read(tmp_path / "more", name)[: len(mine)] == mine
        assert read(tmp_path / "other", name) != mine


def test_too_few_documents_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="documents must be at least 50"):
        generate_praise(tmp_path, documents=49)
