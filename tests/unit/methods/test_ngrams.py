"""ifguide.methods.ngrams: log-odds against the formula, words against the text they are spelt in, scores of tokens."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ifguide.config.compare import Ngrams
from ifguide.methods.finders import word_spans
from ifguide.methods.ngrams import Words, _joins, fit_ngrams, load_ngrams, log_odds, ngrams_of
from ifguide.methods.reading import QuerySets
from tests.tokenizers import tokenizers

POSITIVE = ["you are a clown", "what a clown, a clown", "clown go away", "the river runs"]
NEGATIVE = ["the weather is cold", "the river runs high", "what a river", "go to the city"]


def by_formula(positive: list[str], negative: list[str], prior: float, word: str) -> float:
    """Monroe et al. 2008, Eqs. 15, 20, 22, one word at a time."""
    y, z = positive.count(word), negative.count(word)
    n, m = len(positive), len(negative)
    a = prior * (y + z) / (n + m)
    omega_y = (y + a) / (n + prior - (y + a))
    omega_z = (z + a) / (m + prior - (z + a))
    return math.log(omega_y / omega_z) / (1 / (y + a) + 1 / (z + a)) ** 0.5


@given(
    positive=st.lists(st.sampled_from("abcdef"), min_size=1, max_size=30),
    negative=st.lists(st.sampled_from("abcdef"), min_size=1, max_size=30),
    prior=st.floats(0.1, 1000),
)
def test_log_odds_are_the_formula_s(positive: list[str], negative: list[str], prior: float) -> None:
    scores = log_odds(Counter(positive), Counter(negative), prior)
    assert scores.keys() == {*positive, *negative}
    if len(scores) == 1:
        assert set(scores.values()) == {0.0}
        return
    for word, score in scores.items():
        assert score == pytest.approx(by_formula(positive, negative, prior, word), rel=1e-9, abs=1e-12)
    swapped = log_odds(Counter(negative), Counter(positive), prior)
    assert {word: -score for word, score in swapped.items()} == pytest.approx(scores)


@pytest.mark.parametrize("kind", ["bpe", "unigram", "bytes"])
def test_tokens_spell_the_words_of_their_text(kind: str) -> None:
    tokenizer = tokenizers()[kind]
    text = "The river ran high. You are   a clown, don't go! naïve café x ** 2"
    if kind == "unigram":
        text = text.replace("'", "")  # which it has no piece of
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    runs = Words(tokenizer).runs(tokens)
    assert runs[0][0] == 0
    assert all(a[1] == b[0] for a, b in itertools.pairwise(runs))
    assert runs[-1][1] == len(tokens)
    words = [word for _, _, word in runs if word]
    if kind == "unigram":  # a piece may hold several words
        assert "".join(words).replace(" ", "") == "".join(text[a:b].casefold() for a, b in word_spans(text))
    else:
        assert words == [text[a:b].casefold() for a, b in word_spans(text)]


@pytest.mark.parametrize("kind", ["bpe", "bytes"])
def test_a_word_whose_letters_have_marks_is_one_word(kind: str) -> None:
    text = "वह कुत्ता है। cafe\u0301s ผู้ชาย"
    tokenizer = tokenizers()[kind]
    runs = Words(tokenizer).runs(tokenizer(text, add_special_tokens=False)["input_ids"])
    assert [word for _, _, word in runs if word] == ["वह", "कुत्ता", "है", "cafe\u0301s", "ผู้ชาย"]


def test_a_token_that_is_a_mark_goes_on_with_a_word() -> None:
    assert [_joins(character) for character in ("a", "é", "\u0301", "\u093f", "'", "\ufffd", " ", ".", "।", "")] == [
        *[True] * 6,
        *[False] * 4,
    ]


def test_bigrams_go_over_punctuation_and_not_over_the_end_of_a_document() -> None:
    tokenizer = tokenizers()["bpe"]
    end = [tokenizer.eos_token_id]
    tokens = tokenizer("go, clown!")["input_ids"] + end + tokenizer("the city")["input_ids"]
    found = ngrams_of(Words(tokenizer).runs(tokens), 2)
    assert [ngram for ngram, _ in found] == ["go", "clown", "go clown", "the", "city", "the city"]


def test_a_token_has_the_score_of_its_word_or_of_the_best_pair_with_it(tmp_path: Path) -> None:
    tokenizer = tokenizers()["bpe"]
    positive, negative = ([("say:", f" {text}") for text in texts] for texts in (POSITIVE, NEGATIVE))
    finder = fit_ngrams(tokenizer, QuerySets(positive=positive, negative=negative), options=Ngrams(longest=2, prior=10))
    counts = []
    for texts in (POSITIVE, NEGATIVE):
        words = [[text[a:b] for a, b in word_spans(text)] for text in texts]
        single = [word for own in words for word in own]
        counts.append((single, [f"{a} {b}" for own in words for a, b in itertools.pairwise(own)]))
    z = {
        ngram: by_formula(counts[0][size], counts[1][size], 10, ngram)
        for size in (0, 1)
        for ngram in {*counts[0][size], *counts[1][size]}
    }
    assert finder.scores == pytest.approx(z)  # the prompt's word is not counted
    encoded = tokenizer("xx What a Clown!? unknownword", add_special_tokens=False, return_offsets_mapping=True)
    wanted = {"what": max(z["what"], z["what a"]), "a": max(z["a"], z["what a"], z["a clown"])}
    wanted["clown"] = max(z["clown"], z["a clown"])
    (scores,) = finder.score([encoded["input_ids"]])
    assert scores.dtype == np.float32
    text = "xx what a clown!? unknownword"
    for score, (start, stop) in zip(scores, encoded["offset_mapping"], strict=True):
        word = next((text[a:b] for a, b in word_spans(text) if a < stop and b > start), "")
        assert score == pytest.approx(wanted.get(word, 0.0), rel=1e-6)
    assert max(scores) == np.float32(wanted["clown"]) > 0
    finder.save(tmp_path / "ngrams.json")
    (again,) = load_ngrams(tmp_path / "ngrams.json", tokenizer).score([encoded["input_ids"]])
    np.testing.assert_array_equal(again, scores)
    assert next(iter(finder.summary["highest"])) == "clown"
