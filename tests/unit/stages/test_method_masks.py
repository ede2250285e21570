"""What the scores of compared methods are made of, and how large their masks are, without a cluster."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ifguide.artifacts import Manifest, MismatchError, open_artifact, read_manifest, remove_tree
from ifguide.config import config_from_mapping
from ifguide.methods.token_scores import ScoredShards, Scoring
from ifguide.run import Run
from ifguide.stages import method_masks
from ifguide.stages.method_masks import VERB, method_scores
from tests.exported import make_run
from tests.tiny import ARCHITECTURES
from tests.tokenizers import tokenizers
from tests.unit.selection.test_ensemble import TEXTS, T, score

COLUMN = "smoothed_score"


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A run with a corpus and scores, as another program may have made them, and no query."""
    tokenizer = tokenizers()["bytes"]
    run_dir = make_run(tmp_path / "run", TEXTS, tokenizer, block_size=T, blocks_per_shard=24)
    remove_tree(run_dir / "mask")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    score(run_dir / "scores", run_dir / "corpus", seed=0, smoothed=True)
    architecture = {**ARCHITECTURES["gpt_neox"], "vocab_size": len(tokenizer)}
    tree = {"run_dir": str(run_dir), "tokenizer": str(tmp_path / "tokenizer"), "pack_corpus": {"block_size": T}}
    return Run(config=config_from_mapping({**tree, "proxy": {"architecture": architecture}}))


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Scoring]:
    """How a corpus was scored, each time that it would be."""
    scorings: list[Scoring] = []

    def score_tokens(scoring: Scoring, *_: Any, **__: Any) -> ScoredShards:
        scorings.append(scoring)
        return ScoredShards(rows={"blocks": 1}, summary={}, files={})

    def run_task(function: Callable[..., Any], *arguments: Any, resources: object) -> Any:
        return function(*arguments)

    monkeypatch.setattr(method_masks, "connect", lambda _: None)
    monkeypatch.setattr(method_masks, "run_task", run_task)
    monkeypatch.setattr(method_masks, "score_tokens", score_tokens)
    return scorings


def child_of(run: Run, name: str) -> Run:
    return Run(config=replace(run.config, run_dir=str(run.comparison / name))).borrow(run, "corpus")


def put_as_before(run: Run, child: Run, like: Manifest, **changes: str) -> Manifest:
    """A finished artifact of scores whose inputs name a query and its proxy, too."""
    inputs = {**like.inputs, "query": "a query", "proxy": "its proxy", **changes}
    artifact = open_artifact(child.scores, verb=VERB, options=like.options, inputs=inputs, config_yaml="")
    return artifact.finish([], rows={}, summary={})


def test_words_by_influence_are_of_the_scores_alone(run: Run, made: list[Scoring]) -> None:
    manifest = method_scores(run, child_of(run, "words"), "influence_words")
    scores = read_manifest(run.scores).fingerprint
    assert manifest.inputs == {"corpus": read_manifest(run.corpus).fingerprint, "scores": scores}
    (scoring,) = made
    assert scoring.scored is not None
    assert (scoring.scored.scores, scoring.scored.column) == (run.scores, COLUMN)

    before = put_as_before(run, child := child_of(run, "before"), manifest)
    assert method_scores(run, child, "influence_words") == before
    put_as_before(run, child := child_of(run, "others"), manifest, scores="others")
    with pytest.raises(MismatchError, match=r'scores was "others", now'):
        method_scores(run, child, "influence_words")
    assert len(made) == 1


def test_a_probe_of_spans_wants_the_proxy_and_no_query(run: Run, made: list[Scoring]) -> None:
    manifest = method_scores(run, child_of(run, "spans"), "span_probe")
    assert manifest.inputs == {
        "corpus": read_manifest(run.corpus).fingerprint,
        "proxy": made[0].proxy_fingerprint,
    }
    assert len(made[0].proxy_fingerprint) == 64
    before = put_as_before(run, child := child_of(run, "before"), manifest, proxy=made[0].proxy_fingerprint)
    assert method_scores(run, child, "span_probe") == before
    put_as_before(run, child := child_of(run, "others"), manifest)
    with pytest.raises(MismatchError, match=r'proxy was "its proxy", now'):
        method_scores(run, child, "span_probe")
    # The proxy of a query is taken at its word.
    query = open_artifact(run.query, verb="build_query", options={}, inputs={"proxy": "a digest"}, config_yaml="")
    query.finish([], rows={}, summary={})
    assert method_scores(run, child_of(run, "queried"), "span_probe").inputs["proxy"] == "a digest"


@pytest.mark.parametrize("kind", ["ngrams", "probe", "excess_loss"])
def test_what_learns_from_the_queries_asks_for_them(run: Run, made: list[Scoring], kind: str) -> None:
    with pytest.raises(FileNotFoundError, match="run `ifguide build_query` first"):
        method_scores(run, child_of(run, kind), kind)
    assert not made
