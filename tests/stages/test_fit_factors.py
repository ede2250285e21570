"""`fit_factors`: the same factors however they are partitioned, and only what is missing is fitted again."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from bench.chaos import prepare
from ifguide.artifacts import read_manifest
from ifguide.config import config_from_mapping, load_config, to_mapping
from ifguide.distributed.ledger import LEDGER
from ifguide.distributed.shards import StageError
from ifguide.influence.factors import EXPORTED
from ifguide.pipeline import stage
from ifguide.run import Run
from ifguide.stages.fit_factors import VERB, WORK


@pytest.fixture(scope="module")
def packed(cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A packed corpus and a proxy."""

    def run_verb(run_dir: Path, verb: str) -> None:
        stage(verb)(Run(config=load_config(run_dir / "config.yaml")))

    run_dir = prepare(tmp_path_factory.mktemp("factors") / "run", run_verb, 100)
    return Run(config=load_config(run_dir / "config.yaml"))


def copy_of(packed: Run, folder: Path, **options: Any) -> Run:
    shutil.copytree(packed.corpus, folder / "corpus")
    fit = {"sample_blocks": 24, "data_partitions": 2, "resources": {"gpus": 0}, **options}
    return Run(config=config_from_mapping({**to_mapping(packed.config), "run_dir": str(folder), "fit_factors": fit}))


@pytest.mark.slow
def test_module_partitions_and_an_interrupted_run_change_no_byte(packed: Run, tmp_path: Path) -> None:
    whole, parts = (copy_of(packed, tmp_path / str(count), module_partitions=count) for count in (1, 3))
    stage("fit_factors")(whole)
    blocked = parts.factors / WORK / "modules"
    inputs = read_manifest(whole.factors).inputs
    parts.open(parts.factors, VERB, keys=("fit_factors", "seed"), inputs=inputs)
    blocked.parent.mkdir()
    blocked.write_text("a file where the eigendecompositions' folder should be")
    with pytest.raises(StageError, match=r"eigen-00000"):
        stage("fit_factors")(parts)
    assert len(list(blocked.parent.glob("*_module_partition*"))) == 2 * 3 * 4
    assert len(list((parts.factors / LEDGER).glob("covariance-*.json"))) == 2 * 3  # not fitted again
    blocked.unlink()
    manifest = stage("fit_factors")(parts)
    assert manifest.rows == read_manifest(whole.factors).rows
    for name in EXPORTED:
        one, other = ((run.factors / f"{name}.safetensors").read_bytes() for run in (whole, parts))
        assert one == other, name
    assert not blocked.parent.exists()
