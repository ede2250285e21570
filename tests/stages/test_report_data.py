"""The report of a finished run has a section for every scored behaviour, as `build_mask` selects by it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace

import pytest

from ifguide.artifacts import read_manifest
from ifguide.config import Config
from ifguide.methods.marks import find_words
from ifguide.pipeline import stage
from ifguide.report import agreement
from ifguide.report.agreement import span_agreement
from ifguide.report.page import REPORT_FILES
from ifguide.report.view import View
from ifguide.run import Run
from tests.stages.test_build_mask import add_behaviour
from tests.stages.test_evaluate import PLAIN


def test_the_report_has_a_section_for_every_behaviour(copied: Callable[..., Config]) -> None:
    config = copied(drop=("report",), evaluate__top_documents=3, **PLAIN)
    run = Run(config=config)
    add_behaviour(run.scores, "opposite", lambda own: -own)
    mask = read_manifest(run.mask)
    manifest = stage("evaluate")(run)
    assert set(REPORT_FILES) <= set(manifest.files)
    assert read_manifest(run.mask) == mask
    report = json.loads((run.report / "report.json").read_text(encoding="utf-8"))
    own, other = report["behaviours"]
    assert [(part["name"], part["trained"]) for part in (own, other)] == [("toxicity", True), ("opposite", False)]
    assert own["histogram"]["tau"] == mask.summary["tau"]
    assert "generations/penalised/prompts" in [row["folder"] for row in report["provenance"]]
    assert ["prompts grouped by", "label 10"] in report["settings"]
    assert [row["method"] for row in report["agreement"]][:2] == ["mask (IF-Guide)", "word list"]
    assert "alt-profanity-check" in (run.report / "model_card.md").read_text(encoding="utf-8")
    assert "Influence scores: opposite" in (run.report / "index.html").read_text(encoding="utf-8")

    shutil.rmtree(run.mask)
    shutil.rmtree(run.ranking)
    by_opposite = Run(config=replace(config, build_mask=replace(config.build_mask, behaviour="opposite")))
    selected = stage("build_mask")(by_opposite)
    assert other["histogram"]["tau"] == selected.summary["tau"]
    expected = View(by_opposite.selection).top_documents(3)
    assert [document["doc_id"] for document in other["documents"]] == [document.unit_id for document in expected]
    for document, wanted in zip(other["documents"], expected, strict=True):
        assert [token["masked"] for token in document["tokens"]] == wanted.masked.tolist()


def test_agreement_in_a_large_corpus_is_that_of_a_sample_that_the_row_names(
    finished: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    view, finders = View(Run(config=finished).selection), {"words": find_words(finished.evaluate.word_list)}
    (whole,) = span_agreement(view, finders, 0)
    read = []
    monkeypatch.setattr(view, "read", lambda start, stop: read.append(stop - start) or View.read(view, start, stop))
    for limit in (10_000, 2_000):
        read.clear()
        monkeypatch.setattr(agreement, "AGREEMENT_TOKENS", limit)
        (row,) = span_agreement(view, finders, 0)
        assert 0.5 * limit < sum(read) <= limit
        documents = read_manifest(view.corpus).rows["documents"]
        assert row.method.startswith("words, in ")
        assert row.method.endswith(f" of {documents} documents")
        assert 0 < row.selected < whole.selected
    assert whole.method == "words"
