"""A dry run says what is there already, and refuses what was made with other options."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ifguide.artifacts import Manifest, MismatchError, open_artifact, standing
from ifguide.config import Config, config_from_mapping, result_options
from ifguide.config.pretrain import MaskedLoss
from ifguide.pipeline import run_stage
from ifguide.run import Run


def config_of(folder: Path, block_size: int = 16, **changes: Any) -> Config:
    tree = {"run_dir": str(folder), "tokenizer": "t", "pack_corpus": {"block_size": block_size, "inputs": ["a.jsonl"]}}
    return config_from_mapping({**tree, **changes})


def test_a_folder_is_complete_begun_or_not_there(tmp_path: Path) -> None:
    folder, options = tmp_path / "corpus", result_options(config_of(tmp_path), ["pack_corpus"])
    assert standing(folder, options) is None
    given = {**options, "files": {"a.jsonl": "digest"}}
    artifact = open_artifact(folder, verb="pack_corpus", options=given, inputs={"x": "y"}, config_yaml="")
    assert standing(folder, options) == "begun"
    artifact.finish([], rows={}, summary={})
    assert standing(folder, options) == "complete"
    with pytest.raises(MismatchError, match=r"pack_corpus\.block_size was 16, now 32"):
        standing(folder, result_options(config_of(tmp_path, 32), ["pack_corpus"]))


def test_a_dry_run_leaves_out_what_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(config=config_of(tmp_path))
    run.open(run.corpus, "pack_corpus", inputs={}).finish([], rows={}, summary={})
    lines: list[str] = []
    monkeypatch.setattr("ifguide.pipeline.log", lambda verb, text: lines.append(text))
    run_stage("pack_corpus", run, dry_run=True)
    (line,) = lines
    assert f"{tmp_path / 'corpus'} is complete" in line
    with pytest.raises(MismatchError, match="block_size was 16, now 32"):
        run_stage("pack_corpus", Run(config=config_of(tmp_path, 32)), dry_run=True)


@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize(
    ("verb", "change", "reason"),
    [
        ("pack_corpus", {"tokenizer": "u"}, 'tokenizer was "t", now "u"'),
        ("fit_factors", {"seed": 3}, "seed was 0, now 3"),
        ("build_query", {"tokenizer": "u"}, 'tokenizer was "t", now "u"'),
        ("pretrain", {"target": {"architecture": {"model_type": "gpt2"}}}, "target.architecture.model_type was "),
        ("evaluate", {"seed": 3}, "seed was 0, now 3"),
    ],
)
def test_a_dry_run_refuses_whatever_the_verb_would(
    tmp_path: Path, verb: str, change: dict[str, Any], reason: str, finished: bool
) -> None:
    run = Run(config=config_of(tmp_path))
    artifact = run.open(run.made_by(verb), verb, inputs={})
    if finished:
        artifact.finish([], rows={}, summary={})
    other = Run(config=config_of(tmp_path, **change))
    for refuse in (
        lambda: run_stage(verb, other, dry_run=True),
        lambda: other.open(other.made_by(verb), verb, inputs={}),
    ):
        with pytest.raises(MismatchError, match=reason):
            refuse()


def test_what_another_program_made_differs_by_what_is_asked_for_alone(tmp_path: Path) -> None:
    open_artifact(tmp_path / "scores", verb="other", options={"file": "f"}, inputs={}, config_yaml="")
    with pytest.raises(MismatchError, match="was made from something else: seed was null, now 3"):
        standing(tmp_path / "scores", {"seed": 3})


def test_a_baseline_depends_on_nothing_that_masked_tokens_carry(tmp_path: Path) -> None:
    """Those that were made before, with a plan that holds it, neither."""
    config = config_of(tmp_path, pretrain={"use_mask": False, "penalty": 0.5})
    run, other = (Run(config=replace(config, pretrain=replace(config.pretrain, penalty=p))) for p in (0.5, 2.0))
    assert run.options("pretrain") == other.options("pretrain")
    assert run.with_mask(True).options("pretrain") != other.with_mask(True).options("pretrain")
    open_artifact(
        run.made_by("pretrain"),
        verb="pretrain",
        options=result_options(run.config, ["pretrain", "target", "seed"]),
        inputs={},
        config_yaml="",
    )
    other.open(other.made_by("pretrain"), "pretrain", inputs={}).finish([], rows={}, summary={})
    ignoring = replace(other.config.pretrain, objective=MaskedLoss(kind="ignore"))
    for changed in (run, other, Run(config=replace(config, pretrain=ignoring))):
        assert changed.open(changed.made_by("pretrain"), "pretrain", inputs={}).manifest
        assert standing(changed.made_by("pretrain"), changed.options("pretrain")) == "complete"
    longer = Run(config=replace(config, pretrain=replace(config.pretrain, epochs=9.0)))
    with pytest.raises(MismatchError, match=r"something else: pretrain\.epochs was 4.0, now 9.0\. Set"):
        standing(longer.made_by("pretrain"), longer.options("pretrain"))


READ = {"models": {"given": "m"}, "word_list": ["pig"], "max_new_tokens": 3, "bootstrap_samples": 200}
UNREAD = {"top_documents": 3, "heldout": ["h.jsonl"], "continuations": 2, "classifiers": {"more": "words:w"}}


@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize("before", [False, True])
def test_analyses_are_of_what_they_read_of_evaluate_alone(tmp_path: Path, finished: bool, before: bool) -> None:
    def run_of(**evaluate: Any) -> Run:
        return Run(config=config_of(tmp_path, evaluate=evaluate))

    def open_again(**evaluate: Any) -> Manifest | None:
        run = run_of(**evaluate)
        standing(run.analyses, run.options("analyse"))
        return run.open(run.analyses, "analyse", inputs={"query": "q"}).manifest

    first = run_of()
    whole = {"evaluate": result_options(first.config, ["evaluate"])["evaluate"]}  # as it was recorded before
    artifact = first.open(first.analyses, "analyse", inputs={"query": "q"}, extra=whole if before else {})
    made = artifact.finish([], rows={}, summary={}) if finished else None
    assert open_again() == made
    for key, value in UNREAD.items():
        assert open_again(**{key: value}) == made
    for key, value in (READ | {"classifier": "words:w"}).items():
        with pytest.raises(MismatchError, match=rf"evaluate\.{key}"):
            open_again(**{key: value})


@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize(
    ("verb", "section", "unread", "read"),
    [
        ("score_corpus", {}, {"min_agreement": 0.5}, {"check_blocks": 9}),
        ("score_corpus", {}, {"audit_fraction": 0.2, "recheck_fraction": 0.5}, {"smooth": None}),
        ("score_corpus", {"scorer": "cascade"}, {"smooth": None, "min_agreement": 0.5}, {"audit_fraction": 0.2}),
        ("score_corpus", {"scorer": "student"}, {"smooth": {"tokens": 9}}, {"recheck_fraction": 0.5}),
        ("fit_student", {"kind": "head"}, {"encoder": {"layers": 1}}, {"kind": "encoder"}),
        ("fit_student", {"kind": "encoder"}, {}, {"encoder": {"layers": 1}}),
    ],
)
def test_what_a_verb_does_not_read_refuses_nothing_that_is_there(
    tmp_path: Path,
    verb: str,
    section: dict[str, Any],
    unread: dict[str, Any],
    read: dict[str, Any],
    finished: bool,
    before: bool,
) -> None:
    """Of those that were made before, with a plan that holds it, neither."""

    def run_of(**changes: Any) -> Run:
        return Run(config=config_of(tmp_path, **{verb: {**section, **changes}}))

    def open_again(**changes: Any) -> Manifest | None:
        run = run_of(**changes)
        standing(run.made_by(verb), run.options(verb))
        return run.open(run.made_by(verb), verb, inputs={}).manifest

    first = run_of()
    whole = result_options(first.config, [verb])[verb]
    if verb == "score_corpus":
        whole["min_agreement"] = 0.9
    artifact = first.open(first.made_by(verb), verb, inputs={}, extra={verb: whole} if before else {})
    made = artifact.finish([], rows={}, summary={}) if finished else None
    for changes in ({}, unread, {"min_agreement": 0.85} if verb == "score_corpus" else {}):
        assert open_again(**changes) == made
    with pytest.raises(MismatchError, match=rf"{verb}\.{next(iter(read))}"):
        open_again(**read)
