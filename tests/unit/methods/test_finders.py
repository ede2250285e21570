"""ifguide.methods.finders: what a word is at its edges (the rest is covered with the demo data)."""

import numpy as np
import pytest

from ifguide.methods.finders import classifier_spans, word_list_spans


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["a$$"], ["a$$", "A$$"]),
        (["rat", "rat race"], ["rat race", "rat"]),
        (["", "rat"], ["rat", "rat"]),
        ([""], []),
        (["r.t"], []),
        (["écrit"], ["Écrit"]),
    ],
)
def test_words_may_have_marks_spaces_or_accents_and_the_longest_wins(words, found):
    text = "An a$$ (A$$), a ba$$ in a rat race; a rat. Écrit, rats."
    assert [text[start:end] for start, end in word_list_spans(text, words)] == found


def test_classifier_sees_every_sentence_of_a_text_in_one_call_without_its_quotation_marks():
    calls = []

    def classify(sentences: list[str]) -> np.ndarray:
        calls.append(sentences)
        return np.ones(len(sentences))

    text = 'Anna: “Go!” "I will." He left.'
    spans = classifier_spans(text, classify)
    assert calls == [["Anna:", "Go!", "I will.", "He left."]]
    assert [text[start:end] for start, end in spans] == calls[0]
