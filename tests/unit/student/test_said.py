"""What is said of scores that a student made, from the certificate of an audit."""

from typing import Any, cast

import numpy as np

from ifguide.student.certificate import Audit, certify
from ifguide.student.said import SUMMARY, audit_line, audit_lines, listed


def summary(scorer: str = "cascade") -> dict[str, object]:
    rng = np.random.default_rng(0)
    exact_N = rng.normal(size=4000)
    audit = Audit(
        exact_N=exact_N,
        student_N=exact_N,
        rechecked_N=exact_N > 1,
        blocks_N=np.arange(4000) // 20,
        sources_N=np.arange(4000) // 2000,
        sources=("a.jsonl", "b.jsonl", "c.jsonl"),
    )
    made = {"scorer": scorer, "kind": "ngram", "exact_blocks": 1234, "rechecked_blocks": 1000, "audited_blocks": 234}
    return {SUMMARY: {**made, **certify(audit).as_json()}}


def test_scorer_recall_sources_and_what_was_not_audited_are_said() -> None:
    lines = audit_lines(summary())
    assert lines["scores"] == "cascade with a student of kind ngram, 1,234 blocks exactly"
    assert lines["exact top 2% in rechecked blocks"].startswith("1.000 [0.")
    assert lines["exact top 2% in rechecked blocks"].endswith(", 1.000]")
    by_source = lines["exact top 2% in rechecked blocks, by source"]
    assert by_source.startswith("a.jsonl 1.000 [")
    assert "; b.jsonl 1.000 [" in by_source
    assert lines["sources without an audited block"] == "c.jsonl"
    assert audit_line(summary()).startswith("cascade: 1.000 [0.")


def test_of_a_student_alone_its_own_top_is_said() -> None:
    lines = audit_lines(summary("student"))
    assert lines["exact top 2% in the student's top 10%"].startswith("1.000 [0.")
    assert "exact top 2% in rechecked blocks" not in lines
    assert audit_line(summary("student")).endswith("in the student's top 10%")


def test_of_exact_scores_nothing_is_said() -> None:
    assert audit_lines({"attribution": "target"}) == {}
    assert audit_line({}) == ""


def test_of_many_sources_the_worst_are_said_and_how_many_more_there_are() -> None:
    said = cast("dict[str, Any]", summary()[SUMMARY])
    one = said["by_source"]["a.jsonl"]
    own = {f"{i:02d}.txt": {**one, "rechecked": {**one["rechecked"], "value": i / 100}} for i in range(30, 0, -1)}
    own["none.txt"] = {**one, "rechecked": {**one["rechecked"], "value": None}}
    many = {"by_source": own, "audited_sources": 5000, "unaudited": list("abcdefghij"), "unaudited_sources": 90_000}
    lines = audit_lines({SUMMARY: {**said, **many}})
    by_source = lines["exact top 2% in rechecked blocks, by source"].split("; ")
    assert [text.split()[0] for text in by_source[:-1]] == [f"{i:02d}.txt" for i in range(1, 11)]
    assert by_source[-1] == "4,990 more"
    assert lines["sources without an audited block"] == "a, b, c, d, e, f, g, h, i, j, 89,990 more"
    assert listed(["a", "b"]) == "a, b"
