"""Null directions from the query to the mask: their columns, z-scores of them, a mask by false-discovery rate."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file

from ifguide import schemas
from ifguide.artifacts import MANIFEST, data_files, file_digest, read_manifest, write_json
from ifguide.cli import main
from ifguide.config import OWN, Config, ConfigError
from ifguide.influence.query_file import DIRECTION, QUERIES, read_nulls
from ifguide.pipeline import stage
from ifguide.report.view import View
from ifguide.run import Run
from ifguide.selection.fdr import discoveries, fit_spread, null_variance, standardise
from ifguide.selection.quantiles import high_histogram
from tests.stages.test_build_mask import add_behaviour
from tests.stages.test_evaluate import PLAIN


def predicted(folder: Path, scores: Path, name: str) -> np.ndarray:
    """A column of the scores of all predicted tokens."""
    parts = []
    for path, of_scores in zip(data_files(folder), data_files(scores), strict=True):
        lengths = schemas.read_table(path).column("length").to_numpy()
        values = schemas.per_token_array(schemas.read_table(of_scores), name)
        index = np.arange(values.shape[1])
        parts.append(values[(index >= 1) & (index < lengths[:, None])])
    return np.concatenate(parts)


def test_nulls_are_scored_in_the_same_pass_and_give_a_mask_by_rate(
    finished: Config, copied: Callable[..., Config], capsys: pytest.CaptureFixture[str]
) -> None:
    names = ("query", "scores", "ranking", "mask")
    config = copied(drop=names, build_query__nulls=3, build_mask__fdr=0.5)
    run, before = Run(config=config), Run(config=finished)
    query = stage("build_query")(run)
    assert query.rows == read_manifest(before.query).rows
    for name in (QUERIES, DIRECTION):
        assert (run.query / name).read_bytes() == (before.query / name).read_bytes()
    direction, nulls = load_file(run.query / DIRECTION), read_nulls(run.query)
    assert [null.keys() for null in nulls] == [direction.keys()] * 3
    assert read_nulls(before.query) == []
    assert len({round(norm, 9) for norm in query.summary["null_norm"].values()}) == 3

    stage("score_corpus")(run)
    own = predicted(run.corpus, run.scores, "token_score")
    np.testing.assert_allclose(own, predicted(run.corpus, before.scores, "token_score"), atol=1e-4 * np.abs(own).max())
    columns = schemas.null_columns(schemas.read_schema(data_files(run.scores)[0]), OWN)
    assert columns == tuple(schemas.null_column(OWN, number) for number in range(3))
    nulls_KN = np.stack([predicted(run.corpus, run.scores, name) for name in columns])

    summary = stage("build_mask")(run).summary
    spread = fit_spread(high_histogram(null_variance(nulls_KN)), 3)
    z = standardise(own, nulls_KN, spread)
    found = discoveries(high_histogram(z[0]), high_histogram(z[1:].reshape(-1)), 3, 0.5)
    assert summary["null_spread"] == {"variance": spread.variance, "weight": spread.weight}
    assert summary["tau"] == summary["discoveries"]["threshold"] == found.threshold
    assert summary["discoveries"]["count"] == np.count_nonzero(z[0] > found.threshold)
    assert summary["discoveries"]["rate"] <= 0.5
    shown = View(run.selection).top_documents(1)
    if found.count:  # the page and the terminal show what was ranked by
        assert (shown[0].scores[shown[0].masked] > summary["tau"]).any()
    assert main(["inspect", str(run.folder), "--documents", "1"]) == 0
    assert "tau" in capsys.readouterr().out


def test_z_scores_of_scores_without_nulls_are_refused(copied: Callable[..., Config]) -> None:
    for key, value in (("fdr", 0.1), ("standardise", True)):
        config = copied(drop=("ranking", "mask"), **{f"build_mask__{key}": value})
        with pytest.raises(
            ConfigError, match=rf"build_mask.{key}: .*no null scores of 'own'; unset it, or set build_query.nulls"
        ):
            stage("build_mask")(Run(config=config))


def add_nulls(scores: Path, count: int) -> None:
    """Score the run's own query along `count` nulls: its scores in other orders. The manifest follows."""
    rng, manifest = np.random.default_rng(0), read_manifest(scores)
    for path in data_files(scores):
        table = schemas.read_table(path)
        own = schemas.per_token_array(table, "token_score")
        for number in range(count):
            column = schemas.per_token_column(rng.permuted(own), table.schema, "token_score")
            table = table.append_column(
                table.schema.field("token_score").with_name(schemas.null_column(OWN, number)), column
            )
        pq.write_table(table, path)
        manifest.files[path.name] = {"sha256": file_digest(path), "bytes": path.stat().st_size}
    write_json(scores / MANIFEST, asdict(manifest))


def test_a_behaviour_without_nulls_is_shown_by_its_scores(
    copied: Callable[..., Config], capsys: pytest.CaptureFixture[str]
) -> None:
    config = copied(drop=("report", "ranking", "mask"), build_mask__standardise=True, **PLAIN)
    run = Run(config=config)
    add_behaviour(run.scores, "opposite", lambda own: -own)
    add_nulls(run.scores, 2)
    mask = stage("build_mask")(run)
    assert "null_spread" in mask.summary
    stage("evaluate")(run)
    shown = read_manifest(run.behaviour("opposite").mask)
    assert "null_spread" not in shown.summary
    assert shown.summary["tokens_masked"] > 0
    own, other = json.loads((run.report / "report.json").read_text(encoding="utf-8"))["behaviours"]
    assert (own["plain"], other["plain"]) == (False, True)
    assert (own["histogram"]["measure"], other["histogram"]["measure"]) == (
        "z-score of the influence score",
        "smoothed influence score",
    )
    assert "z-scores need null scores, and it has none" in (run.report / "index.html").read_text(encoding="utf-8")
    assert "opposite: no null scores" in capsys.readouterr().err
