"""ifguide.corpus.pieces: a text has the same tokens in pieces as whole, whatever its tokenizer."""

import copy
import functools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, trainers
from transformers import PreTrainedTokenizerFast

from ifguide.corpus import packing
from ifguide.corpus.packing import tokenise
from ifguide.corpus.pieces import encode, encode_long
from ifguide.corpus.reading import RawDocument
from tests.tokenizers import TEXTS, WRITTEN, tokenizers

NAMES = ["bpe", "unigram", "bytes", "bpe of special_tokens: text", "words of several", "sentencepiece bpe"]
SPECIAL = ["<|endoftext|>", "</s>", "<unk>", "<|endof", "text|>"]


def train_unsplit(*, normalized: bool) -> PreTrainedTokenizerFast:
    """A BPE without pre-tokenisation, whose tokens go over spaces; `normalized` as Llama 2 does it, with a "▁" put
    before the text, one for each space, and bytes of what it has no token for."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=normalized, unk_token="<unk>"))
    if normalized:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    alphabet = [f"<0x{byte:02X}>" for byte in range(256)] if normalized else []
    trainer = trainers.BpeTrainer(
        vocab_size=len(alphabet) + 400, special_tokens=["<unk>", "</s>", *alphabet], show_progress=False
    )
    tokenizer.train_from_iterator([line for text in TEXTS for line in text.split("\n")] * 5, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")


@functools.cache
def tokenizer_of(name: str) -> PreTrainedTokenizerFast:
    if name == "words of several":
        return train_unsplit(normalized=False)
    if name == "sentencepiece bpe":
        return train_unsplit(normalized=True)
    kind, _, special = name.partition(" of ")
    tokenizer = copy.deepcopy(tokenizers()[kind])
    tokenizer.split_special_tokens = bool(special)
    return tokenizer


def assert_same_in_pieces(text: str, name: str, piece: int, margin: int) -> int:
    parts = list(encode_long(text, tokenizer_of(name), piece=piece, margin=margin))
    (whole,) = encode([text], tokenizer_of(name))
    np.testing.assert_array_equal(np.concatenate([part.ids for part in parts]), whole.ids)
    np.testing.assert_array_equal(np.concatenate([part.offsets for part in parts]), whole.offsets)
    return len(parts)


@settings(max_examples=300)
@given(
    texts=st.lists(WRITTEN | st.sampled_from([*SPECIAL, *TEXTS]), max_size=40),
    name=st.sampled_from(NAMES),
    piece=st.integers(64, 300),
)
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


def test_the_name_of_a_special_token_is_one_token_or_text_as_asked():
    text = "the cat sat. <|endoftext|> the dog sat. " * 60
    for name, count in (("bpe", 60), ("bpe of special_tokens: text", 0)):
        assert_same_in_pieces(text, name, piece=200, margin=48)
        ids = np.concatenate([part.ids for part in encode_long(text, tokenizer_of(name), piece=200, margin=48)])
        assert (ids == tokenizer_of(name).eos_token_id).sum() == count
