"""The bench of the first day: what it takes for a fault that is named, a field that is shown, and a whole day."""

from __future__ import annotations

import json

import pytest

from bench.first_day import FAULTS, KINDS, SHOWN, SNIPPETS, named_faults, training_fields, wrong

SAID = """preflight found 3 faults:
  evaluate.classifier.name = detoxif:orig: no such classifier; did you mean detoxify:original?
  target.architecture.hidden_sizes = 3: unknown field of gpt_neox; did you mean hidden_size?
  evaluate.cloze.path = data/praise/other.jsonl: the file does not exist
"""


def test_a_fault_is_named_by_its_key_value_and_reason() -> None:
    assert named_faults(SAID) == ["evaluate.classifier=detoxif:orig", "target.architecture.hidden_sizes=3"]


def test_fields_are_those_of_a_training_in_progress() -> None:
    row = {"step": 3, "steps": 10, "loss": 2.5, "tokens_per_second": 100.0, "eta_seconds": None}
    packing = {"state": "in progress", "progress": {"loss": 1.0}}
    done = {"state": "complete", "progress": {"steps": 5, "step": 5}}
    assert training_fields(json.dumps({"stages": [packing, done]})) == set()
    training = {"state": "in progress", "progress": row}
    assert training_fields(json.dumps({"stages": [packing, training]})) == {*SHOWN} - {"eta_seconds"}


@pytest.mark.parametrize("lacking", [None, "faults_named", "files_read", "status_fields", "trainer_snippets_equal"])
def test_a_day_that_lacks_something_says_so(lacking: str | None) -> None:
    figures = {
        "faults_named": len(FAULTS),
        "files_read": len(KINDS),
        "status_fields": list(SHOWN),
        "export_formats": 4,
        "trainer_snippets_equal": SNIPPETS,
    }
    if lacking:
        figures[lacking] = 0
    found = list(wrong(figures, documents=9, read=9, report=True))
    assert [text.partition(" ")[0] for text in found] == ([lacking] if lacking else [])
    assert len(list(wrong(figures, documents=9, read=8, report=False))) == len(found) + 2
