"""`build_mask` by its options, and factors and masks from elsewhere in a run."""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from bench.selection_scale import make_run
from ifguide import schemas
from ifguide.artifacts import MANIFEST, PLAN, data_files, file_digest, open_artifact, read_manifest, write_json
from ifguide.cli import main
from ifguide.config import OWN, Config, ConfigError, to_yaml
from ifguide.config.compare import Method
from ifguide.config.resources import Resources
from ifguide.distributed.tasks import run_tasks
from ifguide.influence.score_tables import write_scores
from ifguide.pipeline import stage
from ifguide.report.view import View
from ifguide.run import Run
from ifguide.selection.distributed import select
from ifguide.selection.ensemble import mean_ranks
from ifguide.selection.outliers import distinct_bigram_share
from ifguide.stages.compare import method_run
from ifguide.stages.method_masks import scored_mask
from tests.sharded import in_any_order, read_masks, read_ranking, rules_of, write_shards


def columns(folder: Path, name: str) -> np.ndarray:
    """A per-token column of all shards, (N, T)."""
    return np.concatenate([schemas.per_token_array(schemas.read_table(path), name) for path in data_files(folder)])


def add_behaviour(scores: Path, name: str, function: Callable[[np.ndarray], np.ndarray]) -> None:
    """Score a further behaviour: a function of the run's own scores. The manifest follows."""
    manifest = read_manifest(scores)
    for path in data_files(scores):
        table = schemas.read_table(path)
        exact, smoothed = (schemas.per_token_array(table, name) for name in ("token_score", "smoothed_score"))
        schema = schemas.scores(exact.shape[1], [OWN, name], smoothed=True)
        arrays = [exact, function(exact), smoothed, function(smoothed)]
        columns = [
            schemas.per_token_column(array.astype(np.float32), schema, column)
            for array, column in zip(arrays, schema.names[1:], strict=True)
        ]
        pq.write_table(pa.Table.from_arrays([table.column("block_id"), *columns], schema=schema), path)
        manifest.files[path.name] = {"sha256": file_digest(path), "bytes": path.stat().st_size}
    write_json(scores / MANIFEST, dataclasses.asdict(manifest))


def test_another_behaviour_is_ranked_masked_and_shown_by_its_own_scores(
    copied: Callable[..., Config], capsys: pytest.CaptureFixture[str]
) -> None:
    config = copied(drop=("mask", "ranking"), build_mask__behaviour="opposite")
    run = Run(config=config)
    add_behaviour(run.scores, "opposite", lambda own: -own)
    manifest = stage("build_mask")(run)
    own, masked = columns(run.scores, "smoothed_score"), columns(run.mask, "masked")
    above = -own > manifest.summary["tau"]
    assert (masked & above).sum() > 0
    assert manifest.summary["score_max"] == pytest.approx(-own[:, 1:].min())
    shown = View(run.selection).top_documents(1)[0]
    assert (shown.scores[shown.masked] > manifest.summary["tau"]).any()
    assert main(["inspect", str(run.folder), "--documents", "1"]) == 0
    assert "behaviour opposite" in capsys.readouterr().out


def test_an_unknown_behaviour_is_refused_with_those_there_are(copied: Callable[..., Config]) -> None:
    config = copied(drop=("mask", "ranking"), build_mask__behaviour="rudeness")
    run = Run(config=config)
    add_behaviour(run.scores, "insult", lambda own: own)
    with pytest.raises(
        ConfigError, match=r"build_mask.behaviour: 'rudeness' is not in .*scores, which holds own, insult"
    ):
        stage("build_mask")(run)
    assert not run.mask.exists()


def test_outliers_are_the_blocks_over_the_limits(finished: Config, copied: Callable[..., Config]) -> None:
    # limits that some of these short, much alike blocks are over
    config = copied(
        drop=("mask", "ranking"),
        build_mask__outlier_mass_ratio=1.2,
        build_mask__outlier_bigram_share=0.8,
        build_mask__exclude_repeated=True,
    )
    run = Run(config=config)
    summary = stage("build_mask")(run).summary
    lengths = np.concatenate([schemas.read_table(path).column("length").to_numpy() for path in data_files(run.corpus)])
    index = np.arange(config.pack_corpus.block_size)
    scores = np.where((index >= 1) & (index < lengths[:, None]), columns(run.scores, "smoothed_score"), 0)
    mass = np.abs(scores.astype(np.float64)).sum(axis=1).astype(np.float32)
    share = distinct_bigram_share(columns(run.corpus, "tokens"), lengths)
    high_mass, repeated = mass > 1.2 * np.median(mass.astype(np.float64)), share < 0.8
    assert 0 < high_mass.sum() < len(mass)
    assert 0 < repeated.sum() < len(mass)
    found = pa.concat_tables(
        schemas.read_table(path, schemas.OUTLIERS) for path in data_files(run.ranking, "outliers-*.parquet")
    )
    rows = np.flatnonzero(high_mass | repeated)
    assert found.column("block_id").to_pylist() == rows.tolist()
    assert found.column("high_mass").to_pylist() == high_mass[rows].tolist()
    assert found.column("repeated").to_pylist() == repeated[rows].tolist()
    assert (summary["high_mass_blocks"], summary["repeated_blocks"]) == (high_mass.sum(), repeated.sum())
    assert summary["excluded_blocks"] == summary["repeated_blocks"]
    assert not columns(run.mask, "masked")[repeated].any()
    assert summary["tau"] == read_manifest(Run(config=finished).mask).summary["tau"]


def noisy_scores(scores: Path, folder: Path) -> Path:
    """Scores as another proxy might give them: of another scale, with noise."""
    manifest, rng = read_manifest(scores), np.random.default_rng(0)
    plan = {"verb": "score_corpus", "options": {}, "inputs": manifest.inputs, "config_yaml": ""}
    artifact = open_artifact(folder, **plan)
    for path in data_files(scores):
        table = schemas.read_table(path)
        drawn = []
        for name in ("token_score", "smoothed_score"):
            values = schemas.per_token_array(table, name)
            drawn.append((1e-4 * (values + values.std() * rng.normal(size=values.shape))).astype(np.float32))
        write_scores(folder / path.name, table.column("block_id"), {OWN: drawn[0]}, smoothed={OWN: drawn[1]})
    artifact.finish(data_files(folder), rows=manifest.rows, summary=manifest.summary)
    return folder


def test_scores_of_another_run_are_averaged_by_rank_shown_and_compared(
    finished: Config, copied: Callable[..., Config], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    second = noisy_scores(Run(config=finished).scores, tmp_path / "second")
    config = copied(drop=("mask", "ranking", "report"), build_mask__others=[str(second)])
    run = Run(config=config)
    manifest = stage("build_mask")(run)
    lengths = np.concatenate([schemas.read_table(path).column("length").to_numpy() for path in data_files(run.corpus)])
    index = np.arange(config.pack_corpus.block_size)
    predicted = (index >= 1) & (index < lengths[:, None])
    ranks = columns(run.ensemble, "token_score")
    scorings = [columns(folder, "smoothed_score")[predicted] for folder in (run.scores, second)]
    np.testing.assert_array_equal(ranks[predicted], mean_ranks(scorings))
    masked = columns(run.mask, "masked")
    above = ranks > manifest.summary["tau"]
    assert (masked & above).sum() > 0
    assert manifest.summary["tau"] == pytest.approx(np.quantile(ranks[predicted].astype(np.float64), 0.97))
    assert manifest.inputs["others[0]"] == read_manifest(second).fingerprint
    assert (masked != columns(Run(config=finished).mask, "masked")).any()
    assert stage("build_mask")(run) == manifest

    shutil.rmtree(second)  # what was ranked by stays, and is shown
    shown = View(run.selection).top_documents(1)[0]
    assert (shown.scores[shown.masked] > manifest.summary["tau"]).any()
    assert main(["inspect", str(run.folder), "--documents", "1"]) == 0
    assert "of the mean rank in the scores of 2 runs" in capsys.readouterr().out
    assert main(["status", str(run.folder)]) == 0
    assert any(line.startswith("ensemble") for line in capsys.readouterr().out.splitlines())
    stage("evaluate")(run)
    assert read_manifest(run.ensemble).fingerprint[:12] in (run.report / "index.html").read_text()

    # `influence` is what the run selects by, `smoothed` its own scores alone.
    for name, scores in (("influence", ranks), ("smoothed", columns(run.scores, "smoothed_score"))):
        child = method_run(run, name, method := Method(mask=name, selection="tokens"))
        count = scored_mask(run, child, method).rows["tokens"]
        assert count == masked.sum()
        order = np.argsort(-np.where(predicted, scores, -np.inf).ravel(), kind="stable")
        assert set(np.flatnonzero(columns(child.mask, "masked"))) == set(order[:count])


@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 99),
    cuts=st.sets(st.integers(1, 29), max_size=20),
    cpus=st.sampled_from([0.5, 1.0, 2.0]),
    unit=st.sampled_from(["document", "block"]),
)
def test_any_sharding_on_any_number_of_workers_selects_the_same(
    cluster: None, seed: int, cuts: set[int], cpus: float, unit: str
) -> None:
    rng = np.random.default_rng(seed)
    scores = rng.choice([0.0, 0.1, 0.25, 3.0], size=(30, 8)).astype(np.float32)  # ties everywhere
    ends = np.unique([*rng.integers(1, 239, size=20).tolist(), 239]).tolist()
    documents = list(zip([0, *ends[:-1]], ends, strict=True))
    lengths = np.full(30, 8)
    lengths[-1] = 7
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for name, tasks in (("workers", run_tasks(Resources(cpus=cpus, gpus=0))), ("alone", in_any_order(seed))):
            files = write_shards(Path(folder) / name, scores, lengths, documents, cuts if name == "workers" else ())
            rules = rules_of(Path(folder) / name, quantile=0.6, max_fraction=0.3, unit=unit)
            found.append((select(rules, files, tasks), read_masks(rules).tolist(), read_ranking(rules)))
    (on_workers, masks, ranking), (alone, expected_masks, expected_ranking) = found
    assert (on_workers.tau, masks, ranking) == (alone.tau, expected_masks, expected_ranking)


def test_an_interrupted_run_leaves_no_trace_in_the_next(finished: Config, copied: Callable[..., Config]) -> None:
    config = copied()
    run = Run(config=config)
    expected = [read_manifest(folder).fingerprint for folder in (run.ranking, run.mask)]
    for folder in (run.ranking, run.mask):
        manifest = read_manifest(folder)
        (folder / MANIFEST).unlink()
        write_json(folder / PLAN, {"verb": manifest.verb, "options": manifest.options, "inputs": manifest.inputs})
    (run.mask / "scratch").mkdir()
    for name in ("units-00000", "run-00000", "run-00009", "candidates-00001"):
        (run.mask / "scratch" / f"{name}.parquet").write_bytes(b"of a run that was killed")
    data_files(run.mask)[0].unlink()
    data_files(run.ranking, "ranking-*.parquet")[0].write_bytes(b"old")
    stage("build_mask")(run)
    assert [read_manifest(folder).fingerprint for folder in (run.ranking, run.mask)] == expected
    assert not (run.mask / "scratch").exists()


def test_a_query_from_factors_fitted_elsewhere_is_the_query_of_those_factors(
    finished: Config, copied: Callable[..., Config], tmp_path: Path
) -> None:
    """kronfluence's files alone, without a manifest, under the names that `torch.compile` gives the modules."""
    elsewhere = tmp_path / "factors_elsewhere"
    elsewhere.mkdir()
    for path in Run(config=finished).factors.glob("*.safetensors"):
        save_file({f"_orig_mod.{name}": tensor for name, tensor in load_file(path).items()}, elsewhere / path.name)
    config = copied(drop=("query", "factors"), build_query__factors=str(elsewhere))
    manifest = stage("build_query")(Run(config=config))
    first, second = (load_file(Run(config=each).query / "direction.safetensors") for each in (finished, config))
    assert all((first[name] == second[name]).all() for name in first)
    assert manifest.inputs["factors"] != read_manifest(Run(config=finished).query).inputs["factors"]
    assert stage("build_query")(Run(config=config)).fingerprint == manifest.fingerprint


def test_an_imported_mask_is_trained_with_and_reported(
    finished: Config, copied: Callable[..., Config], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = columns(Run(config=finished).mask, "masked")
    torch.save(torch.from_numpy(before.copy()), tmp_path / "mask.pt")
    config = copied(drop=("mask", "ranking", "model/penalised", "generations", "report"), pretrain__epochs=0.2)
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    rows = columns(Run(config=finished).corpus, "tokens").tolist()
    pq.write_table(pa.table({"input_ids": rows}), tmp_path / "chunks.parquet")
    command = ["import-mask", "--config", str(tmp_path / "config.yaml"), str(tmp_path / "mask.pt")]
    assert main(command) == 1
    assert "--tokens FILE" in capsys.readouterr().err
    assert main([*command, "--tokens", str(tmp_path / "chunks.parquet")]) == 0
    run = Run(config=config)
    np.testing.assert_array_equal(columns(run.mask, "masked"), before)
    model = stage("pretrain")(run)
    assert model.inputs["mask"] == read_manifest(run.mask).fingerprint
    assert stage("evaluate")(run).summary["mask"]["precision"] is not None
    assert main(["inspect", config.run_dir]) == 0
    assert f"imported from {tmp_path / 'mask.pt'}" in capsys.readouterr().out


def test_the_corpus_of_the_selection_bench_is_one_that_the_stage_takes(cluster: None, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 0.05)
    summary = stage("build_mask")(run).summary
    assert summary["tokens_masked"] == summary["token_budget"] > 0
