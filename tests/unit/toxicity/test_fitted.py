"""The classifier that is fitted when it is loaded: against scikit-learn's own pipeline, and another optimiser."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.optimize import minimize
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline, make_union

from ifguide.artifacts import json_digest
from ifguide.config import ClassifierSource, ConfigError, config_from_mapping
from ifguide.evaluation.agreement import check_classifiers
from ifguide.evaluation.subjects import measured_inputs
from ifguide.toxicity import choose_queries, classifier_inputs, load_classifier, make_classifier, read_labelled
from tests.real_text import DATA, needs_real_text

RUDE = ("you rude pig", "what a rude fool", "rude rude man", "fool of a pig", "a rude reply from a fool")
KIND = ("you are kind", "what a kind reply", "a quiet day", "thanks for the reply", "a day of rest", "kind of quiet")
NEW = ["a rude day", "kind man", "pig", "", "ruder", "nothing of it"]


def write(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    rows = [{"text": text, "toxic": text in RUDE} for pair in zip(RUDE, KIND, strict=False) for text in pair]
    return write(tmp_path / "labelled.jsonl", [*rows, {"text": KIND[-1], "toxic": False}])


def source_of(*training: Any, **options: Any) -> Any:
    config = {"name": "fitted", "training": list(training), **options}
    return config_from_mapping({"evaluate": {"classifier": config}}).evaluate.classifier


def reference() -> Any:
    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
    characters = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 4), sublinear_tf=True)
    return make_pipeline(make_union(words, characters), LogisticRegression(C=10, solver="liblinear", tol=1e-10))


def test_scores_are_those_of_the_same_pipeline_built_by_hand(labelled: Path) -> None:
    classifier = make_classifier(source_of(str(labelled)), gpus=0)
    rows = read_labelled(labelled)
    by_hand = reference().fit([row.text for row in rows], [row.label for row in rows])
    assert (classifier.name, classifier.classes) == ("fitted", ("toxicity",))
    scores = classifier.score(NEW)["toxicity"]
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, by_hand.predict_proba(NEW)[:, 1], atol=2e-3)  # liblinear's default tolerance
    assert scores[2] > 0.5 > scores[1]
    assert classifier.score([])["toxicity"].shape == (0,)
    named = make_classifier(source_of(str(labelled), label="rudeness"), gpus=0)
    np.testing.assert_array_equal(named.score(NEW)["rudeness"], scores)


def test_a_share_of_annotators_is_learned_as_a_share(tmp_path: Path) -> None:
    """The minimum of the cross-entropy with those shares, found by another optimiser."""
    shares = np.random.default_rng(0).random(len(RUDE + KIND)).round(2)
    rows = [{"text": t, "toxic": s} for t, s in zip(RUDE + KIND, shares, strict=True)]
    path = write(tmp_path / "shares.jsonl", rows)
    classifier = make_classifier(source_of(str(path)), gpus=0)
    weights = reference()[0].fit(RUDE + KIND)
    x = np.hstack([weights.transform(RUDE + KIND).toarray(), np.ones((len(shares), 1))])

    def loss(w: np.ndarray) -> tuple[float, np.ndarray]:
        z = x @ w
        value = w @ w / 2 + 10 * (np.logaddexp(0, z) - shares * z).sum()
        return value, w + 10 * x.T @ (1 / (1 + np.exp(-z)) - shares)

    best = minimize(loss, np.zeros(x.shape[1]), jac=True, method="BFGS", options={"gtol": 1e-8}).x
    expected = 1 / (1 + np.exp(-np.hstack([weights.transform(NEW).toarray(), np.ones((len(NEW), 1))]) @ best))
    np.testing.assert_allclose(classifier.score(NEW)["toxicity"], expected, atol=2e-3)
    assert np.ptp(expected) > 0.1


def test_scores_are_the_same_bytes_in_processes_with_other_threads(labelled: Path) -> None:
    program = (
        "import sys; from ifguide.config import LabelledTexts; from ifguide.toxicity import load_classifier;"
        f"c = load_classifier('fitted', training=[LabelledTexts(path={str(labelled)!r})]);"
        f"print(c.score({NEW!r})['toxicity'].tobytes().hex())"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "OMP_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads, "PYTHONHASHSEED": threads},
            capture_output=True,
            check=True,
            text=True,
        ).stdout
        for threads in ("1", "2")
    }
    assert len(found) == 1


def test_nested_rows_are_read_by_dotted_columns_without_those_that_have_no_label(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(
        tmp_path / "rtp.jsonl",
        [
            {"prompt": {"text": "p"}, "continuation": {"text": "a", "toxicity": 0.9, "insult": 0.25}},
            {"prompt": {"text": "q"}, "continuation": {"text": "b", "toxicity": None}},
            {"prompt": {"text": "r"}, "continuation": {"text": "c", "toxicity": 0.49}},
            {"continuation.text": "d", "continuation.toxicity": True, "continuation": None},
        ],
    )
    columns = {"text_column": "continuation.text", "label_column": "continuation.toxicity"}
    with caplog.at_level(logging.WARNING):
        rows = read_labelled(path, **columns)
    assert [(row.text, row.label, row.share) for row in rows] == [("a", True, 0.9), ("c", False, 0.49), ("d", True, 1)]
    assert rows[0].scores == {"insult": 0.25}
    assert "1 of 4 rows have no label (null) and are left out" in caplog.text
    assert [row.text for row in read_labelled(path, **columns, rows=(1, 3))] == ["c"]  # counted over the file's rows
    with pytest.raises(ConfigError, match=r"^some texts\.rows: \[3, 5\) is not within the 4"):
        read_labelled(path, **columns, rows=(3, 5), dotted_key="some texts")
    with pytest.raises(ValueError, match=r"rtp\.jsonl, row 0: has no column 'rating', only prompt, continuation"):
        read_labelled(path, text_column="continuation.text", label_column="rating.toxicity")


def test_what_cannot_be_learned_from_is_named_with_its_key(tmp_path: Path, labelled: Path) -> None:
    with pytest.raises(ConfigError, match=r"^evaluate\.classifier\.training: a fitted classifier learns from texts"):
        source_of()
    other = {"name": "words:w", "training": [str(labelled)]}
    with pytest.raises(ConfigError, match=r"^evaluate\.classifiers\.other\.training: words:w is trained already"):
        config_from_mapping({"evaluate": {"classifiers": {"other": other}}})
    for section in ("compare", "build_query"):
        with pytest.raises(ConfigError, match=rf"^{section}\.classifier\.training: a fitted"):
            config_from_mapping({section: {"classifier": "fitted"}})
    one_kind = write(tmp_path / "kind.jsonl", [{"text": text, "toxic": 0.4} for text in KIND])
    where = {"evaluate.classifiers.own": source_of(str(one_kind))}
    with pytest.raises(ValueError, match=r"^evaluate\.classifiers\.own\.training: 0 of 6 texts with a label"):
        classifier_inputs(where)
    with pytest.raises(ValueError, match=r"^classifier\.training: 0 of 6 texts"):
        make_classifier(source_of(str(one_kind)), gpus=0)
    with pytest.raises(ValueError, match=r"^classifier\.training: 0 of 0 texts"):
        load_classifier("fitted")
    gone = {"evaluate.classifier": source_of(str(labelled), str(tmp_path / "gone.jsonl"))}
    with pytest.raises(FileNotFoundError, match=r"^evaluate\.classifier\.training\[1\]\.path: .*gone\.jsonl does not"):
        classifier_inputs(gone)


def test_what_is_made_with_it_depends_on_its_texts_and_labels_and_not_on_their_place(
    tmp_path: Path, labelled: Path
) -> None:
    def inputs(path: Path) -> dict[str, str]:
        options = {"classifier": "alt-profanity-check", "classifiers": {"own": vars(source_of(str(path)))}}
        options["classifiers"]["own"]["training"] = [str(path)]
        return measured_inputs({}, {}, config_from_mapping({"evaluate": options}).evaluate)

    first = inputs(labelled)
    assert list(first) == ["evaluate.classifiers.own.training"]
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes(labelled.read_bytes())
    assert inputs(copy) == first
    rows = [json.loads(line) for line in labelled.read_text().splitlines()]
    for change in ({"toxic": 0.75}, {"text": "you are a pig"}):
        assert inputs(write(copy, [rows[0] | change, *rows[1:]])) != first
    assert classifier_inputs({"a": None, "b": config_from_mapping({}).evaluate.classifier}) == {}


def test_a_local_list_checkpoint_and_folder_are_inputs_by_what_they_hold(tmp_path: Path) -> None:
    words, checkpoint, folder = tmp_path / "words.txt", tmp_path / "model.ckpt", tmp_path / "model"
    folder.mkdir()
    sources = {
        "words": (words, ClassifierSource(name=f"words:{words}")),
        "checkpoint": (checkpoint, ClassifierSource(name="detoxify:original", checkpoint=str(checkpoint))),
        "model": (folder / "model.safetensors", ClassifierSource(name=f"hf:{folder}")),
    }
    for file, _ in sources.values():
        file.write_text("pig\n")
    for kind, (file, source) in sources.items():
        first = classifier_inputs({"k": source})
        assert list(first) == [f"k.{kind}"]
        file.write_text("pig\nfool\n")
        assert classifier_inputs({"k": source}) != first
    local = ClassifierSource(name="detoxify:original", checkpoint=str(checkpoint), huggingface_config=str(folder))
    first = classifier_inputs({"k": local})
    assert first.items() > classifier_inputs({"k": sources["checkpoint"][1]}).items()
    (folder / "tokenizer.json").write_text("{}")
    changed = classifier_inputs({"k": local})
    assert {name for name in first if first[name] != changed[name]} == {"k.huggingface_config"}
    words.write_text("fool\n\npig\n")  # the same words
    assert classifier_inputs({"k": sources["words"][1]}) == {"k.words": json_digest(["fool", "pig"])}
    assert classifier_inputs({"k": ClassifierSource(name="hf:some/model")}) == {}


def test_it_chooses_queries_and_is_checked_as_any_other(tmp_path: Path, labelled: Path) -> None:
    rows = [{"prompt": {"text": "p"}, "continuation": {"text": text}} for text in RUDE + KIND]
    section = {
        "prompts": str(write(tmp_path / "prompts.jsonl", rows)),
        "classifier": {"name": "fitted", "training": [str(labelled)]},
        "negative_threshold": 0.4,
        "resources": {"gpus": 0},
    }
    sets = choose_queries(config_from_mapping({"build_query": section}).build_query, seed=0)
    assert {row.continuation for row in sets.positive} == set(RUDE)
    assert {row.continuation for row in sets.negative} == set(KIND)
    evaluate = {"classifier": section["classifier"], "check_data": [str(labelled)]}
    (found,) = check_classifiers(config_from_mapping({"evaluate": evaluate}).evaluate, seed=0)
    assert (found["classifier"], found["class"], found["auroc"]["value"]) == ("fitted", "toxicity", 1.0)


@needs_real_text
def test_fitted_on_half_of_the_real_prompts_it_tells_the_others_apart() -> None:
    path = str(DATA / "rtp_prompts.jsonl")

    def columns(part: str, rows: list[int]) -> dict[str, Any]:
        return {"path": path, "text_column": f"{part}.text", "label_column": f"{part}.toxicity", "rows": rows}

    classifier = {"name": "fitted", "training": [columns(part, [0, 2500]) for part in ("prompt", "continuation")]}
    options = {"classifier": classifier, "check_data": [columns("continuation", [2500, 5000])]}
    (found,) = check_classifiers(config_from_mapping({"evaluate": options}).evaluate, seed=0)
    assert found["n"] == 2482
    assert found["auroc"]["value"] >= 0.899  # that of a regression on labels of 0 and 1; 0.912 on shares
