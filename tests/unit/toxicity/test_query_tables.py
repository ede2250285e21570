"""Query sets that come as tables: one for each set, or pairs of completions."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ifguide.config import BuildQuery, Completions, ConfigError, Pairs, config_from_mapping
from ifguide.config.typed_yaml import result_part
from ifguide.toxicity import QuerySets, choose_queries
from ifguide.toxicity.prompts import PromptRow, read_completions, read_pairs, read_prompts


def write(path: Path, *records: Any) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def row(number: int, prompt: str, completion: str) -> PromptRow:
    return PromptRow(row=number, prompt=prompt, continuation=completion, prompt_scores={}, continuation_scores={})


def test_a_set_is_rows_of_prompt_and_completion_or_of_a_text(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.jsonl", {"prompt": "p", "completion": " c"}, {"text": "t"}, {"prompt": "q", "text": " u"}
    )
    expected = [row(0, "p", " c"), row(1, "", "t"), row(2, "q", " u")]
    assert read_completions(Completions(path=path), "k") == expected
    assert read_completions(Completions(path=path, rows=(1, 3)), "k") == expected[1:]
    pq.write_table(pa.table({"ask": ["p"], "answer": [{"en": " c"}]}), tmp_path / "a.parquet")
    named = Completions(path=str(tmp_path / "a.parquet"), prompt_column="ask", completion_column="answer.en")
    assert read_completions(named, "k") == [row(0, "p", " c")]


def test_pairs_give_a_row_to_each_set(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", {"prompt": "p", "chosen": " good", "rejected": " bad"})
    assert read_pairs(Pairs(path=path), "k") == ([row(0, "p", " bad")], [row(0, "p", " good")])
    other = Pairs(path=path, positive_column="chosen", negative_column="rejected")
    assert read_pairs(other, "k") == ([row(0, "p", " good")], [row(0, "p", " bad")])


def test_pairs_weigh_by_their_margin(tmp_path: Path) -> None:
    records = [{"prompt": "p", "chosen": " good", "rejected": " bad", "gap": {"by": gap}} for gap in (2, 0.5)]
    options = BuildQuery(
        pairs=Pairs(path=write(tmp_path / "p.jsonl", *records), margin_column="gap.by"), weigh="confidence"
    )
    sets = choose_queries(options, 0)
    assert sets.positive_weights == sets.negative_weights == [2.0, 0.5]
    assert result_part(Pairs(path="a")).keys() == {
        "path",
        "prompt_column",
        "positive_column",
        "negative_column",
        "rows",
    }
    for bad in (-1, "2", None, True):
        path = write(tmp_path / "b.jsonl", records[0], {**records[1], "gap": {"by": bad}})
        with pytest.raises(ValueError, match=r"b\.jsonl, row 1: .*by is"):
            read_pairs(Pairs(path=path, margin_column="gap.by"), "k")


def test_pairs_of_no_margin_are_no_queries(tmp_path: Path) -> None:
    """They would take places of others, and a half of nothing else has no mean."""

    def sets(*gaps: float) -> QuerySets:
        records = [{"prompt": "p", "chosen": " good", "rejected": " bad", "gap": gap} for gap in gaps]
        pairs = Pairs(path=write(tmp_path / "p.jsonl", *records), margin_column="gap")
        return choose_queries(BuildQuery(pairs=pairs, weigh="confidence"), 0)

    made = sets(0, 1, 2)
    assert [row.row for row in made.positive] == [row.row for row in made.negative] == [1, 2]
    assert (made.unusable, made.positive_rows) == (2, 2)
    with pytest.raises(ValueError, match=r"build_query\.positive: .*margin above 0"):
        sets(0, 0)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (
            {"weigh": "confidence", "positive": "a", "negative": "b"},
            "build_query.weigh: confidence wants scores",
        ),
        ({"weigh": "confidence", "pairs": "a"}, "build_query.weigh: confidence wants scores"),
        ({"pairs": {"path": "a", "margin_column": "m"}}, "build_query.pairs.margin_column: weighs by confidence"),
    ],
)
def test_weights_want_something_to_weigh_by(section: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_from_mapping({"build_query": section})


def test_queries_that_are_held_out_are_further_ones_where_there_are_enough(tmp_path: Path) -> None:
    pairs = ({"prompt": f"p{i}", "chosen": f" good {i}", "rejected": f" bad {i}"} for i in range(12))
    options = BuildQuery(pairs=Pairs(path=write(tmp_path / "p.jsonl", *pairs)), max_positive=6, max_negative=6)
    plain = choose_queries(options, 3)
    used, held_out = choose_queries(replace(options, held_out=4), 3).hold_out(4, 3)
    assert (used.positive, used.negative) == (plain.positive, plain.negative)
    assert [each.row for each in held_out.positive] == [each.row for each in held_out.negative]
    assert len(held_out.positive) == len(held_out.positive_scores) == len(held_out.negative_weights) == 4
    assert {each.row for each in held_out.positive}.isdisjoint(each.row for each in used.positive)
    few, rest = choose_queries(replace(options, held_out=10), 3).hold_out(10, 3)
    assert (len(few.positive), len(rest.positive)) == (2, 10)
    with pytest.raises(ValueError, match=r"build_query.held_out: 12 of 12 positive queries leave none"):
        choose_queries(replace(options, held_out=12), 3).hold_out(12, 3)
    uneven = replace(options, held_out=4, max_positive=6, max_negative=2)
    used, held_out = choose_queries(uneven, 3).hold_out(4, 3)
    assert (len(held_out.positive), len(held_out.negative)) == (4, 4)
    held_pairs = {each.row for each in (*held_out.positive, *held_out.negative)}
    assert held_pairs.isdisjoint(each.row for each in (*used.positive, *used.negative))


def test_all_negative_completions_may_be_held_out_where_the_direction_has_none(tmp_path: Path) -> None:
    pairs = ({"prompt": f"p{i}", "chosen": " good" if i < 2 else "", "rejected": f" bad {i}"} for i in range(12))
    options = BuildQuery(pairs=Pairs(path=write(tmp_path / "p.jsonl", *pairs)), differential=False)
    sets = choose_queries(options, 3)
    used, held_out = sets.hold_out(4, 3, differential=False)
    assert used.negative == []
    assert held_out.negative == sets.negative
    assert {each.row for each in used.positive}.isdisjoint({0, 1})
    assert used.positive


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "p"}, r"row 1: has no column 'completion', only prompt"),
        ({"completion": "c"}, r"row 1: has no column 'prompt', only completion"),
        ({"prompt": "p", "completion": [{"role": "user"}]}, r"row 1: completion is .* not a str"),
        ("p", r"row 1: a str, not an object"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, record: Any, message: str) -> None:
    path = write(tmp_path / "a.jsonl", {"prompt": "p", "completion": " c"}, record)
    with pytest.raises(ValueError, match=message) as caught:
        read_completions(Completions(path=path), "build_query.positive")
    assert path in str(caught.value)


def test_rows_outside_of_the_table_and_an_empty_table_are_errors(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"text": "t"})
    with pytest.raises(ConfigError, match=r"build_query\.negative\.rows: \[0, 2\) is not within the 1 of"):
        read_completions(Completions(path=path, rows=(0, 2)), "build_query.negative")
    with pytest.raises(ValueError, match=r"b\.jsonl: the table of queries is empty"):
        read_completions(Completions(path=write(tmp_path / "b.jsonl")), "k")


def test_sets_are_drawn_by_seed_and_every_completion_is_counted(tmp_path: Path) -> None:
    positive = write(tmp_path / "a.jsonl", *({"text": f"a{i}"} for i in range(30)), {"text": " "})
    negative = write(tmp_path / "b.jsonl", *({"text": f"b{i}"} for i in range(5)))
    options = BuildQuery(positive=Completions(path=positive), negative=Completions(path=negative), max_positive=10)
    sets = choose_queries(options, 0)
    assert (len(sets.positive), len(sets.negative)) == (10, 5)
    assert (sets.positive_scores, sets.negative_scores) == ([1.0] * 10, [0.0] * 5)
    assert (sets.positive_rows, sets.negative_rows, sets.undecided, sets.unusable) == (30, 5, 0, 1)
    assert [each.row for each in sets.positive] == sorted(each.row for each in sets.positive)
    assert sets.positive == choose_queries(options, 0).positive != choose_queries(options, 1).positive


def test_a_set_without_completions_is_an_error_unless_it_is_not_used(tmp_path: Path) -> None:
    path = Completions(path=write(tmp_path / "a.jsonl", {"text": "t"}))
    with pytest.raises(ValueError, match=r"build_query\.negative: no table gives a completion"):
        choose_queries(BuildQuery(positive=path), 0)
    assert choose_queries(BuildQuery(positive=path, differential=False), 0).negative == []


def test_queries_come_from_one_place() -> None:
    with pytest.raises(ConfigError, match="build_query: prompts and pairs are set"):
        config_from_mapping({"build_query": {"prompts": "a.jsonl", "pairs": "b.jsonl"}})
    with pytest.raises(ConfigError, match=r"build_query\.positive: required beside build_query\.negative"):
        config_from_mapping({"build_query": {"negative": "b.jsonl"}})


def test_what_was_made_of_prompts_before_there_were_tables_still_fits() -> None:
    assert not {"pairs", "positive", "negative"} & result_part(BuildQuery()).keys()
    assert result_part(BuildQuery(pairs=Pairs(path="a")))["pairs"]["path"] == "a"


def test_prompts_may_be_plain_strings(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"prompt": "p"}, {"prompt": "q", "continuation": " c"})
    assert read_prompts(path) == [row(0, "p", ""), row(1, "q", " c")]
    path = write(tmp_path / "b.jsonl", {"prompt": "p", "continuation": None})
    with pytest.raises(ValueError, match=r"row 0: needs continuation\.text"):
        read_prompts(path)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"positive": "a"}, r"build_query\.negative: required beside .*differential to false"),
        ({"positive": "a", "negative": "a"}, r"build_query\.negative: a is build_query\.positive, too: V would be 0"),
    ],
)
def test_a_difference_wants_two_sets(section: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_from_mapping({"build_query": section})
    config_from_mapping({"build_query": {"positive": "a", "differential": False}})
