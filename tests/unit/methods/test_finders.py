"""ifguide.methods.finders and marks: words and sentences that a classifier is given (the rest: with the demo data)."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ifguide.config import ClassifierSource
from ifguide.methods import masks
from ifguide.methods.finders import classifier_spans, sentence_spans, word_spans
from ifguide.methods.marks import find_classified_words


def test_classifier_sees_every_sentence_of_a_text_in_one_call_without_its_quotation_marks():
    calls = []

    def classify(sentences: list[str]) -> np.ndarray:
        calls.append(sentences)
        return np.ones(len(sentences))

    text = 'Anna: “Go!” "I will." He left.'
    spans = classifier_spans(text, classify)
    assert calls == [["Anna:", "Go!", "I will.", "He left."]]
    assert [text[start:end] for start, end in spans] == calls[0]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Don't, he said: 'f*ck a$$'!", ["Don't", "he", "said", "f*ck", "a$$"]),
        ("naïve 3rd **bold** (it’s)", ["naïve", "3rd", "bold**", "it’s"]),
        (" ... — ", []),
        ("कुत्ता है।", ["कुत्ता", "है"]),
        ("ผู้ชาย โง่", ["ผู้ชาย", "โง่"]),
        ("هُوَ غَبِيٌّ!", ["هُوَ", "غَبِيٌّ"]),
        ("Cafe\u0301s, nai\u0308ve", ["Cafe\u0301s", "nai\u0308ve"]),
    ],
)
def test_words_end_where_their_letters_and_what_stands_for_them_do(text: str, words: list[str]) -> None:
    assert [text[start:stop] for start, stop in word_spans(text)] == words


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("你好。你真是个笨蛋！真的吗？？是", ["你好。", "你真是个笨蛋！", "真的吗？？", "是"]),
        ("「行け。」と言った。", ["行け。", "と言った。"]),
        ("यह अच्छा है। वह मूर्ख है॥ हाँ", ["यह अच्छा है।", "वह मूर्ख है॥", "हाँ"]),
        ("هل هو غبي؟ نعم.", ["هل هو غبي؟", "نعم."]),
        ("第1.5节。完", ["第1.5节。", "完"]),
        ("Really?! He left: 3.5 km.\nNo", ["Really?!", "He left:", "3.5 km.", "No"]),
    ],
)
def test_sentences_end_at_the_marks_of_every_script(text: str, sentences: list[str]) -> None:
    assert [text[start:stop] for start, stop in sentence_spans(text)] == sentences


LATIN = st.text(st.sampled_from("aB3_ \u00e9\u00df\u20ac'’*@$.!?:;,-\"“”…«»\t\n"), max_size=40)
LATIN_WORD = re.compile(r"\w(?:[\w'’*@$]*[\w*@$])?")
LATIN_SENTENCE = re.compile(r'[^\s"“”](?:[^.!?:\n]|[.!?:](?![\s"“”.!?]|$))*(?:[.!?]+|:)?')


@given(text=LATIN)
def test_latin_text_has_the_words_and_sentences_of_letters_and_latin_marks_alone(text: str) -> None:
    assert word_spans(text) == [match.span() for match in LATIN_WORD.finditer(text)]
    sentences = [text[start:stop] for start, stop in sentence_spans(text)]
    assert sentences == [match.group().rstrip('"“” \t') for match in LATIN_SENTENCE.finditer(text)]


def test_words_are_classified_alone_and_once_each():
    calls = []

    def classify(words: list[str]) -> np.ndarray:
        calls.append(words)
        return np.array([0.5 if word.casefold() == "pig" else 0.49 for word in words])

    texts = ["The pig saw a Pig.", "", "A pigsty; pig"]
    marked = find_classified_words(classify, 0.5)(texts)
    assert calls == [sorted({"The", "pig", "saw", "a", "Pig", "A", "pigsty"})]
    assert [[text[a:b] for a, b in own] for text, own in zip(texts, marked, strict=True)] == [
        ["pig", "Pig"],
        [],
        ["pig"],
    ]
    assert find_classified_words(classify, 0.5)(["..."]) == [[]]
    assert len(calls) == 1


def test_a_score_that_is_no_number_is_refused_with_its_text(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        name, classes = "broken", ("toxicity",)

        def score(self, texts: list[str]) -> dict[str, np.ndarray]:
            return {"toxicity": np.array([float("nan") if "pig" in text else 0.0 for text in texts])}

    monkeypatch.setattr(masks, "make_classifier", lambda *_, **__: Broken())
    marking = masks.Marking(
        kind="sentences", words=(), classifier=ClassifierSource(name="broken"), threshold=0.5, tokenizer="t", seed=0
    )
    find = marking.finder()
    assert find(["All is well."]) == [[]]
    with pytest.raises(ValueError, match=r"^broken gives nan for 'You pig.'; it must be finite"):
        find(["All is well. You pig."])
