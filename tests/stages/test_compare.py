"""`compare`: masks of other methods against what they mean, token by token, and models that differ in nothing else.
tests/stages/test_compare_preferences.py has DPO and RAD."""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from ifguide import schemas
from ifguide.artifacts import MismatchError, data_files, read_manifest
from ifguide.config import Config, ConfigError
from ifguide.config.compare import (
    ANNOTATED,
    CLASSIFIED,
    RANDOM,
    WORDS,
    Compare,
    ExcessLoss,
    Method,
    Probe,
    Rad,
)
from ifguide.config.resources import Resources
from ifguide.corpus.tables import document_table
from ifguide.influence.query_file import read_queries
from ifguide.methods.excess_loss import tune_excess_loss
from ifguide.methods.finders import sentence_spans, word_spans
from ifguide.methods.labelled_blocks import labelled_blocks
from ifguide.methods.ngrams import Words, fit_ngrams
from ifguide.methods.probes import fit_cross_probe
from ifguide.methods.reading import QuerySets
from ifguide.models import load_model
from ifguide.report.page import REPORT_FILES
from ifguide.report.view import View
from ifguide.run import Run
from ifguide.spans.tables import PackedCorpus
from ifguide.stages.build_mask import build_mask
from ifguide.stages.compare import compare, method_run
from ifguide.stages.method_masks import marked_mask, scored_mask
from ifguide.toxicity import make_classifier
from ifguide.words import WordList

KINDS = (*RANDOM, *ANNOTATED, *WORDS, *CLASSIFIED)


def with_methods(config: Config, **methods: Method) -> Config:
    return replace(config, compare=Compare(methods=methods, threshold=0.5))


@pytest.fixture(scope="module")
def marked(finished: Config, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, dict[str, np.ndarray]]:
    """A finished run, and the mask of every kind of method as flags along the token stream."""
    folder = tmp_path_factory.mktemp("marked") / "run"
    shutil.copytree(finished.run_dir, folder)
    config = with_methods(finished, **{kind: Method(mask=kind) for kind in KINDS})
    config, masks = replace(config, run_dir=str(folder)), {}
    for name, method in config.compare.methods.items():
        assert method.mask is not None
        # One worker a stage: on two CPUs, starting a second one takes longer than its share of this work. A GPU is for
        # what classifies alone: others would wait for ever here.
        resources = Resources(cpus=2, gpus=float(method.mask not in CLASSIFIED))
        run = Run(config=replace(config, compare=replace(config.compare, resources=resources)))
        child = method_run(run, name, method)
        manifest = marked_mask(run, child, method.mask)
        masks[name] = stream(child, "masked")
        assert manifest.rows["tokens"] == masks[name].sum()
        assert marked_mask(run, child, method.mask) == manifest  # complete: nothing is made again
    return run, masks


def stream(run: Run, column: str) -> np.ndarray:
    view = View(run.selection)
    rows = read_manifest(run.corpus).rows["tokens"]
    return np.asarray(view.read(0, rows)[column])


def scores_of(run: Run, column: str) -> np.ndarray:
    """A column of the run's scores, of all tokens in order."""
    tables = [schemas.per_token_array(schemas.read_table(path), column) for path in data_files(run.scores)]
    return np.concatenate(tables).reshape(-1)[: read_manifest(run.corpus).rows["tokens"]]


def documents(run: Run) -> Iterator[tuple[list[int], str]]:
    """Each document's own tokens and the text that they stand for."""
    table, tokens, tokenizer = document_table(run.corpus), stream(run, "tokens"), View(run.selection).tokenizer
    for start, size in zip(
        table.column("token_start").to_pylist(), table.column("num_tokens").to_pylist(), strict=True
    ):
        own = tokens[start : start + size - 1].tolist()
        yield own, tokenizer.decode(own, clean_up_tokenization_spaces=False)


def expected(run: Run, find: Callable[[str], list[tuple[int, int]]]) -> np.ndarray:
    """Token by token from the documents' text: whether it overlaps a span; a span behind the text holds the EOS."""
    tokenizer, flags = View(run.selection).tokenizer, []
    for own, text in documents(run):
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        assert encoded["input_ids"] == own
        places = [*encoded["offset_mapping"], (len(text), len(text) + 1)]
        spans = find(text)
        # a token's own part runs from where the one before it stops: a leading space is the token's
        stops = [0, *(stop for _, stop in places)]
        flags += [any(begin < stops[i + 1] and end > stops[i] for begin, end in spans) for i in range(len(places))]
    found = np.array(flags)
    found[:: run.config.pack_corpus.block_size] = False
    return found


def test_masks_of_text_are_the_tokens_that_overlap_what_was_found(marked: tuple[Run, dict[str, np.ndarray]]) -> None:
    run, masks = marked
    words = WordList(run.config.evaluate.word_list)
    classifier = make_classifier(run.config.evaluate.classifier, gpus=0)
    whole_texts = [text for _, text in documents(run)]
    texts = whole_texts + [text[a:b] for text in whole_texts for a, b in sentence_spans(text)]
    texts += sorted({text[a:b] for text in whole_texts for a, b in word_spans(text)})
    toxic = dict(zip(texts, classifier.score(texts)[classifier.classes[0]] >= 0.5, strict=True))

    def whole(text: str) -> list[tuple[int, int]]:
        return [(0, len(text) + 1)]

    finders: dict[str, Callable[[str], list[tuple[int, int]]]] = {
        "words": words.spans,
        "classified_words": lambda text: [(a, b) for a, b in word_spans(text) if toxic[text[a:b]]],
        "word_documents": lambda text: whole(text) if words.any_in(text) else [],
        "documents": lambda text: whole(text) if toxic[text] else [],
        "sentences": lambda text: [(a, b) for a, b in sentence_spans(text) if toxic[text[a:b]]],
    }
    for name, find in finders.items():
        wanted = expected(run, find)
        assert wanted.any(), name
        np.testing.assert_array_equal(masks[name], wanted, err_msg=name)


def test_annotated_and_random_masks(marked: tuple[Run, dict[str, np.ndarray]]) -> None:
    run, masks = marked
    annotated = stream(run, "annotated")
    first = np.arange(len(annotated)) % run.config.pack_corpus.block_size == 0
    np.testing.assert_array_equal(masks["annotated"], annotated & ~first)
    assert (masks["annotated_documents"] >= masks["annotated"]).all()
    own = stream(run, "masked")
    assert masks["random"].sum() == own.sum()
    assert not masks["random"][first].any()
    assert (masks["random"] & own).sum() < 0.5 * own.sum()
    tokens, size = stream(run, "tokens"), run.config.pack_corpus.blocks_per_shard * run.config.pack_corpus.block_size
    for start in range(0, len(tokens), size):
        of_shard = slice(start, start + size)
        wanted = np.sort(tokens[of_shard][own[of_shard]])
        for kind in ("random_types", "other_uses"):
            np.testing.assert_array_equal(np.sort(tokens[of_shard][masks[kind][of_shard]]), wanted)
    assert not (masks["random_types"] | masks["other_uses"])[first].any()
    shared = {kind: int((masks[kind] & own).sum()) for kind in RANDOM}
    assert shared["other_uses"] < shared["random_types"] < own.sum()
    for kind, count in shared.items():
        assert read_manifest(method_run(run, kind, Method(mask=kind)).mask).summary["tokens_shared"] == count


def by_sorting(scores: np.ndarray, block_size: int, count: int) -> np.ndarray:
    """The `count` predicted tokens of highest score, ties by position."""
    predicted = np.flatnonzero(np.arange(len(scores)) % block_size)
    flags = np.zeros(len(scores), bool)
    flags[predicted[np.argsort(-scores[predicted], kind="stable")[:count]]] = True
    return flags


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.parquet")}


def test_rivals_mask_as_many_tokens_as_the_runs_own_mask_and_resume(copied: Callable[..., Config]) -> None:
    methods = {kind: Method(mask=kind) for kind in ("random_types", "ngrams", "probe")}
    methods["fewer_ngrams"] = Method(mask="ngrams", max_fraction=0.01)
    config = with_methods(copied(), **methods, ngrams_ignored=Method(mask="ngrams", objective="ignore"))
    run = Run(config=config)
    manifest = compare(run)
    assert manifest is not None
    assert list(manifest.summary) == ["baseline", "penalised", *methods, "ngrams_ignored"]
    # another loss on the same mask: it is made once
    assert sorted(path.name for path in (run.folder / "compare" / "ngrams_ignored").iterdir()) == ["model"]
    # another number of tokens by the same scores: they are made once
    assert not (run.folder / "compare" / "fewer_ngrams" / "scores").exists()
    size, own = config.pack_corpus.block_size, stream(run, "masked")
    fewer = stream(method_run(run, "fewer_ngrams", methods.pop("fewer_ngrams")), "masked")
    children = {name: method_run(run, name, method) for name, method in methods.items()}
    by_ngrams = stream(children["ngrams"], "token_score")
    np.testing.assert_array_equal(
        fewer, by_sorting(by_ngrams, size, int(0.01 * (np.arange(len(own)) % size > 0).sum()))
    )
    for name, child in children.items():
        masked = stream(child, "masked")
        assert masked.sum() == own.sum() == read_manifest(child.mask).summary["tokens_masked"], name
        assert (masked != own).any()
        if name != "random_types":
            np.testing.assert_array_equal(masked, by_sorting(stream(child, "token_score"), size, int(own.sum())))
    before = {name: (files_of(child.mask), files_of(child.scores)) for name, child in children.items()}
    assert compare(run) == manifest
    # A report is of the methods that it was made with. Others are refused before a mask is made or a model trained.
    report = run.comparison / "report"
    more = replace(config, compare=replace(config.compare, methods={**methods, "added": Method(mask="random")}))
    with pytest.raises(MismatchError, match=r"report lacks added and has also fewer_ngrams, ngrams_ignored: delete it"):
        compare(Run(config=more))
    assert not (run.comparison / "added").exists()
    shutil.rmtree(report)
    models = {name: read_manifest(child.model("penalised")).created for name, child in children.items()}
    again = compare(run)
    assert again is not None
    assert again.summary == manifest.summary
    assert {name: read_manifest(child.model("penalised")).created for name, child in children.items()} == models
    # Made again, from the start or from where the scores lie, they are the same bytes.
    shutil.rmtree(children["ngrams"].mask)
    for kind in ("scores", "mask"):
        shutil.rmtree(children["probe"].folder / kind)
    for name in ("ngrams", "probe"):
        scored_mask(run, children[name], config.compare.methods[name])
        assert (files_of(children[name].mask), files_of(children[name].scores)) == before[name]


def test_scores_of_shards_are_those_of_the_finder_on_the_whole_stream(copied: Callable[..., Config]) -> None:
    methods = {kind: Method(mask=kind) for kind in ("ngrams", "excess_loss", "span_probe", "influence_words")}
    comparison = Compare(methods=methods, excess_loss=ExcessLoss(epochs=1, learning_rate=1e-3), probe=Probe(tokens=400))
    run = Run(config=replace(copied(), compare=comparison))
    size, tokens = run.config.pack_corpus.block_size, stream(run, "tokens")
    first, own = np.arange(len(tokens)) % size == 0, stream(run, "masked")
    scores, tokenizer = {}, View(run.selection).tokenizer
    for name, method in methods.items():
        child = method_run(run, name, method)
        manifest = scored_mask(run, child, method)
        assert manifest.rows["tokens"] == own.sum()
        scores[name] = stream(child, "token_score")
        assert not scores[name][first].any()
        assert not (child.scores / "finder").exists()
        np.testing.assert_array_equal(stream(child, "masked"), by_sorting(scores[name], size, int(own.sum())))
    rows = read_queries(run.query)
    sets = QuerySets.of(rows, max_tokens=run.config.build_query.max_tokens)
    (whole,) = fit_ngrams(tokenizer, sets).score([tokens.tolist()])
    np.testing.assert_array_equal(scores["ngrams"][~first], whole[~first])
    # The words of the whole stream, use by use, by the scores that the run's own mask is made of.
    uses, runs = defaultdict[str, list[float]](list), Words(tokenizer).runs(tokens.tolist())
    smoothed = np.where(first, -np.inf, scores_of(run, "smoothed_score").astype(float))
    for start, stop, word in runs:
        if word not in ("", "\n") and smoothed[start:stop].max() > -np.inf:
            uses[word].append(smoothed[start:stop].max())
    table = pq.read_table(method_run(run, "influence_words", methods["influence_words"]).scores / "words.parquet")
    rows = {row["word"]: row for row in table.to_pylist()}
    assert {word: len(values) for word, values in uses.items()} == {word: row["uses"] for word, row in rows.items()}
    assert {word: np.mean(values) for word, values in uses.items()} == pytest.approx(
        {word: row["mean"] for word, row in rows.items()}, rel=1e-5, abs=1e-5
    )
    of_words = np.zeros(len(tokens))
    for start, stop, word in runs:
        of_words[start:stop] = rows[word]["score"] if word in rows else 0.0
    np.testing.assert_allclose(scores["influence_words"], np.where(first, 0.0, of_words), rtol=1e-6)
    fewer = Method(mask="influence_words", max_fraction=0.01)
    child = method_run(run, "fewer", fewer).borrow(method_run(run, "influence_words", fewer), "scores")
    assert scored_mask(run, child, fewer).rows["tokens"] == int(0.01 * (~first).sum())
    finder = tune_excess_loss(
        load_model(run.proxy_source), tokenizer, sets, options=comparison.excess_loss,
        seed=run.config.seed,
    )  # fmt: skip
    blocks = [tokens[begin : begin + size].tolist() for begin in range(0, len(tokens), size)]
    np.testing.assert_allclose(scores["excess_loss"], np.concatenate(finder.score(blocks)), atol=1e-3)
    # Documents from the table of the whole corpus, where shards look up their own.
    sample = labelled_blocks(PackedCorpus.of(run.corpus, read_manifest(run.corpus)), 200, run.config.seed)
    probe = fit_cross_probe(load_model(run.proxy_source), *sample, options=comparison.probe, seed=run.config.seed)
    numbers = np.repeat(np.arange(len(table := document_table(run.corpus))), table.column("num_tokens").to_numpy())
    of_blocks = [numbers[begin : begin + size] for begin in range(0, len(tokens), size)]
    np.testing.assert_allclose(scores["span_probe"], np.concatenate(probe.score(blocks, of_blocks)), atol=1e-2)

    # The same scores as Algorithm 1 selects, and the run's own scores by their rank alone.
    for name, method in {
        "by_units": Method(mask="ngrams", selection="units"),
        "own_by_units": Method(mask="influence", selection="units"),
        "own_by_tokens": Method(mask="influence", selection="tokens"),
        "smoothed": Method(mask="smoothed"),
        "exact": Method(mask="exact"),
        "exact_by_units": Method(mask="exact", selection="units"),
    }.items():
        child = method_run(run, name, method)
        if name == "by_units":
            child = child.borrow(method_run(run, "ngrams", methods["ngrams"]), "scores")
        scored_mask(run, child, method)
        masked = stream(child, "masked")
        if name == "own_by_units":
            np.testing.assert_array_equal(masked, own)
        elif name in ("own_by_tokens", "smoothed"):
            np.testing.assert_array_equal(masked, by_sorting(scores_of(run, "smoothed_score"), size, int(own.sum())))
        elif name == "exact":
            np.testing.assert_array_equal(masked, by_sorting(scores_of(run, "token_score"), size, int(own.sum())))
        elif name == "exact_by_units":
            assert read_manifest(child.mask).summary["smoothed"] is False
            assert 0 < masked.sum() <= own.sum()
            assert (masked != own).any()
        else:
            assert 0 < masked.sum() <= own.sum()
            assert (masked != stream(method_run(run, "ngrams", methods["ngrams"]), "masked")).any()

    # A selection of the method's own is `build_mask` with these options.
    method = Method(mask="influence", selection="units", quantile=0.9, window=2, max_fraction=0.05)
    scored_mask(run, selected := method_run(run, "selected", method), method)
    options = replace(run.config.build_mask, quantile=0.9, window=2, max_fraction=0.05)
    same = Run(config=replace(run.config, run_dir=str(run.folder / "same"), build_mask=options))
    build_mask(same := same.borrow(run, "corpus", "scores"))
    np.testing.assert_array_equal(stream(selected, "masked"), stream(same, "masked"))
    assert stream(selected, "masked").sum() != own.sum()


def test_compared_models_differ_in_their_mask_alone(copied: Callable[..., Config]) -> None:
    methods = {"same": Method(mask="influence"), "filter": Method(mask="words", objective="ignore")}
    methods["plain"] = Method(mask="plain_influence")
    config = with_methods(copied(), **methods)
    run = Run(config=config)
    manifest = compare(run)
    assert manifest is not None
    assert list(manifest.summary) == ["baseline", "penalised", "same", "filter", "plain"]
    # The same mask, penalty, seed and data give the very weights of the run's own model.
    weights = [
        (folder / "hf" / "model.safetensors").read_bytes()
        for folder in (run.model("penalised"), run.folder / "compare" / "same" / "model" / "penalised")
    ]
    assert weights[0] == weights[1]
    rows: list[dict[str, Any]] = json.loads((run.folder / "compare" / "report" / "comparison.json").read_text())
    by_name = {row["model"]: row for row in rows}
    # Nor are the run's own models sampled again: the figures of the same weights are those of `evaluate`'s texts.
    assert {path.name for path in (run.folder / "compare" / "generations").iterdir()} == {"same", "filter", "plain"}
    assert by_name["same"]["emt"] == by_name["penalised"]["emt"]
    # Every method stands beside the run's own penalised model.
    assert by_name["same"]["evaluators"][0]["beside"]["emt_ratio"] == [1, 1, 1]
    assert [row["model"] for row in rows if row["reference"] == "penalised"] == ["same", "filter", "plain"]
    assert "EMT over that of penalised" in (run.comparison / "report" / "comparison.md").read_text(encoding="utf-8")
    assert by_name["baseline"]["ratio"] == 1
    assert by_name["filter"]["masked_loss"] == "ignore"
    assert by_name["filter"]["masked_share"] > 0
    assert (run.folder / "compare" / "report" / "comparison.png").stat().st_size > 5_000
    folder = run.folder / "compare" / "report"
    page = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    assert [model["name"] for model in page["models"]] == list(manifest.summary)
    assert page["models"][3]["made"]["masked_share"] == by_name["filter"]["masked_share"]
    assert [curve["model"] for curve in page["curves"]] == list(manifest.summary)
    assert "compare/filter/mask" in [row["folder"] for row in page["provenance"]]
    assert set(REPORT_FILES) <= set(manifest.files)
    filtered = f"{by_name['filter']['masked_share']:.2%} masked: ignore"
    assert filtered in (folder / "index.html").read_text(encoding="utf-8")
    plain = method_run(run, "plain", methods["plain"])
    queries = read_manifest(plain.query)
    assert queries.rows["queries"] == queries.summary["positive"] == read_manifest(run.query).summary["positive"]
    assert queries.inputs == read_manifest(run.query).inputs  # the same factors and proxy
    assert stream(plain, "masked").any()
    assert (stream(plain, "masked") != stream(run, "masked")).any()
    assert compare(run) == manifest


@pytest.mark.parametrize(
    ("method", "change", "message"),
    [
        (Method(mask="words"), {"word_list": ()}, "evaluate.word_list"),
        (Method(mask="documents"), {"classifier": "labels"}, "compare.classifier"),
        (
            Method(rad=Rad()),
            {"classifier": "labels"},
            "methods.tried: RAD of baseline needs .* compare.classifier",
        ),
    ],
)
def test_a_method_that_the_run_cannot_have_is_refused(
    copied: Callable[..., Config], method: Method, change: dict[str, Any], message: str
) -> None:
    from ifguide.config import ClassifierSource

    change = {key: ClassifierSource(name=value) if key == "classifier" else value for key, value in change.items()}
    config = with_methods(copied(), tried=method)
    config = replace(config, evaluate=replace(config.evaluate, **change))
    with pytest.raises(ConfigError, match=message):
        compare(Run(config=config), dry_run=True)


def test_no_methods_are_refused(copied: Callable[..., Config]) -> None:
    with pytest.raises(ConfigError, match="methods: name some"):
        compare(Run(config=with_methods(copied())), dry_run=True)
