"""`compare`: masks of other methods against what they mean, token by token, and models that differ in nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from ifguide.artifacts import read_manifest
from ifguide.baselines import sentence_spans, word_list_spans
from ifguide.config import Compare, Config, ConfigError, Method
from ifguide.report import REPORT_FILES
from ifguide.stages.build_query import make_classifier
from ifguide.stages.compare import compare, method_run
from ifguide.stages.method_masks import make_method_mask
from ifguide.stages.run import Run
from ifguide.stages.view import View

KINDS = ("random", "annotated", "words", "sentences", "word_documents", "documents", "annotated_documents")


def with_methods(config: Config, **methods: Method) -> Config:
    return replace(config, compare=Compare(methods=methods, threshold=0.5))


@pytest.fixture
def marked(copied: Callable[..., Config]) -> tuple[Run, dict[str, np.ndarray]]:
    """A finished run, and the mask of every kind of method as flags along the token stream."""
    config = with_methods(copied(), **{kind: Method(mask=kind) for kind in KINDS})
    run = Run(config=config)
    masks = {}
    for name, method in config.compare.methods.items():
        child = method_run(run, name, method)
        manifest = make_method_mask(run, child, method)
        masks[name] = stream(child, "masked")
        assert manifest.rows["tokens"] == masks[name].sum()
        assert make_method_mask(run, child, method) == manifest  # complete: nothing is made again
    return run, masks


def stream(run: Run, column: str) -> np.ndarray:
    view = View(run.folder)
    rows = read_manifest(run.corpus).rows["tokens"]
    return np.asarray(view.read(0, rows)[column])


def expected(run: Run, find: Callable[[str], list[tuple[int, int]]]) -> np.ndarray:
    """Token by token from the documents' text: whether it overlaps a span; a span behind the text holds the EOS."""
    view, flags = View(run.folder), []
    from ifguide.stages.pack_corpus import document_table

    table = document_table(run.corpus)
    tokens = stream(run, "tokens")
    for start, size in zip(
        table.column("token_start").to_pylist(), table.column("num_tokens").to_pylist(), strict=True
    ):
        own = tokens[start : start + size - 1].tolist()
        text = view.tokenizer.decode(own, clean_up_tokenization_spaces=False)
        encoded = view.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
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
    words = run.config.evaluate.word_list
    classifier = make_classifier(run.config.evaluate.classifier, gpus=0)

    def toxic(text: str) -> bool:
        return bool(classifier.score([text])[classifier.classes[0]][0] >= 0.5)

    def whole(text: str) -> list[tuple[int, int]]:
        return [(0, len(text) + 1)]

    finders: dict[str, Callable[[str], list[tuple[int, int]]]] = {
        "words": lambda text: word_list_spans(text, words),
        "word_documents": lambda text: whole(text) if word_list_spans(text, words) else [],
        "documents": lambda text: whole(text) if toxic(text) else [],
        "sentences": lambda text: [(a, b) for a, b in sentence_spans(text) if toxic(text[a:b])],
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


def test_compared_models_differ_in_their_mask_alone(copied: Callable[..., Config]) -> None:
    methods = {"same": Method(mask="influence"), "filter": Method(mask="words", penalty=0)}
    config = with_methods(copied(), **methods)
    run = Run(config=config)
    manifest = compare(run)
    assert manifest is not None
    assert list(manifest.summary) == ["baseline", "penalised", "same", "filter"]
    # The same mask, penalty, seed and data give the very weights of the run's own model.
    weights = [
        (folder / "hf" / "model.safetensors").read_bytes()
        for folder in (run.model("penalised"), run.folder / "compare" / "same" / "model" / "penalised")
    ]
    assert weights[0] == weights[1]
    rows: list[dict[str, Any]] = json.loads((run.folder / "compare" / "report" / "comparison.json").read_text())
    by_name = {row["model"]: row for row in rows}
    assert by_name["same"]["emt"] == by_name["penalised"]["emt"]
    assert by_name["baseline"]["ratio"] == 1
    assert by_name["filter"]["penalty"] == 0
    assert by_name["filter"]["masked_share"] > 0
    assert (run.folder / "compare" / "report" / "comparison.png").stat().st_size > 5_000
    folder = run.folder / "compare" / "report"
    page = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    assert [model["name"] for model in page["models"]] == list(manifest.summary)
    assert page["models"][3]["masked_share"] == by_name["filter"]["masked_share"]
    assert [curve["model"] for curve in page["curves"]] == list(manifest.summary)
    assert "compare/filter/mask" in [row["folder"] for row in page["provenance"]]
    assert set(REPORT_FILES) <= set(manifest.files)
    assert "Penalty" in (folder / "index.html").read_text(encoding="utf-8")
    assert compare(run) == manifest


@pytest.mark.parametrize(
    ("method", "change", "message"),
    [
        (Method(mask="words"), {"word_list": ()}, "evaluate.word_list"),
        (Method(mask="documents"), {"classifier": "labels"}, "compare.classifier"),
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
