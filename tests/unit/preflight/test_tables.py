"""Documents, prompts and queries: what a preflight says of files and rows."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.unit.preflight.conftest import ROW, lines


def test_tables_of_queries_are_read_in_the_place_of_prompts_and_their_classifier(faults, tmp_path) -> None:
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "p", "chosen": "c"}\n')
    changes = {"build_query__prompts": None, "build_query__classifier": "detoxif:orig"}
    (found,) = faults("build_query", build_query__pairs=str(tmp_path / "pairs.jsonl"), **changes)
    assert "row 0: has no column 'rejected', only prompt, chosen" in found
    changes |= {"build_query__pairs": None}
    changes |= {"build_query__differential": False}
    (found,) = faults("build_query", build_query__positive="none.jsonl", **changes)
    assert "build_query.positive.path = none.jsonl: none.jsonl does not exist" in found


def test_query_sets_that_would_be_empty_are_said_before_anything_is_trained(faults, tmp_path) -> None:
    pair = {"prompt": "p", "chosen": " good", "rejected": " bad"}
    pairs, empty = lines(tmp_path / "pairs.jsonl", *[pair] * 6), lines(tmp_path / "e.jsonl", {**pair, "chosen": ""})
    tables = {"build_query__prompts": None}
    assert faults("build_query", build_query__pairs=pairs, build_query__held_out=5, **tables) == []
    (found,) = faults("build_query", build_query__pairs=pairs, build_query__held_out=50, **tables)
    assert f"build_query = {pairs}: build_query.held_out: 50 of 6 positive queries leave none" in found
    (found,) = faults("build_query", build_query__pairs=empty, **tables)
    assert "build_query.negative: no table gives a completion for this set" in found
    bare = lines(tmp_path / "bare.jsonl", {"prompt": "p"}, {"prompt": {"text": "q", "toxicity": 0.3}})
    tables = {"build_query__pairs": None, "build_query__prompts": bare}
    (found,) = faults("build_query", build_query__classifier="alt-profanity-check", **tables)
    assert found == f"build_query = {bare}: no row has a continuation to score; name prompts that have"
    (found,) = faults("build_query", build_query__classifier="labels")
    assert "none of 2 prompt rows has a continuation that labels can score" in found


def test_a_direction_of_positive_queries_alone_needs_no_negative_ones(faults, tmp_path) -> None:
    rude = lines(tmp_path / "rude.jsonl", *[ROW] * 6)
    changes = {"build_query__prompts": rude, "build_query__classifier": "labels", "build_query__held_out": 5}
    (found,) = faults("build_query", **changes)
    assert "raise build_query.negative_threshold" in found
    assert faults("build_query", build_query__differential=False) == []
    calm = {**ROW, "continuation": {"text": " friend.", "toxicity": 0.0}}
    assert faults("build_query", build_query__prompts=lines(tmp_path / "few.jsonl", *[ROW] * 6, calm)) == []


def test_what_an_evaluation_lacks_is_said_before_anything_is_trained(faults, tmp_path) -> None:
    late = lines(tmp_path / "late.jsonl", *[{"text": "x"}] * 30, {"text": None})
    (found,) = faults("evaluate", evaluate__heldout=[late])
    assert f"{late} row 30: column 'text' is missing; mend the row" in found
    assert "max_bad_rows" not in found
    plain = lines(tmp_path / "plain.jsonl", *[{"prompt": "p"}] * 9)
    changes = {"evaluate__prompts": plain, "evaluate__balanced": True, "evaluate__max_prompts": 4}
    (found,) = faults("evaluate", evaluate__heldout=[], **changes)
    assert "evaluate.balanced: 2 prompts with toxicity are wanted" in found.replace(
        "evaluate.balanced = true: ", "evaluate.balanced: "
    )


def test_a_mistyped_column_of_spans_is_said_where_rows_may_leave_it_out(faults, tmp_path) -> None:
    marked = lines(tmp_path / "marked.jsonl", {"text": "a pig", "spans": [[2, 5]]}, {"text": "calm"})
    assert faults("pack_corpus", pack_corpus__inputs=[{"path": marked, "spans_column": "spans"}]) == []
    (found,) = faults("pack_corpus", pack_corpus__inputs=[{"path": marked, "spans_column": "spanz"}])
    assert "no row has 'spanz'; did you mean spans_column: spans?" in found


def bad_files(folder: Path) -> dict[str, tuple[str, str]]:
    """Kinds of bad files: the path of an input, and what is said of it."""
    whole = gzip.compress(json.dumps({"text": "word " * 4000}).encode() + b"\n")
    (folder / "cut.jsonl.gz").write_bytes(whole[:-12])
    (folder / "noise.jsonl.gz").write_bytes(b"no gzip")
    (folder / "empty.jsonl.zst").write_bytes(b"")
    (folder / "empty.jsonl").write_bytes(b"")
    (folder / "broken.parquet").write_bytes(b"PAR1")
    (folder / "utf16.jsonl").write_bytes('{"text": "x"}\n'.encode("utf-16"))
    lines(folder / "number.jsonl", {"text": "fine"}, {"text": 3})
    lines(folder / "null.jsonl", {"text": "fine"}, {"text": None})
    mixed = folder / "mixed"
    mixed.mkdir()
    pq.write_table(pa.table({"text": ["a"]}), mixed / "a.parquet")
    pq.write_table(pa.table({"body": ["b"]}), mixed / "b.parquet")
    other = folder / "other"
    other.mkdir()
    lines(other / "a.jsonl", {"text": "a"})
    (other / "b.xyz").write_bytes(b"")
    return {
        "cut.jsonl.gz": ("cut.jsonl.gz", "damaged or cut off"),
        "noise.jsonl.gz": ("noise.jsonl.gz", "damaged or cut off"),
        "empty.jsonl.zst": ("empty.jsonl.zst", "damaged or cut off (it is empty)"),
        "empty.jsonl": ("empty.jsonl", "holds no rows; name files that do"),
        "broken.parquet": ("broken.parquet", "cannot be read as Parquet"),
        "utf16.jsonl": ("utf16.jsonl row 0", "not UTF-8"),
        "number.jsonl": ("number.jsonl row 1", "column 'text' is a int, not a string; mend the row, or allow for it"),
        "null.jsonl": ("null.jsonl row 1", "column 'text' is missing; mend the row, or allow for it"),
        "mixed": ("mixed/b.parquet", "has no column 'text'; it has body"),
        "other": ("other/b.xyz", "Convert them, move them away, or name the files by a pattern"),
    }


@pytest.mark.parametrize("where", ["pack_corpus__inputs", "evaluate__heldout"])
def test_bad_documents_are_one_line_with_file_row_and_what_to_do(tmp_path, faults, where) -> None:
    for name, (place, reason) in bad_files(tmp_path).items():
        (found,) = faults(where.partition("__")[0], **{where: [str(tmp_path / name)]})
        assert found.startswith(f"{where.replace('__', '.')}[0].path = {tmp_path / name}: "), found
        assert place in found, (name, found)
        wanted = reason if where == "pack_corpus__inputs" else reason.removesuffix(", or allow for it")
        assert wanted in found, (name, found)
        assert "\n" not in found


@pytest.mark.parametrize("where", ["build_query__prompts", "evaluate__prompts"])
def test_bad_prompt_tables_are_one_line_with_file_and_row(tmp_path, faults, where) -> None:
    verb, key = where.partition("__")[0], where.replace("__", ".")
    flat = lines(tmp_path / "flat.jsonl", ROW, {"text": "x"})
    (found,) = faults(verb, **{where: flat})
    start = f"{key}.path = {flat}: {flat}, row 1: needs prompt.text, a string, as in RealToxicityPrompts"
    assert found == f"{start}, or a string as prompt"
    whole = lines(tmp_path / "whole.jsonl", *[ROW] * 4)
    (found,) = faults(verb, **{where: {"path": whole, "rows": [2, 5]}})
    assert found.startswith(f"{key}.rows = [2, 5]: [2, 5) is not within the 4 rows of ")
    assert faults(verb, **{where: {"path": whole, "rows": [2, 4]}}) == []


def test_bad_rows_that_are_allowed_are_no_fault_unless_all_are_bad(tmp_path, faults) -> None:
    some = lines(tmp_path / "some.jsonl", {"body": "x"}, {"text": "fine"})
    none = lines(tmp_path / "none.jsonl", {"body": "x"}, {"body": "y"})
    assert faults("pack_corpus", pack_corpus__inputs=[some], pack_corpus__max_bad_rows=1) == []
    assert len(faults("pack_corpus", pack_corpus__inputs=[none])) == 1
    assert len(faults("pack_corpus", pack_corpus__inputs=[some], pack_corpus__max_bad_rows=0)) == 1


def test_one_fault_of_many_files_is_one_line_with_their_number(tmp_path, faults) -> None:
    folder = tmp_path / "many"
    folder.mkdir()
    for i in range(12):
        lines(folder / f"{i:02}.jsonl", *[{"body": "x"}] * 3)
    (found,) = faults("pack_corpus", pack_corpus__inputs=[str(folder)])
    assert f"{folder / '00.jsonl'} row 0 (and in 11 more files): column 'text' is missing; it has body; set" in found


def test_lists_of_rows_are_read_and_must_fit(tmp_path, faults) -> None:
    rows = tmp_path / "rows.txt"
    corpus = {"path": str(tmp_path / "data" / "corpus.jsonl"), "rows": str(rows)}
    (found,) = faults("pack_corpus", pack_corpus__inputs=[corpus])
    assert found == (
        f"pack_corpus.inputs[0].rows = {rows}: {rows} does not exist: name a .npy or text file of row numbers, or"
        " [start, stop]"
    )
    rows.write_text("3\n30\n")
    (found,) = faults("pack_corpus")
    assert found.startswith(f"pack_corpus.inputs[0].rows = {rows}: ends at 31, but {corpus['path']} has 30 rows")
    rows.write_text("3\n29\n")
    assert faults("pack_corpus") == []


def test_held_out_texts_that_are_trained_on_are_a_fault(
    tmp_path: Path, faults: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "texts").mkdir()
    texts = lines(tmp_path / "texts" / "a.jsonl", *[{"text": "fine"}] * 9)
    lines(tmp_path / "texts" / "b.jsonl", {"text": "fine"})

    def found(inputs: Any, heldout: Any) -> list[str]:
        return faults("evaluate", pack_corpus__inputs=[inputs], evaluate__heldout=[heldout])

    monkeypatch.chdir(tmp_path)
    for inputs, heldout in (
        (texts, texts),
        (str(tmp_path / "texts" / "*.jsonl"), {"path": texts, "rows": [2, 4]}),
        ({"path": texts, "rows": [2, 4]}, {"path": "./texts/a.jsonl", "rows": [2, 4]}),
        ({"path": str(tmp_path / "texts"), "rows": [2, 4]}, str(tmp_path / "texts" / "*.jsonl")),
        ({"path": texts, "rows": [2, 4]}, str(tmp_path / "texts")),
        (str(tmp_path / "texts"), texts),
        (str(tmp_path / "texts"), str(tmp_path / "*" / "b.jsonl")),
        (texts, {"path": texts, "rows": [2, 4]}),
        ({"path": texts, "rows": [3, 9]}, {"path": texts, "rows": [2, 4]}),
    ):
        (fault,) = found(inputs, heldout)
        assert fault.startswith("evaluate.heldout[0].path = ")
        assert "is trained on as well (pack_corpus.inputs[0]); name texts that are held out" in fault
    assert found({"path": texts, "rows": [4, 9]}, {"path": texts, "rows": [2, 4]}) == []
    assert found(texts, str(tmp_path / "texts" / "b.jsonl")) == []
    assert found({"path": str(tmp_path / "texts"), "rows": [0, 9]}, {"path": texts, "rows": [2, 4]}) == []  # unknown


@pytest.mark.parametrize(
    ("own", "held_out", "shared"),
    [
        ("hf://x/y", "hf://x/y:train", True),
        ("hf://x/y", {"path": "hf://x/y", "split": "train"}, True),
        ("hf://x/y:test", {"path": "hf://x/y", "split": "test", "rows": [0, 9]}, True),
        ({"path": "hf://x/y", "rows": [9, 20]}, {"path": "hf://x/y:train", "rows": [0, 9]}, False),
        ("hf://x/y", "hf://x/y:test", False),
        ({"path": "hf://x/y", "subset": "en"}, {"path": "hf://x/y", "subset": "de"}, False),
    ],
)
def test_a_dataset_of_the_hub_that_is_trained_on_is_known_by_name_subset_and_split(
    faults: Callable[..., list[str]], asked: list[str], own: Any, held_out: Any, shared: bool
) -> None:
    found = faults("evaluate", pack_corpus__inputs=[own], evaluate__heldout=[held_out])
    assert any("is trained on as well (pack_corpus.inputs[0])" in fault for fault in found) == shared


def test_preference_methods_need_prompts_that_are_not_evaluated(
    faults: Callable[..., list[str]], tmp_path: Path
) -> None:
    others = lines(tmp_path / "others.jsonl", {"prompt": "You were", "continuation": "b"})
    assert faults("compare", compare__methods={"random": {"mask": "random"}}) == []
    (found,) = faults("compare", compare__methods={"rad": {"rad": {}}})  # both tables have the same rows
    assert found.startswith("build_query.prompts = ")
    assert found.endswith(": all of them are evaluated too; DPO and RAD need others to learn from")
    assert faults("compare", build_query__prompts=others) == []
    (found,) = faults("compare", evaluate__prompt_sets={"more": others})
    assert found.startswith(f"build_query.prompts = {others}: all of them are evaluated too")
    (found,) = faults("compare", evaluate__prompt_sets={"more": "none.jsonl"})
    assert found.startswith("evaluate.prompt_sets.more.path = none.jsonl: none.jsonl does not exist")
