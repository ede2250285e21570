"""`score_corpus`: its self-check, and further behaviours as columns."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM

from ifguide import schemas
from ifguide.artifacts import MismatchError, data_files, read_manifest
from ifguide.config import OWN, Config
from ifguide.influence import decision
from ifguide.influence.products import bfloat16_pays
from ifguide.influence.proxy import Beginning, load_proxy
from ifguide.influence.query_file import read_direction
from ifguide.influence.scorer import TokenScorer
from ifguide.pipeline import stage
from ifguide.run import Run
from ifguide.tokenizer import load_tokenizer


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
    first = data_files(run.corpus)[0].name
    made, _ = decision.decide(config, run.proxy_source, Beginning(None), [run.query], run.corpus, first)
    assert made.method.precision == ("bfloat16" if pays else "float32")


def test_a_proxy_that_was_trained_with_a_bos_reads_one_before_every_block_and_query(
    finished: Config, copied: Callable[..., Config], tmp_path: Path
) -> None:
    proxy, source = tmp_path / "proxy", Run(config=finished).proxy_source.source
    AutoModelForCausalLM.from_pretrained(source).save_pretrained(proxy)
    tokenizer = load_tokenizer(finished.tokenizer)
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{tokenizer.bos_token} $A", special_tokens=[(tokenizer.bos_token, bos)]
    )
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    config = copied(drop=("factors", "query", "scores"), proxy__source=str(proxy), score_corpus__preset="exact")
    run = Run(config=replace(config, tokenizer=str(tmp_path / "tokenizer")))
    for verb in ("fit_factors", "build_query", "score_corpus"):
        assert stage(verb)(run).inputs["beginning_token"] == str(bos)
    model = load_proxy(run.proxy_source, gpus=0)
    scorer = TokenScorer(model, read_direction(run.query), attribution="target", beginning=bos)
    name = data_files(run.corpus)[0].name
    table = schemas.read_table(run.corpus / name)
    tokens, lengths = schemas.per_token_array(table, "tokens"), table.column("length").to_numpy()
    expected = scorer.score(torch.tensor(tokens).long(), torch.tensor(lengths).long()).numpy()
    scores = schemas.per_token_array(schemas.read_table(run.scores / name), schemas.score_column(OWN))
    np.testing.assert_allclose(scores, expected, atol=1e-4 * np.abs(expected).max())
    with pytest.raises(MismatchError, match=r"the token before each text in .*query"):
        stage("score_corpus")(Run(config=replace(config, run_dir=config.run_dir)))
