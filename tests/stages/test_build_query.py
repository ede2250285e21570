"""`build_query`: V refined on blocks of the corpus, and what the manifest says of the queries."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench.chaos import prepare
from ifguide.artifacts import MismatchError, read_manifest, write_manifest
from ifguide.config import Pairs, Prompts, config_from_mapping, load_config, to_mapping
from ifguide.influence.query_file import DIRECTION, HELD_OUT, read_queries
from ifguide.pipeline import stage
from ifguide.run import Run
from ifguide.stages import build_query
from ifguide.stages.build_query import PARTIAL, ROWS
from tests.stages.interrupting import interrupted_before


@pytest.fixture(scope="module")
def fitted(cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A packed corpus, a proxy, its factors, and prompts with labels."""

    def run_verb(run_dir: Path, verb: str) -> None:
        stage(verb)(Run(config=load_config(run_dir / "config.yaml")))

    run_dir = prepare(tmp_path_factory.mktemp("query") / "run", run_verb, 100)
    rows = [
        {
            "prompt": {"text": f"Number {i} said that"},
            "continuation": {
                "text": " you are a clown." if i % 3 else " the river ran.",
                "toxicity": 0.5 + i / 32 if i % 3 else 0.0,
            },
        }
        for i in range(16)
    ]
    (run_dir / "prompts.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    no_gpu = {"resources": {"gpus": 0}}
    tree = {
        **to_mapping(load_config(run_dir / "config.yaml")),
        "fit_factors": {"sample_blocks": 8, **no_gpu},
        "build_query": {"prompts": str(run_dir / "prompts.jsonl"), "classifier": "labels", **no_gpu},
    }
    run = Run(config=config_from_mapping(tree))
    stage("fit_factors")(run)
    shutil.rmtree(run.query)
    return run


def of(fitted: Run, **options: Any) -> Run:
    """The run without a query, with other options."""
    shutil.rmtree(fitted.query, ignore_errors=True)
    return Run(config=replace(fitted.config, build_query=replace(fitted.config.build_query, **options)))


def test_a_refined_query_is_resumed_and_recorded(fitted: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = stage("build_query")(of(fitted))
    direction = (fitted.query / DIRECTION).read_bytes()
    assert 0 <= plain.summary["reliability"] <= 1
    judged = plain.summary["reliability_measured"]
    assert (judged["positive"], judged["negative"]) == (10, 6)
    assert "refinement" not in plain.summary
    assert plain.options["build_query"].keys().isdisjoint({"refine_steps", "refine_blocks", "reliability_queries"})
    assert "corpus" not in plain.inputs

    run = of(fitted, refine_steps=2)

    with interrupted_before(monkeypatch, build_query, build_query.judge_queries):
        stage("build_query")(run)
    assert len(list((run.query / PARTIAL).glob("refinement-*.safetensors"))) == 1
    manifest = stage("build_query")(run)
    assert not (run.query / PARTIAL).exists()
    refined = (run.query / DIRECTION).read_bytes()
    assert refined != direction
    steps = manifest.summary["refinement"]
    assert {len(values) for values in steps.values()} == {2}
    assert steps["cosine"][0] == pytest.approx(1.0)
    assert manifest.inputs["corpus"] == read_manifest(run.corpus).fingerprint


def test_queries_are_weighed_and_held_out_where_the_config_says(fitted: Run) -> None:
    manifest = stage("build_query")(of(fitted, weigh="confidence", held_out=2))
    queries, held_out = read_queries(fitted.query), read_queries(fitted.query, HELD_OUT)
    assert (manifest.summary["positive"], manifest.summary["negative"]) == (8, 4)
    assert [row.positive for row in held_out] == [True, True, False, False]
    assert {row.row for row in queries}.isdisjoint(row.row for row in held_out)
    assert all(row.weight == row.score - 0.1 for row in queries if row.positive)
    assert all(row.weight == 0.5 for row in queries if not row.positive)
    assert manifest.summary["held_out"].keys() == {"positive", "negative", "auroc"}
    assert HELD_OUT in manifest.files


@pytest.mark.parametrize("kind", ["prompts", "pairs"])
def test_a_finished_query_of_a_table_edited_since_is_refused(fitted: Run, kind: str, tmp_path: Path) -> None:
    table = tmp_path / "table.jsonl"
    rows = [{"prompt": f"{i} said", "chosen": " hello.", "rejected": " you clown."} for i in range(4)]
    table.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    if kind == "prompts":
        assert fitted.config.build_query.prompts is not None
        shutil.copy(fitted.config.build_query.prompts.path, table)
        run = of(fitted, prompts=Prompts(path=str(table)))
    else:
        run = of(fitted, prompts=None, pairs=Pairs(path=str(table)))
    manifest = stage("build_query")(run)
    assert stage("build_query")(run) == manifest

    table.write_text(table.read_text().replace("clown", "saint"))
    with pytest.raises(MismatchError, match=r"table\.jsonl holds now .*delete .*query"):
        stage("build_query")(run)

    before = replace(manifest, summary={key: value for key, value in manifest.summary.items() if key != ROWS})
    write_manifest(run.query, before)  # as one that was made when no digest was kept
    assert stage("build_query")(run) == before
