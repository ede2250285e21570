"""What a page shows of a behaviour, from the artifacts of a selection: made here by tasks without a cluster."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from ifguide.report.contents import Behaviour
from ifguide.report.data import Selected, _behaviour
from ifguide.report.page import MIDDLE_RANK, colour_ramp
from ifguide.report.view import View
from ifguide.selection.folders import SelectionFolders
from ifguide.selection.masks import make_mask
from tests.sharded import in_any_order
from tests.tokenizers import tokenizers
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
