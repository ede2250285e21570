"""What a page shows of a behaviour, from the artifacts of a selection: made here by tasks without a cluster."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from ifguide.artifacts import data_files, remove_tree
from ifguide.report.contents import Behaviour
from ifguide.report.data import Selected, _behaviour
from ifguide.report.page import MIDDLE_RANK, colour_ramp, render_report
from ifguide.report.view import View
from ifguide.selection.folders import SelectionFolders
from ifguide.selection.masks import make_mask
from tests.sharded import in_any_order
from tests.tokenizers import tokenizers
from tests.unit.report.sample_report import minimal_data
from tests.unit.selection.test_ensemble import OPTIONS, folders, score  # noqa: F401  # a fixture


@pytest.fixture
def selection(folders: SelectionFolders) -> SelectionFolders:  # noqa: F811
    """A run with a corpus, its tokenizer, and scores."""
    tokenizers()["bytes"].save_pretrained(folders.corpus / "tokenizer")
    return folders


def shown(selection: SelectionFolders) -> Behaviour:
    """The page's content on the mask."""
    selected = Selected(name="rudeness", trained=True, folders=selection)
    return _behaviour(selected, View(selection), 2, in_any_order())


@pytest.mark.parametrize("averaged", [False, True])
def test_scores_of_several_runs_are_shown_as_ranks(selection: SelectionFolders, tmp_path: Path, averaged: bool) -> None:
    others = (str(score(tmp_path / "second", selection.corpus, seed=2)),) if averaged else ()
    make_mask(replace(OPTIONS, others=others), selection, config_yaml="", run_tasks=in_any_order())
    part = shown(selection)
    assert part.histogram is not None
    assert part.histogram.ranks == averaged
    assert colour_ramp(part).middle == (MIDDLE_RANK if averaged else 0.0)
    scores = [token.score for document in part.documents for token in document.tokens]
    ranks = [score for score in scores if score is not None]
    assert (min(ranks) > 0) == averaged
    assert (len(ranks) < len(scores)) == averaged  # a block's first token is not predicted


@pytest.mark.parametrize("by", ["scores", "z-scores", "ranks"])
def test_scores_that_were_removed_are_not_shown_as_zeros(selection: SelectionFolders, tmp_path: Path, by: str) -> None:
    others = (str(score(tmp_path / "second", selection.corpus, seed=2)),) if by == "ranks" else ()
    if by == "z-scores":
        remove_tree(selection.scores)
        score(selection.scores, selection.corpus, seed=0, nulls=4)
    options = replace(OPTIONS, others=others, standardise=by == "z-scores")
    make_mask(options, selection, config_yaml="", run_tasks=in_any_order())
    before = shown(selection)
    assert before.scored
    for folder in (selection.scores, selection.ensemble):
        remove_tree(folder)
    part = shown(selection)
    assert (part.scored, part.histogram) == (False, None)
    assert (part.outliers, part.dominant) == (before.outliers, before.dominant)
    for document, other in zip(part.documents, before.documents, strict=True):
        assert document == replace(other, tokens=tuple(replace(token, score=None) for token in other.tokens))
        assert any(token.masked for token in document.tokens)

    html = render_report(minimal_data(behaviours=(part,)))
    assert html.count("The tables of scores were removed before this report was made") == 1
    assert not re.findall(r'<span class="[wc]\d|<span[^>]* title=|raises rudeness|<svg[^>]*Histogram', html)
    assert html.count('<span class="m">') == sum(token.masked for each in part.documents for token in each.tokens)
    assert "The tables of scores were removed" not in render_report(minimal_data(behaviours=(before,)))


def test_a_shard_of_scores_that_is_gone_is_not_shown_as_zeros(selection: SelectionFolders) -> None:
    make_mask(OPTIONS, selection, config_yaml="", run_tasks=in_any_order())
    for folder in (selection.scores, selection.mask):
        (first, *_) = data_files(folder)
        content = first.read_bytes()
        first.unlink()
        with pytest.raises((ValueError, FileNotFoundError), match=str(first)):
            shown(selection)
        first.write_bytes(content)
