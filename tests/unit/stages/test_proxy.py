"""Every verb that uses the proxy refuses one that does not read the corpus' tokens."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ifguide.artifacts import open_artifact
from ifguide.config import ModelSource, config_from_mapping
from ifguide.models import load_model
from ifguide.run import Run
from ifguide.stages import build_query, fit_factors, proxy, scoring
from tests.exported import make_run
from tests.tiny import ARCHITECTURES
from tests.tokenizers import tokenizers
from tests.unit.selection.test_ensemble import TEXTS, T

USES: dict[str, Callable[[Run], object]] = {
    "fit_factors": fit_factors.fit_factors,
    "build_query": build_query.build_query,
    "score_corpus": lambda run: scoring.ScoringInputs.of(run, "score_corpus"),
}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A packed corpus, and a named proxy that comes with the tokenizer `bpe`; tasks are done in this process."""

    def run_task(function: Callable[..., Any], *arguments: Any, resources: object) -> Any:
        return function(*arguments)

    for module in (fit_factors, build_query, scoring):
        monkeypatch.setattr(module, "connect", lambda _: None)
    monkeypatch.setattr(proxy, "run_task", run_task)
    own, of_corpus = tokenizers()["bpe"], tokenizers()["bytes"]
    run_dir = make_run(tmp_path / "run", TEXTS, of_corpus, block_size=T, blocks_per_shard=24)
    of_corpus.save_pretrained(tmp_path / "tokenizer")
    fields = {**ARCHITECTURES["gpt_neox"], "vocab_size": max(len(own), len(of_corpus))}
    load_model(ModelSource(architecture=fields)).save_pretrained(tmp_path / "proxy")
    own.save_pretrained(tmp_path / "proxy")
    (tmp_path / "factors").mkdir()
    (tmp_path / "queries.jsonl").write_text('{"text": "You clown."}\n')
    tree = {
        "run_dir": str(run_dir),
        "tokenizer": str(tmp_path / "tokenizer"),
        "proxy": str(tmp_path / "proxy"),
        "pack_corpus": {"block_size": T},
        "build_query": {
            "positive": str(tmp_path / "queries.jsonl"),
            "differential": False,
            "factors": str(tmp_path / "factors"),
        },
    }
    made = Run(config=config_from_mapping(tree))
    query = open_artifact(made.query, verb="build_query", options={}, inputs={"proxy": ""}, config_yaml="")
    query.finish([], rows={}, summary={})
    return made


@pytest.mark.parametrize("verb", USES)
def test_a_proxy_of_other_tokens_is_refused_before_any_work(run: Run, verb: str) -> None:
    message = r"proxy\.source: token \d+ is .* in .*tokenizer, and .* in .*proxy, .*; set tokenizer=\S+proxy and "
    with pytest.raises(ValueError, match=message):
        USES[verb](run)


def test_a_proxy_of_the_corpus_tokens_or_without_a_tokenizer_is_taken(run: Run, tmp_path: Path) -> None:
    shutil.copytree(tmp_path / "proxy", tmp_path / "bare", ignore=shutil.ignore_patterns("*token*"))
    architecture = {**ARCHITECTURES["gpt_neox"], "vocab_size": 512}
    for taken in (
        replace(run.config, proxy=ModelSource(source=str(tmp_path / "bare"))),
        replace(run.config, proxy=ModelSource(architecture=architecture)),
        replace(run.config, tokenizer=None),
    ):
        facts, _ = proxy.read_proxy(Run(config=taken), "fit_factors")
        assert facts.vocab_size
