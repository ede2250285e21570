"""The texts of tokens that the report and `ifguide inspect` show: together they are the text, in any tokenizer."""

from __future__ import annotations

import dataclasses
import functools
import io
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from ifguide.report.contents import RankedDocument, Token
from ifguide.report.page import ColourRamp, token_spans
from ifguide.report.terminal import COLOURS, DIM, PLAIN, RED, RESET, _painted, _tau_line, paint_for
from ifguide.report.view import ShownDocument, token_texts
from ifguide.selection.fdr import LARGEST
from ifguide.tokenizer import train_tokenizer

TEXT = "This is a text 🤡🤡 北京。\n Is it?"
WRITTEN = st.text(st.sampled_from("This a\n\té北京🤡👩🏽\u0301\u200dß\ufffd"), max_size=40)


def sentencepiece() -> PreTrainedTokenizerFast:
    """As Llama 2's: a space before the text, which the decoder strips, and bytes of what no token has."""
    merges = [(word[:i], word[i]) for word in ("▁This", "▁is", "▁a", "▁text") for i in range(1, len(word))]
    names = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁Thisatex", *map("".join, merges)]
    vocabulary = {name: index for index, name in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")


@functools.cache
def tokenizers() -> dict[str, PreTrainedTokenizerFast]:
    """Few of their tokens are longer than a byte, so that most characters are of several."""
    return {"sentencepiece": sentencepiece(), "bytes": train_tokenizer(["This is a text."] * 9, vocab_size=270)}


def tokens_of(text: str, name: str) -> np.ndarray:
    return np.array(tokenizers()[name].encode(text, add_special_tokens=False), dtype=np.int64)


def texts_of(text: str, name: str, window: slice = slice(0, 600)) -> list[str]:
    return token_texts(tokenizers()[name], tokens_of(text, name), window)


@given(text=WRITTEN, name=st.sampled_from(["sentencepiece", "bytes"]))
def test_the_texts_of_tokens_joined_are_the_text(text: str, name: str) -> None:
    texts = texts_of(text, name)
    assert "".join(texts) == text
    assert len(texts) == len(tokens_of(text, name))


def test_a_tokens_text_has_its_space() -> None:
    assert texts_of("This is a text", "sentencepiece") == ["This", " is", " a", " text"]


@pytest.mark.parametrize("name", ["sentencepiece", "bytes"])
def test_a_character_of_several_tokens_is_the_first_ones(name: str) -> None:
    texts = texts_of("a🤡🤡京a", name)
    assert texts[-13:] == ["a", "🤡", "", "", "", "🤡", "", "", "", "京", "", "", "a"]


@pytest.mark.parametrize("name", ["sentencepiece", "bytes"])
def test_a_window_shows_what_the_whole_document_shows_there(name: str) -> None:
    text = TEXT * 8
    whole = texts_of(text, name)
    assert "".join(whole) == text
    for begin in range(len(whole) - 40):
        assert texts_of(text, name, slice(begin, begin + 40)) == whole[begin : begin + 40]


def test_inspect_shows_the_characters_of_the_text_and_no_controls() -> None:
    texts = ("far", " away", " 北京\u3000", "👩\u200d", "", "\x1b[2J")
    masked = np.array([False, False, False, True, True, False])
    document = ShownDocument(
        unit_id=0,
        source="s",
        rank=1,
        rank_score=0.5,
        texts=texts,
        scores=np.zeros(6),
        masked=masked,
        annotated=masked,
        left_out=0,
    )
    red = f"{RED}👩\u200d{RESET}"
    assert _painted(document, 1, COLOURS) == f"{DIM} ... {RESET} 北京\u3000{red}␛[2J"
    assert _painted(document, 1, PLAIN) == " ...  北京\u3000⟦👩\u200d⟧␛[2J"
    heart = dataclasses.replace(document, texts=(*texts[:3], "❤", "\ufe0f\u200d", "🔥\u200b"))
    assert _painted(heart, 1, PLAIN) == " ...  北京\u3000⟦❤\ufe0f\u200d⟧🔥\ufffd"


def test_the_page_shows_what_changes_the_token_before_it() -> None:
    texts = ("❤", "\ufe0f", " \u200d")
    document = RankedDocument(
        doc_id=0, source="s", rank=1, rank_score=1.0, tokens=tuple(Token(text=text, score=1.0) for text in texts)
    )
    shown = re.findall(r">([^<]*)</span>", token_spans(document, ColourRamp(0.0, 1.0)))
    assert shown == ["❤", "\ufe0f", " \ufffd"]


def test_a_tau_above_every_token_is_told_in_words() -> None:
    assert _tau_line(0.25, "influence score") == "tau 0.25 of the influence score"
    assert _tau_line(LARGEST, "z-score") == "no z-score is above tau"


def test_colours_are_for_terminals_unless_a_variable_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    file, terminal = io.StringIO(), io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    assert [paint_for(file), paint_for(terminal)] == [PLAIN, COLOURS]
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert paint_for(file) == COLOURS
    monkeypatch.setenv("NO_COLOR", "1")
    assert paint_for(terminal) == PLAIN
