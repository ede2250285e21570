"""What a page shows of a behaviour, from the artifacts of a selection: made here by tasks without a cluster."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from ifguide.artifacts import data_files, remove_tree
from ifguide.report.contents import Behaviour, RankedDocument, ScoreHistogram, Token
from ifguide.report.data import Selected, _behaviour
from ifguide.report.page import LEVELS, MIDDLE_RANK, colour_ramp, render_report
from ifguide.report.view import View
from ifguide.selection.folders import SelectionFolders
from ifguide.selection.masks import make_mask
from tests.sharded import in_any_order
from tests.tokenizers import tokenizers
from tests.unit.report.sample_report import minimal_data
from tests.unit.report.test_report import Page
from tests.unit.selection.test_ensemble import OPTIONS, folders, score  # noqa: F401  # a fixture

KEYS = ("key", "keys", "k")  # spans that are no tokens


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


def test_ranks_have_their_middle_and_are_not_said_to_raise_or_lower() -> None:
    tokens = tuple(Token(text=f"{rank} ", score=rank) for rank in (0.99, 0.6, 0.5, 0.4, 0.01, None))
    document = RankedDocument(doc_id=7, source="s", rank=1, rank_score=0.1, tokens=tokens)
    histogram = ScoreHistogram(
        bin_edges=(0.0, 1.0), counts=(5,), tau=0.98, measure="mean rank in the scores of 2 runs", ranks=True
    )
    part = Behaviour(name="rudeness", histogram=histogram, documents=(document,))
    page = Page(render_report(minimal_data(behaviours=(part,))))
    spans = [attributes for tag, attributes in page.tags if tag == "span" and attributes.get("class") not in KEYS]
    assert [span.get("class") for span in spans] == [f"w{LEVELS}", "w3", None, "c3", f"c{LEVELS}", None]
    assert [span.get("title") for span in spans] == ["0.99", "0.6", "0.5", "0.4", "0.01", None]
    text = " ".join(page.text.split())
    assert "A score is the mean rank in the scores of 2 runs, from 0 to 1: a token makes rudeness more" in text
    assert "A score above 0" not in text
    assert "raises rudeness" not in text
    assert "ranks above the middle" in text
    signed = replace(part, histogram=replace(histogram, measure="z-score", ranks=False))
    text = " ".join(Page(render_report(minimal_data(behaviours=(signed,)))).text.split())
    assert "A score above 0 means that training on the token makes rudeness more likely." in text
    assert "raises rudeness lowers it" in text


def test_each_behaviour_has_its_own_full_colour() -> None:
    def part(name: str, scale: float) -> Behaviour:
        tokens = tuple(Token(text=f"{share} ", score=share * scale) for share in (1.0, -0.2))
        document = RankedDocument(doc_id=7, source="s", rank=1, rank_score=0.1, tokens=tokens)
        return Behaviour(name=name, documents=(document,))

    html = render_report(minimal_data(behaviours=(part("rudeness", 4.0), part("flattery", 1e-3))))
    spans = [attributes for tag, attributes in Page(html).tags if tag == "span" and "title" in attributes]
    assert [span["class"] for span in spans] == [f"w{LEVELS}", "c3"] * 2
