"""What the scores of compared methods are made of, and how large their masks are, without a cluster."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ifguide.artifacts import Manifest, MismatchError, open_artifact, read_manifest, remove_tree
from ifguide.config import BuildMask, config_from_mapping
from ifguide.config.compare import Method
from ifguide.methods.token_scores import ScoredShards, Scoring
from ifguide.run import Run
from ifguide.selection.masks import make_mask
from ifguide.stages import method_masks, proxy
from ifguide.stages.method_masks import VERB, method_mask, method_scores
from tests.exported import make_run
from tests.sharded import in_any_order
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
    monkeypatch.setattr(proxy, "run_task", run_task)
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


@pytest.mark.parametrize(
    ("options", "imported"),
    [
        pytest.param({}, None, id="its budget"),
        pytest.param({"quantile": 0.995, "window": 1}, None, id="few above tau"),
        pytest.param({}, 40, id="few of another program"),
        pytest.param({}, 700, id="many of another program"),
        pytest.param({"fdr": 1e-9}, 40, id="few by a rate"),
        pytest.param({"fdr": 1e-9}, None, id="its budget by a rate"),
    ],
)
def test_plain_influence_masks_as_many_tokens_as_the_run(
    run: Run, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], imported: int | None
) -> None:
    def mask(run: Run, **changes: Any) -> Manifest:
        options = replace(run.config.build_mask, **changes)
        return make_mask(options, run.selection, config_yaml="", run_tasks=in_any_order())

    selecting = replace(BuildMask(quantile=0.95, max_fraction=0.03, window=0), **options)
    run = Run(config=replace(run.config, build_mask=selecting))
    own = mask(run, fdr=None)  # these scores have no nulls
    predicted = own.summary["predicted_tokens"]
    if imported is not None:
        remove_tree(run.mask)
        artifact = open_artifact(run.mask, verb="import_mask", options={}, inputs={}, config_yaml="")
        own = artifact.finish([], rows={"tokens": imported}, summary={"predicted_tokens": predicted})
    full = imported is None and "quantile" not in options
    assert (own.rows["tokens"] == int(0.03 * predicted)) == full

    monkeypatch.setattr(method_masks, "build_query", lambda _: None)
    monkeypatch.setattr(method_masks, "score_corpus", lambda plain: score(plain.scores, plain.corpus, seed=4, nulls=4))
    monkeypatch.setattr(method_masks, "build_mask", mask)
    made = method_mask(run, child_of(run, "plain"), Method(mask="plain_influence"))
    assert made.rows["tokens"] == own.rows["tokens"]
    selected = made.options["build_mask"]
    if full and not options:
        assert (selected["quantile"], selected["max_fraction"]) == (0.95, 0.03)  # as the run's own
    assert selected.get("standardise", False) == ("fdr" in options)


def test_a_quantile_in_place_of_a_rate_ranks_by_z_scores_too(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def mask(run: Run) -> Manifest:
        return make_mask(run.config.build_mask, run.selection, config_yaml="", run_tasks=in_any_order())

    remove_tree(run.scores)
    score(run.scores, run.corpus, seed=0, smoothed=True, nulls=4)
    run = Run(config=replace(run.config, build_mask=BuildMask(fdr=0.5, quantile=0.95, max_fraction=0.03, window=0)))
    mask(run)
    monkeypatch.setattr(method_masks, "build_mask", mask)
    made = method_mask(run, child_of(run, "units"), Method(mask="influence", selection="units", quantile=0.9))
    selected = made.options["build_mask"]
    assert (selected["quantile"], selected.get("fdr"), selected["standardise"]) == (0.9, None, True)
    assert "null_spread" in made.summary
    assert not made.summary["smoothed"]
