"""What `compare` refuses before anything is trained, without a cluster."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from ifguide import schemas
from ifguide.artifacts import open_artifact
from ifguide.config import ConfigError, config_from_mapping
from ifguide.preflight import PreflightError, preflight
from ifguide.run import Run
from ifguide.stages.compare import compare


def run_of(folder: Path, **changes: Any) -> Run:
    tree = {
        "run_dir": str(folder),
        "evaluate": {"prompts": "prompts.jsonl", "classifier": "alt-profanity-check"},
        "compare": {"methods": {"random": {"mask": "random"}}},
    }
    return Run(config=config_from_mapping({**tree, **changes}))


def put(folder: Path, verb: str) -> None:
    open_artifact(folder, verb=verb, options={}, inputs={}, config_yaml="").finish([], rows={}, summary={})


def refusals(run: Run) -> list[str]:
    """What the preflight of `compare` says; `compare` itself refuses what it does."""
    try:
        preflight(run.config, ["compare"])
    except PreflightError as error:
        with pytest.raises(ConfigError):
            compare(run, dry_run=True)
        return [str(fault) for fault in error.faults]
    compare(run, dry_run=True)
    return []


def test_a_run_without_a_plain_model_is_refused(tmp_path: Path) -> None:
    run = run_of(tmp_path, baseline=False, proxy=str(tmp_path))
    expected = "compare sets models beside the plain one; set baseline: true"
    assert refusals(run) == [f"baseline = false: {expected}"]
    with pytest.raises(ConfigError, match=f"^baseline: {expected}$"):
        compare(run)
    put(run.model("baseline"), "pretrain")
    assert refusals(run) == []
    assert refusals(run_of(tmp_path / "another")) == []


def put_scores(folder: Path, verb: str, *, smoothed: bool = False) -> None:
    artifact = open_artifact(folder, verb=verb, options={}, inputs={}, config_yaml="")
    pq.write_table(schemas.scores(4, smoothed=smoothed).empty_table(), folder / "shard-00000.parquet")
    artifact.finish([folder / "shard-00000.parquet"], rows={}, summary={})


METHODS: dict[str, dict[str, Any]] = {
    **{mask: {"mask": mask} for mask in ("ngrams", "probe", "excess_loss", "plain_influence", "random", "influence")},
    **{mask: {"mask": mask} for mask in ("exact", "smoothed", "influence_words")},
    **{selection: {"mask": "influence", "selection": selection} for selection in ("tokens", "units")},
}
LEFT_OUT = "which a run leaves out after an import; make it by `ifguide {}`, or choose another mask"
OF_QUERY = {mask: f"needs query/, {LEFT_OUT.format('build_query')}" for mask in ("ngrams", "probe", "excess_loss")}
OF_FACTORS = {"plain_influence": f"needs factors/, {LEFT_OUT.format('fit_factors')}"}
EXACT = {"smoothed": "needs smoothed scores, and those that are there are exact ones; choose another mask"}
OF_SCORES = {
    name: f"needs scores/, {LEFT_OUT.format('score_corpus')}"
    for name in ("exact", "smoothed", "influence_words", "tokens", "units")
}


def refused(run: Run) -> dict[str, str]:
    """What is said of each method."""
    said = {}
    for fault in refusals(run):
        name, _, text = fault.removeprefix("compare.methods.").partition(" = ")
        mask = METHODS[name]["mask"]
        said[name] = text.partition(f"compare.methods.{name}.mask: {mask} ")[2]
    return said


def test_methods_that_need_what_an_import_leaves_out_are_refused(tmp_path: Path) -> None:
    run = run_of(tmp_path, compare={"methods": METHODS})
    assert refused(run) == {}  # the run will have made all of it
    put_scores(run.scores, "import_scores")
    assert refused(run) == OF_QUERY | OF_FACTORS | EXACT
    assert "smoothed" in refused(run_of(tmp_path, compare={"methods": METHODS}, score_corpus={"smooth": None}))
    put(run.query, "build_query")
    assert refused(run) == OF_FACTORS | EXACT
    put(run.factors, "fit_factors")
    assert refused(run) == EXACT


def test_so_are_those_that_need_the_scores_of_an_imported_mask(tmp_path: Path) -> None:
    run = run_of(tmp_path, compare={"methods": METHODS})
    put(run.mask, "import_mask")
    assert refused(run) == OF_QUERY | OF_FACTORS | OF_SCORES
    given = {"build_query": {"factors": "kronfluence"}}
    assert refused(run_of(tmp_path, compare={"methods": METHODS}, **given)) == OF_QUERY | OF_SCORES
    for folder in (run.query, run.factors):
        put(folder, "made")
    put_scores(run.scores, "score_corpus", smoothed=True)
    assert refused(run) == {}
    ensemble = "needs ensemble/, which a run leaves out after an import; choose another mask"
    others = run_of(tmp_path, compare={"methods": METHODS}, build_mask={"others": ["another"]})
    assert refused(others) == {"influence_words": ensemble, "tokens": ensemble}
    put(run.ensemble, "build_mask")
    assert refused(others) == {}


def test_a_mask_by_what_imported_scores_lack_is_refused_before_the_plain_model_is_trained(tmp_path: Path) -> None:
    for options, missing in (
        ({"fdr": 0.1}, "build_mask.fdr: .* no null scores of 'own'; unset it, or set build_query.nulls"),
        ({"standardise": True}, "build_mask.standardise: .* no null scores of 'own'"),
        ({"smoothed": True}, "build_mask.smoothed: .* has no smoothed scores"),
    ):
        run = run_of(tmp_path, build_mask=options, build_query={"nulls": 4})
        preflight(run.config, ["build_mask"])
        put_scores(run.scores, "import_scores")
        with pytest.raises(PreflightError, match=missing):
            preflight(run.config, ["build_mask"])
        shutil.rmtree(run.scores)
