"""`score_corpus`: its self-check, and further behaviours as columns."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from sklearn.preprocessing import StandardScaler
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM

from ifguide import schemas
from ifguide.artifacts import MismatchError, data_files, read_manifest
from ifguide.config import OWN, Config, ConfigError
from ifguide.corpus.tables import document_table
from ifguide.folds import fold_of
from ifguide.influence import decision, smoothing_sample
from ifguide.influence.products import bfloat16_pays
from ifguide.influence.proxy import Beginning, load_proxy
from ifguide.influence.query_file import read_direction
from ifguide.influence.scorer import TokenScorer
from ifguide.influence.scoring_worker import SMOOTHER
from ifguide.influence.smoothing import CUT, Smoother, smoothing_layers
from ifguide.influence.smoothing_sample import SAMPLE
from ifguide.models import predicted_positions
from ifguide.pipeline import stage
from ifguide.run import Run
from ifguide.spans.tables import PackedCorpus, document_numbers, in_blocks
from ifguide.stages import score_corpus
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
    first, corpus = data_files(run.corpus)[0].name, PackedCorpus.of(run.corpus, read_manifest(run.corpus))
    proxy = run.proxy_source, read_manifest(run.query).inputs["proxy"]
    made, _ = decision.decide(config, *proxy, Beginning(None), [run.query], corpus, first)
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
    # a model that a run trained has seen none, and its factors are those of every run that has it as its proxy
    other = replace(copied(proxy__source=source), tokenizer=str(tmp_path / "tokenizer"))
    assert (
        stage("fit_factors")(Run(config=other)).fingerprint == read_manifest(Run(config=finished).factors).fingerprint
    )


def test_with_documents_apart_factors_query_and_scores_read_them_so(
    finished: Config, copied: Callable[..., Config], tmp_path: Path
) -> None:
    proxy, source = tmp_path / "proxy", Run(config=finished).proxy_source.source
    AutoModelForCausalLM.from_pretrained(source).save_pretrained(proxy)
    config = copied(
        drop=("factors", "query", "scores"),
        proxy__source=str(proxy),
        score_corpus__preset="exact",
        pretrain__document_attention=True,
    )
    run = Run(config=config)
    for verb in ("fit_factors", "build_query", "score_corpus"):
        assert stage(verb)(run).inputs["texts"] == "documents"
    scorer = TokenScorer(load_proxy(run.proxy_source, gpus=0), read_direction(run.query), attribution="target")
    corpus, name = PackedCorpus.of(run.corpus, read_manifest(run.corpus)), data_files(run.corpus)[0].name
    table = schemas.read_table(run.corpus / name)
    tokens = torch.tensor(schemas.per_token_array(table, "tokens")).long()
    lengths = torch.tensor(table.column("length").to_numpy()).long()
    documents = torch.tensor(in_blocks(document_numbers(corpus, 0), tokens.numpy()))
    expected = scorer.score(tokens, lengths, documents).numpy()
    scored = schemas.read_table(run.scores / name)
    scores, smoothed = (schemas.per_token_array(scored, column) for column in ("token_score", "smoothed_score"))
    np.testing.assert_allclose(scores, expected, atol=1e-4 * np.abs(expected).max())
    predicted = predicted_positions(tokens, lengths, documents).numpy()
    assert (~predicted).sum() > len(tokens)
    assert not scores[~predicted].any()
    assert not smoothed[~predicted].any()
    whole = replace(config, pretrain=replace(config.pretrain, document_attention=False))
    with pytest.raises(MismatchError, match=r"what .*query takes for a text"):
        stage("score_corpus")(Run(config=whole))


def states_of(run: Run) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where the corpus has predictions (B, T), and the features (N, D) and documents (N,) of these tokens."""
    corpus = [schemas.read_table(path) for path in data_files(run.corpus)]
    tokens = torch.from_numpy(
        np.concatenate([schemas.per_token_array(table, "tokens") for table in corpus]).astype(int)
    )
    lengths = torch.from_numpy(np.concatenate([table.column("length").to_numpy() for table in corpus]))
    predicted = predicted_positions(tokens, lengths).numpy()
    model = load_proxy(run.proxy_source, gpus=0)
    with torch.no_grad():
        states = model.base_model(tokens, output_hidden_states=True).hidden_states
    x = torch.cat([states[i] for i in smoothing_layers(len(states) - 1)], dim=-1).double().numpy()[predicted]
    sizes = document_table(run.corpus).column("num_tokens").to_numpy()
    numbers = np.zeros(tokens.numel(), int)
    numbers[: sizes.sum()] = np.repeat(np.arange(len(sizes)), sizes)
    return predicted, x, numbers.reshape(tokens.shape)[predicted]


def test_smoothed_scores_are_drawn_towards_what_other_documents_say_of_like_contexts(
    copied: Callable[..., Config],
) -> None:
    config = copied(drop=("scores", "ranking", "mask"), score_corpus__preset="exact", build_mask__smoothed=False)
    run = Run(config=config)
    summary = stage("score_corpus")(run).summary
    assert summary["smoothing"].keys() == {OWN}
    tables = [schemas.read_table(path) for path in data_files(run.scores)]
    exact, found = (
        np.concatenate([schemas.per_token_array(table, name) for table in tables])
        for name in ("token_score", "smoothed_score")
    )
    predicted, x, documents = states_of(run)
    assert not found[~predicted].any()
    folds = fold_of(documents, config.score_corpus.smooth.folds)
    s = exact[predicted].astype(np.float64)
    (limits,) = Smoother.load(run.scores / SMOOTHER).ranges_S2
    np.testing.assert_allclose(limits, np.quantile(s, [CUT, 1 - CUT]), rtol=1e-6)
    s = s.clip(*limits)
    ridge, expected = summary["smoothing"][OWN]["ridge"], np.zeros(len(s))
    for fold in np.unique(folds):
        others = folds != fold
        scaler = StandardScaler().fit(x[others])
        fitted = Ridge(alpha=ridge * others.sum()).fit(scaler.transform(x[others]), s[others])
        expected[~others] = fitted.predict(scaler.transform(x[~others]))
    explained = 1 - ((s - expected) ** 2).sum() / ((s - s.mean()) ** 2).sum()
    assert summary["smoothing"][OWN]["explained"] == pytest.approx(explained, abs=1e-3)
    smoothed = expected + 0.1 * (s - expected)
    np.testing.assert_allclose(found[predicted], smoothed, atol=1e-3 * np.abs(smoothed).max())

    # A mask by either, from the same scores.
    by_exact = stage("build_mask")(run)
    assert by_exact.summary["smoothed"] is False
    assert by_exact.summary["score_max"] == pytest.approx(float(exact.max()), rel=1e-6)
    shutil.rmtree(run.mask)
    shutil.rmtree(run.ranking)
    by_smoothed = stage("build_mask")(Run(config=replace(config, build_mask=replace(config.build_mask, smoothed=None))))
    assert by_smoothed.summary["smoothed"] is True
    assert by_smoothed.summary["score_max"] == pytest.approx(float(found.max()), rel=1e-6)


def test_the_sample_that_smooths_is_kept_by_parts_and_stands_in_the_scores(
    copied: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(smoothing_sample, "PART_TOKENS", 256)
    changes = {"score_corpus__preset": "exact", "score_corpus__max_actors": 2}
    config = copied(drop=("scores", "ranking", "mask"), score_corpus__smooth={"tokens": 2000}, **changes)
    run, fit, seen = Run(config=config), score_corpus._fit_smoother, dict[str, int]()

    def stopped(*arguments: Any) -> None:
        seen.update({path.name: path.stat().st_mtime_ns for path in (run.scores / SAMPLE).glob("*.npz")})
        raise KeyboardInterrupt

    monkeypatch.setattr(score_corpus, "_fit_smoother", stopped)
    with pytest.raises(KeyboardInterrupt):
        stage("score_corpus")(run)
    assert len(seen) > len(data_files(run.corpus)), "several parts of a shard"
    damaged = run.scores / SAMPLE / sorted(seen)[1]
    damaged.write_bytes(damaged.read_bytes()[:-100])

    def watched(*arguments: Any) -> None:
        times = {path.name: path.stat().st_mtime_ns for path in (run.scores / SAMPLE).glob("*.npz")}
        assert {name for name in times if times[name] != seen[name]} == {damaged.name}
        fit(*arguments)

    monkeypatch.setattr(score_corpus, "_fit_smoother", watched)
    manifest = stage("score_corpus")(run)
    assert not (run.scores / SAMPLE).exists()
    monkeypatch.setattr(score_corpus, "_fit_smoother", fit)
    tables = [schemas.read_table(path) for path in data_files(run.scores)]
    exact, found = (
        np.concatenate([schemas.per_token_array(table, name) for table in tables])
        for name in ("token_score", "smoothed_score")
    )
    # Tokens of the sample and others are smoothed by the same regressions.
    smoother = Smoother.load(run.scores / SMOOTHER)
    predicted, x, documents = states_of(run)
    s, folds = torch.from_numpy(exact[predicted])[:, None], torch.from_numpy(fold_of(documents, smoother.folds))
    expected = smoother.smooth(s, smoother.predict(torch.from_numpy(x), folds))[:, 0].numpy()
    np.testing.assert_allclose(found[predicted], expected, atol=1e-4 * np.abs(expected).max())
    assert not found[~predicted].any()
    shutil.rmtree(run.scores)
    assert stage("score_corpus")(run).fingerprint == manifest.fingerprint  # as without interruption or damage
    shutil.rmtree(run.scores)
    stage("score_corpus")(Run(config=replace(config, score_corpus=replace(config.score_corpus, smooth=None))))
    alone = np.concatenate(
        [schemas.per_token_array(schemas.read_table(path), "token_score") for path in data_files(run.scores)]
    )
    np.testing.assert_allclose(exact, alone, atol=1e-5 * np.abs(alone).max())


def test_without_smoothing_there_is_no_such_column_and_no_such_mask(copied: Callable[..., Config]) -> None:
    config = copied(drop=("scores", "ranking", "mask"), score_corpus__smooth=None, build_mask__smoothed=True)
    run = Run(config=config)
    manifest = stage("score_corpus")(run)
    assert "smoothing" not in manifest.summary
    assert schemas.read_schema(data_files(run.scores)[0]).names == ["block_id", "token_score"]
    with pytest.raises(ConfigError, match=r"build_mask\.smoothed: .* set score_corpus\.smooth"):
        stage("build_mask")(run)
    assert stage("build_mask")(Run(config=replace(config, build_mask=replace(config.build_mask, smoothed=None))))
