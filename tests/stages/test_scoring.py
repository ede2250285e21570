"""`score_corpus`: its self-check, and further behaviours as columns."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from ifguide import schemas
from ifguide.artifacts import data_files, read_manifest
from ifguide.config import OWN, Config
from ifguide.influence import decision
from ifguide.influence.products import bfloat16_pays
from ifguide.pipeline import stage
from ifguide.run import Run


def test_the_self_check_stands_in_the_manifest(finished: Config) -> None:
    summary = read_manifest(Run(config=finished).scores).summary
    precision = "bfloat16" if bfloat16_pays(torch.device("cpu")) else "float32"
    assert summary["method"] == {"engine": "difference", "precision": precision, "rank": None, "fused": False}
    assert summary["check"]["correlation"] > 0.99
    assert summary["check"]["tokens"] > 100
    assert summary["shards_with_halved_micro_batch"] == []


def test_a_method_that_disagrees_is_stopped_with_advice(copied: Callable[..., Config]) -> None:
    config = copied(drop=("scores",), score_corpus__rank=1, score_corpus__min_agreement=0.999)
    with pytest.raises(Exception, match=r"raise score_corpus\.rank"):
        stage("score_corpus")(Run(config=config))
    assert not data_files(Run(config=config).scores)


def test_further_queries_are_columns(finished: Config, copied: Callable[..., Config]) -> None:
    query = str(Run(config=finished).query)
    config = copied(drop=("scores",), score_corpus__queries={"again": query}, score_corpus__precision="bfloat16")
    manifest = stage("score_corpus")(Run(config=config))
    assert manifest.inputs["query.again"] == manifest.inputs["query"]
    for path in data_files(Run(config=config).scores):
        table = schemas.read_table(path)
        own, again = (schemas.per_token_array(table, schemas.score_column(name)) for name in (OWN, "again"))
        np.testing.assert_allclose(own, again, atol=1e-5 * np.abs(own).max())


@pytest.mark.parametrize("pays", [True, False])
def test_the_preset_takes_bfloat16_only_where_it_pays(
    finished: Config, monkeypatch: pytest.MonkeyPatch, pays: bool
) -> None:
    monkeypatch.setattr(decision, "bfloat16_pays", lambda device: pays)
    config, run = replace(finished.score_corpus, precision=None, check_blocks=0), Run(config=finished)
    made, _ = decision.decide(config, run.proxy_source, [run.query], run.corpus, data_files(run.corpus)[0].name)
    assert made.method.precision == ("bfloat16" if pays else "float32")
