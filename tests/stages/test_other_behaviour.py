"""`configs/praise.yaml`, from documents to the report: a behaviour that is not toxicity, of tables in plain forms."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from ifguide.artifacts import read_manifest
from ifguide.config import load_config
from ifguide.config.compare import Compare, Method
from ifguide.demo.praise import generate_praise
from ifguide.influence.query_file import read_queries
from ifguide.pipeline import run_pipeline
from ifguide.run import Run
from ifguide.stages.compare import compare, method_run

CONFIG = Path(__file__).parents[2] / "configs" / "praise.yaml"
SMALLER = (
    "cluster.num_cpus=2",
    "target.architecture.hidden_size=32",
    "target.architecture.num_hidden_layers=2",
    "target.architecture.intermediate_size=64",
    "pack_corpus.block_size=64",
    "pretrain.epochs=3",
    "fit_factors.sample_blocks=100",
    "evaluate.continuations=4",
    "evaluate.max_prompts=20",
)


@pytest.mark.usefixtures("cluster")
def test_a_behaviour_of_pairs_goes_from_documents_to_the_report(tmp_path: Path) -> None:
    generate_praise(tmp_path / "data", documents=250)
    config = tmp_path / "praise.yaml"
    config.write_text(CONFIG.read_text().replace("data/praise", str(tmp_path / "data")))
    run = Run(config=load_config(config, [f"run_dir={tmp_path / 'run'}", *SMALLER]))
    run_pipeline(run.config, dry_run=False)

    pairs = [json.loads(line) for line in (tmp_path / "data" / "pairs.jsonl").read_text().splitlines()]
    queries = read_queries(run.query)
    assert [query.completion for query in queries if query.positive] == [pair["rejected"] for pair in pairs]
    assert [query.completion for query in queries if not query.positive] == [pair["chosen"] for pair in pairs]
    assert {query.prompt for query in queries} == {pair["prompt"] for pair in pairs}
    summary = read_manifest(run.report).summary
    documents = [json.loads(line) for line in (tmp_path / "data" / "corpus.jsonl").read_text().splitlines()]
    flattery = sum(end - start for row in documents for start, end in row["spans"])
    # the mask finds flattery far more often than chance, by a model of two layers
    assert summary["mask"]["precision"] > 3 * flattery / sum(len(row["text"]) for row in documents)
    assert 0 <= summary["baseline"]["emt"] <= 1
    assert "flattery" in (run.report / "index.html").read_text()

    # The methods of a comparison read the tokenizer that was trained with the corpus.
    methods = {"filter": Method(mask="annotated", objective="ignore"), "plain": Method(mask="plain_influence")}
    compared = Run(config=replace(run.config, compare=Compare(methods=methods)))
    manifest = compare(compared)
    assert manifest is not None
    assert list(manifest.summary) == ["baseline", "penalised", "filter", "plain"]
    for name, method in methods.items():
        assert method_run(compared, name, method).tokenizer_source == str(run.corpus / "tokenizer")
