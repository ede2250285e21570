"""ifguide.corpus.pieces: a text has the same tokens in pieces as whole, whatever its tokenizer, and little memory."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ifguide.corpus import packing
from ifguide.corpus.packing import tokenise
from ifguide.corpus.pieces import encode, encode_long
from ifguide.corpus.reading import RawDocument
from tests.tokenizers import WRITTEN, tokenizers

NAMES = ["bpe", "unigram", "bytes"]


def assert_same_in_pieces(text: str, name: str, piece: int, margin: int) -> int:
    parts = list(encode_long(text, tokenizers()[name], piece=piece, margin=margin))
    (whole,) = encode([text], tokenizers()[name])
    np.testing.assert_array_equal(np.concatenate([part.ids for part in parts]), whole.ids)
    np.testing.assert_array_equal(np.concatenate([part.offsets for part in parts]), whole.offsets)
    return len(parts)


@settings(max_examples=150)
@given(texts=st.lists(WRITTEN, max_size=40), name=st.sampled_from(NAMES), piece=st.integers(64, 300))
def test_the_tokens_are_those_of_the_whole_text(texts, name, piece):
    assert_same_in_pieces(" ".join(texts), name, piece, margin=24)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("text", ["a", "ab", " ", "\n", "\u00e9", "\U0001f600", "e\u0301", "the", "  x"])
def test_long_runs_and_words_longer_than_a_piece_have_the_tokens_of_the_whole(text, name):
    for times in (1, 63, 64, 65, 500, 501):
        assert_same_in_pieces(text * times, name, piece=64, margin=24)
        assert_same_in_pieces("one two " * 30 + text * times + " three four" * 30, name, piece=64, margin=24)


@pytest.mark.parametrize("name", NAMES)
def test_ordinary_text_is_cut(name):
    text = " ".join(f"the {word} sat on mat {number}." for number, word in enumerate(["cat", "dog"] * 200))
    assert assert_same_in_pieces(text, name, piece=512, margin=64) > 10


def test_a_long_document_among_short_ones_is_tokenised_as_each_alone(monkeypatch):
    documents = [
        RawDocument(row=row, text=text, spans=((2, 9), (len(text) // 2, len(text) // 2 + 3)))
        for row, text in enumerate(["one two three", "the cat sat on the mat. " * 400, "", "four five six", "x" * 700])
    ]
    tokenizer = tokenizers()["bpe"]
    alone = [tokenise([document], tokenizer, annotate=True)[0] for document in documents]
    monkeypatch.setattr(packing, "PIECE_CHARS", 300)
    monkeypatch.setattr(packing, "encode_long", lambda *args: encode_long(*args, piece=300, margin=32))
    for found, expected in zip(tokenise(documents, tokenizer, annotate=True), alone, strict=True):
        for name in ("tokens", "stops", "annotated"):
            np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
            assert getattr(found, name).dtype == getattr(expected, name).dtype


def test_a_long_document_takes_few_times_its_size():
    """Of Python's and numpy's memory, over the text itself; the tokenizer's own goes with each window."""
    text = "the cat sat on the mat. " * 200_000
    tokenise([RawDocument(row=0, text="warm")], tokenizers()["bpe"], annotate=False)
    tracemalloc.start()
    tokenise([RawDocument(row=0, text=text)], tokenizers()["bpe"], annotate=False)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 * len(text) + 64e6  # of a window's Python lists
