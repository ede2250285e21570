"""Mean ranks of several runs' scores: the ranks, the artifact, the mask by it, and what does not fit together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ifguide import schemas
from ifguide.artifacts import (
    MANIFEST,
    MismatchError,
    data_files,
    file_digest,
    open_artifact,
    read_manifest,
    remove_tree,
    write_json,
)
from ifguide.config import OWN, BuildMask, Config, ConfigError, config_from_mapping
from ifguide.influence.score_tables import write_scores
from ifguide.preflight import PreflightError, preflight
from ifguide.report.view import measured_by
from ifguide.run import Run
from ifguide.selection.ensemble import COUNTS, find_ensemble, mean_ranks, write_ranks
from ifguide.selection.folders import SelectionFolders
from ifguide.selection.masks import make_mask
from tests.exported import make_run
from tests.sharded import in_any_order
from tests.tokenizers import tokenizers

TEXTS = [f"the pig saw clown number {i} and said that all was well" + " again" * (i % 5) for i in range(60)]
T = 16
OPTIONS = BuildMask(quantile=0.9, max_fraction=0.08, window=0)


@pytest.fixture
def folders(tmp_path: Path) -> SelectionFolders:
    """A run with a corpus of three shards, and scores of two behaviours."""
    run_dir = make_run(tmp_path / "run", TEXTS, tokenizers()["bytes"], block_size=T, blocks_per_shard=24)
    remove_tree(run_dir / "mask")
    found = Run(config=Config(run_dir=str(run_dir))).selection
    score(found.scores, found.corpus, seed=0, behaviours=(OWN, "rude"), smoothed=True)
    return found


def score(
    folder: Path,
    corpus: Path,
    *,
    seed: int,
    behaviours: tuple[str, ...] = (OWN,),
    smoothed: bool = False,
    nulls: int = 0,
) -> Path:
    """Random scores of a corpus, of heavy tails and a scale of their own; those of the first tokens speak of none."""
    rng = np.random.default_rng(seed)
    manifest = read_manifest(corpus)
    artifact = open_artifact(
        folder, verb="score_corpus", options={}, inputs={"corpus": manifest.fingerprint}, config_yaml="seed: 0\n"
    )
    for path in data_files(corpus):
        ids = schemas.read_table(path).column("block_id")

        own = {name: _drawn(rng, len(ids), seed) for name in behaviours}
        also = {name: _drawn(rng, len(ids), seed) for name in behaviours} if smoothed else {}
        null = {name: [_drawn(rng, len(ids), seed) for _ in range(nulls)] for name in behaviours if nulls}
        write_scores(folder / path.name, ids, own, null, also)
    artifact.finish(data_files(folder), rows={"blocks": manifest.rows["blocks"]}, summary={})
    return folder


def _drawn(rng: np.random.Generator, rows: int, power: int) -> np.ndarray:
    values = 10.0**power * rng.standard_t(3, size=(rows, T))
    values[:, 0] = 5
    return values.astype(np.float32)


def column(folder: Path, name: str) -> np.ndarray:
    return np.concatenate([schemas.per_token_array(schemas.read_table(path), name) for path in data_files(folder)])


def predicted(corpus: Path) -> np.ndarray:
    """Which tokens (N, T) have a prediction."""
    tables = [schemas.read_table(path) for path in data_files(corpus)]
    lengths = np.concatenate([table.column("length").to_numpy() for table in tables])
    return (np.arange(T) >= 1) & (np.arange(T) < lengths[:, None])


def test_ranks_do_not_depend_on_scale_and_equal_scores_share_one() -> None:
    a, b = np.array([-3.0, 0.0, 2.0, 2.0]), np.array([8.0, 1.0, 4.0, 2.0])
    expected = [(0.5 / 4 + 3.5 / 4) / 2, (1.5 / 4 + 0.5 / 4) / 2, (3 / 4 + 2.5 / 4) / 2, (3 / 4 + 1.5 / 4) / 2]
    np.testing.assert_allclose(mean_ranks([a, b]), expected, rtol=1e-6)
    np.testing.assert_array_equal(mean_ranks([1e6 * a, b / 1e6]), mean_ranks([a, b]))
    with pytest.raises(ValueError, match=r"scorings of \[4, 3\] tokens"):
        mean_ranks([a, b[:3]])
    with pytest.raises(ValueError, match="scoring 1 holds a score that is not finite"):
        mean_ranks([a, b * np.nan])


def other_runs(folders: SelectionFolders, place: Path) -> tuple[str, str]:
    """The scores of two other runs: exact ones of one behaviour, and smoothed ones of two."""
    return (
        str(score(place / "second", folders.corpus, seed=2)),
        str(score(place / "third", folders.corpus, seed=3, behaviours=("rude", OWN), smoothed=True)),
    )


def test_the_mask_is_of_the_mean_ranks_and_names_what_they_are_of(folders: SelectionFolders, tmp_path: Path) -> None:
    others = other_runs(folders, tmp_path)
    made = make_mask(replace(OPTIONS, others=others), folders, config_yaml="seed: 0\n", run_tasks=in_any_order(4))

    valid = predicted(folders.corpus)
    places = zip((folders.scores, *map(Path, others)), ("smoothed_score", "token_score", "smoothed_score"), strict=True)
    expected = mean_ranks([column(place, name)[valid] for place, name in places])
    ranks = column(folders.ensemble, "token_score")
    np.testing.assert_array_equal(ranks[valid], expected)
    assert not ranks[~valid].any()
    assert schemas.read_schema(data_files(folders.ensemble)[0]).names == ["block_id", "token_score"]  # not rude: second
    table = schemas.read_table(folders.ensemble / COUNTS)
    assert [sum(table.column(name).to_pylist()) for name in table.column_names] == [valid.sum()] * 3

    assert made.summary["tau"] == np.quantile(expected.astype(np.float64), 0.9)
    masked = column(folders.mask, "masked")
    assert 0 < masked.sum() == made.rows["tokens"]
    assert ranks[masked].min() > made.summary["tau"]
    digests = [read_manifest(Path(other)).fingerprint for other in others]
    named = [{"folder": folder, "fingerprint": digest} for folder, digest in zip(others, digests, strict=True)]
    assert made.summary["ensemble"] == named
    assert [made.inputs["others[0]"], made.inputs["others[1]"]] == digests
    assert made.inputs["scores"] == read_manifest(folders.scores).fingerprint
    assert made.options["build_mask"]["others"] == list(others)
    assert measured_by(made.summary, folders.ensemble).columns == ("token_score",)


def test_all_behaviours_that_the_runs_share_are_ranked(folders: SelectionFolders, tmp_path: Path) -> None:
    options = replace(OPTIONS, behaviour="rude", smoothed=False, others=other_runs(folders, tmp_path)[1:])
    make_mask(options, folders, config_yaml="", run_tasks=in_any_order())
    names = ["token_score", "token_score.rude"]
    assert schemas.read_schema(data_files(folders.ensemble)[0]).names == ["block_id", *names]
    valid = predicted(folders.corpus)
    for name in names:
        scorings = [column(place, name)[valid] for place in (folders.scores, Path(options.others[0]))]
        np.testing.assert_array_equal(column(folders.ensemble, name)[valid], mean_ranks(scorings))
    second = replace(options, others=other_runs(folders, tmp_path / "again")[:1])
    with pytest.raises(
        ConfigError, match=r"build_mask.behaviour: 'rude' is not in .*second, others\[0\], which holds own"
    ):
        make_mask(second, folders, config_yaml="", run_tasks=in_any_order())
    with pytest.raises(ConfigError, match=r"build_mask.smoothed: .*second has no smoothed scores"):
        find_ensemble(replace(second, behaviour=OWN, smoothed=True), folders)


def test_bytes_are_the_same_in_any_order_and_after_an_interruption(folders: SelectionFolders, tmp_path: Path) -> None:
    options = replace(OPTIONS, others=other_runs(folders, tmp_path))
    made = make_mask(options, folders, config_yaml="", run_tasks=in_any_order(0))
    kept = read_manifest(folders.ensemble).fingerprint
    again = replace(folders, **{name: tmp_path / "again" / name for name in ("ensemble", "ranking", "mask")})

    def interrupted(function: Callable[..., Any], calls: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
        if function is write_ranks:
            write_ranks(*next(iter(calls)))
            raise KeyboardInterrupt
        return in_any_order(3)(function, calls)

    with pytest.raises(KeyboardInterrupt):
        make_mask(options, again, config_yaml="", run_tasks=interrupted)
    assert not (again.ensemble / MANIFEST).exists()
    assert make_mask(options, again, config_yaml="", run_tasks=in_any_order(7)).fingerprint == made.fingerprint
    assert read_manifest(again.ensemble).fingerprint == kept
    remove_tree(again.mask)  # the ensemble is complete, and is left alone
    assert make_mask(options, again, config_yaml="", run_tasks=in_any_order(8)).fingerprint == made.fingerprint
    with pytest.raises(MismatchError, match="others"):
        make_mask(replace(options, others=options.others[:1]), again, config_yaml="", run_tasks=in_any_order())


def test_a_ranking_that_is_made_again_leaves_no_scratch(folders: SelectionFolders) -> None:
    first = make_mask(OPTIONS, folders, config_yaml="", run_tasks=in_any_order())
    remove_tree(folders.ranking)
    assert make_mask(OPTIONS, folders, config_yaml="", run_tasks=in_any_order()).fingerprint == first.fingerprint
    assert not (folders.mask / "scratch").exists()


def test_a_shard_that_has_changed_is_named(folders: SelectionFolders, tmp_path: Path) -> None:
    options = replace(OPTIONS, others=other_runs(folders, tmp_path))
    path = Path(options.others[1]) / "shard-00001.parquet"
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(bytes(damaged))
    with pytest.raises(ValueError, match=rf"{path} has changed since it was made"):
        make_mask(options, folders, config_yaml="", run_tasks=in_any_order())
    assert not (folders.mask / MANIFEST).exists()


def test_a_damaged_ensemble_is_named_with_the_verb_that_makes_it(folders: SelectionFolders, tmp_path: Path) -> None:
    options = replace(OPTIONS, others=other_runs(folders, tmp_path)[:1])
    make_mask(options, folders, config_yaml="", run_tasks=in_any_order())
    remove_tree(folders.mask)
    path = folders.ensemble / "shard-00001.parquet"
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(bytes(damaged))
    with pytest.raises(
        ValueError, match=rf"{path} has changed .*; delete {folders.ensemble} and run `ifguide build_mask`"
    ):
        make_mask(options, folders, config_yaml="", run_tasks=in_any_order())


def test_a_score_that_is_not_finite_is_named_with_its_file(folders: SelectionFolders, tmp_path: Path) -> None:
    folder = score(tmp_path / "second", folders.corpus, seed=2)
    path = data_files(folder)[1]
    values = column(folder, "token_score")[24:48]
    values[3, 2] = np.nan
    schema = schemas.scores(T)
    arrays = [pa.array(np.arange(24, 48)), schemas.per_token_column(values, schema, "token_score")]
    manifest = read_manifest(folder)
    pq.write_table(pa.Table.from_arrays(arrays, schema=schema), path)
    manifest.files[path.name] = {"sha256": file_digest(path), "bytes": path.stat().st_size}
    write_json(folder / MANIFEST, asdict(manifest))
    with pytest.raises(ValueError, match=rf"{path}: block 27 has score nan at index 2"):
        make_mask(replace(OPTIONS, others=(str(folder),)), folders, config_yaml="", run_tasks=in_any_order())


def test_scores_that_do_not_fit_are_refused_before_any_work(folders: SelectionFolders, tmp_path: Path) -> None:
    def refused(*others: str | Path) -> str:
        options = replace(OPTIONS, others=tuple(map(str, others)))
        with pytest.raises((ConfigError, MismatchError)) as error:
            make_mask(options, folders, config_yaml="", run_tasks=in_any_order())
        assert not folders.mask.exists()
        assert not folders.ensemble.exists()
        return str(error.value)

    second = score(tmp_path / "second", folders.corpus, seed=2)
    nowhere, run_dir = tmp_path / "nowhere", folders.corpus.parent
    assert refused(nowhere).startswith(f"build_mask.others[0]: {nowhere} holds no finished scores; name the scores/")
    assert refused(second, run_dir).startswith(f"build_mask.others[1]: {run_dir} holds no finished scores")
    corpus = folders.corpus
    assert f"build_mask.others[0]: {corpus} holds no token scores, but what pack_corpus made" in refused(corpus)
    assert f"others[0]: {folders.scores} holds the same scores as {folders.scores}" in refused(folders.scores)
    assert f"build_mask.others[1]: {second} holds the same scores as others[0], {second}" in refused(second, second)

    # The same texts in another tokenizer are another corpus.
    other = make_run(tmp_path / "other", TEXTS, tokenizers()["unigram"], block_size=T, blocks_per_shard=24)
    foreign = score(other / "scores", other / "corpus", seed=5)
    told = refused(second, foreign)
    assert f"the corpus of build_mask.others[1], {foreign} ({read_manifest(other / 'corpus').fingerprint[:16]})" in told
    assert f"others[0], {second} ({read_manifest(corpus).fingerprint[:16]})" in told
    assert "one corpus, in one tokenizer" in told
    assert f"is not {corpus} ({read_manifest(corpus).fingerprint[:16]})" in refused(foreign)

    config = {"run_dir": str(run_dir), "build_mask": {"others": [str(nowhere), str(second), str(foreign)]}}
    with pytest.raises(PreflightError) as error:
        preflight(config_from_mapping(config), ["build_mask"])
    first, last = error.value.faults
    assert (first.key, last.key) == ("build_mask.others[0]", "build_mask.others[2]")
    assert "holds no finished scores" in first.text
    assert "one corpus, in one tokenizer" in last.text
    config["run_dir"] = str(tmp_path / "not_yet")
    config["build_mask"]["others"] = [str(second)]
    (left,) = preflight(config_from_mapping(config), ["build_mask"])
    place = tmp_path / "not_yet" / "corpus"
    assert str(left) == f'build_mask.others = ["{second}"]: whether they are of {place}, which is not packed yet'


@pytest.mark.parametrize(("key", "value"), [("fdr", 0.1), ("standardise", True)])
def test_z_scores_of_mean_ranks_are_refused(key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"build_mask.{key}: z-scores are of one run's scores against its nulls"):
        config_from_mapping({"build_mask": {"others": ["a/scores"], key: value}})


def test_without_others_nothing_is_different(folders: SelectionFolders) -> None:
    """What was made before there were ensembles still fits."""
    made = make_mask(OPTIONS, folders, config_yaml="", run_tasks=in_any_order())
    assert "others" not in made.options["build_mask"]
    assert "ensemble" not in made.summary
    assert made.inputs.keys() == {"corpus", "scores"}
    assert not folders.ensemble.exists()
