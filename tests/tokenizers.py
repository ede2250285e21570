"""Tokenizers of every kind, and the characters that they differ in."""

from __future__ import annotations

import functools
from typing import Any

from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from ifguide.tokenizer import train_tokenizer

TEXTS = (
    "The weather in the city was cold, and the river ran high.",
    "You are   a clown 🤡🤡 and everyone knows it — naïve, café, 北京, ﬁne.\n\n  Go away!",
    "def f(x):\n    return x ** 2  # comment\n" * 3,
)
# Letters, runs of spaces, composed and decomposed accents, ligatures, ideographs, emoji with modifiers, NUL.
WRITTEN = st.text(st.sampled_from("ab cd\n\t éïﬁ㎯北京🤡👩🏽e\u0301\u200d\x00ßﷺ"), max_size=40)


def train_unigram(texts: Any = TEXTS, *, vocab_size: int = 120) -> PreTrainedTokenizerFast:
    """A SentencePiece-like tokenizer: NFKC, metaspace, Unigram pieces, bytes of what no piece has."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=vocab_size, unk_token="<unk>", special_tokens=["<unk>", "</s>"], show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")


def byte_level() -> PreTrainedTokenizerFast:
    """One token a byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: i for i, symbol in enumerate([*alphabet, "</s>"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


@functools.cache
def tokenizers() -> dict[str, PreTrainedTokenizerFast]:
    return {
        "bpe": train_tokenizer(TEXTS * 5, vocab_size=400),
        "unigram": train_unigram(),
        "bytes": byte_level(),
    }
