"""HateSonar, by the model of its package: probabilities of three kinds, whatever locales the system has."""

from __future__ import annotations

import numpy as np
import pytest

from ifguide.toxicity.classifiers import load_classifier

TEXTS = [
    "You are a stupid bitch.",
    "They are vermin. kill all of them.",
    "The lake is calm today.",
    "",
    "湖は静かです" * 300,
]


def test_offence_and_hate_are_told_from_calm_texts() -> None:
    classifier = load_classifier("hatesonar")
    assert classifier.classes == ("toxicity", "hate_speech", "offensive_language")
    scores = classifier.score(TEXTS)
    assert {values.dtype for values in scores.values()} == {np.dtype(np.float32)}
    toxicity, hate, offence = (scores[name] for name in classifier.classes)
    assert (toxicity[:2] > 0.7).all()
    assert (toxicity[2:] < 0.5).all()
    assert offence[0] > hate[0]
    assert hate[1] > offence[1]
    np.testing.assert_allclose(toxicity, hate + offence, atol=1e-5)


def test_a_text_has_one_score_in_any_case_and_batch() -> None:
    classifier = load_classifier("hatesonar")
    whole = classifier.score(TEXTS)["toxicity"]
    assert [classifier.score([text])["toxicity"][0] for text in TEXTS] == whole.tolist()
    np.testing.assert_array_equal(classifier.score([text.upper() for text in TEXTS])["toxicity"], whole)
    assert classifier.score([])["toxicity"].shape == (0,)


def test_it_has_no_label_to_choose() -> None:
    with pytest.raises(ValueError, match="has no `label`"):
        load_classifier("hatesonar", label="hate_speech")
