"""ifguide.methods.finders: what a word is at its edges (the rest is covered with the demo data)."""

import numpy as np

from ifguide.methods.finders import classifier_spans


def test_classifier_sees_every_sentence_of_a_text_in_one_call_without_its_quotation_marks():
    calls = []

    def classify(sentences: list[str]) -> np.ndarray:
        calls.append(sentences)
        return np.ones(len(sentences))

    text = 'Anna: “Go!” "I will." He left.'
    spans = classifier_spans(text, classify)
    assert calls == [["Anna:", "Go!", "I will.", "He left."]]
    assert [text[start:end] for start, end in spans] == calls[0]
