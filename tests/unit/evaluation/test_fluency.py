"""Perplexity against a loop in float64, and last words on a model that knows them."""

from __future__ import annotations

import logging
import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ifguide.evaluation import last_word_accuracy, perplexity
from ifguide.evaluation.fluency import _split_last_word
from tests.unit.evaluation.small import SENTENCES, tiny_model

# ---- perplexity ----------------------------------------------------------------------------------------


def test_perplexity_equals_a_float64_loop_for_every_batch_size(random_model):
    generator = np.random.default_rng(0)
    blocks = generator.integers(0, 257, (5, 12), dtype=np.int32)
    lengths = np.array([12, 1, 7, 0, 2])
    oracle = tiny_model().double().eval()
    nll, tokens = 0.0, 0
    for block, length in zip(blocks, lengths, strict=True):
        for j in range(1, length):
            logits = oracle(torch.from_numpy(block[None, :j].astype(np.int64))).logits[0, -1].detach()
            nll -= float(torch.log_softmax(logits, dim=0)[int(block[j])])
            tokens += 1
    for batch_size in (1, 2, 5, 8):
        result = perplexity(random_model, blocks, lengths, batch_size=batch_size)
        assert result.tokens == tokens == 18
        assert result.nll_sum == pytest.approx(nll, rel=1e-6)
        assert result.perplexity == pytest.approx(math.exp(nll / 18), rel=1e-6)
        assert result.block_tokens == (11, 0, 6, 0, 1)
        assert sum(result.block_nll) == pytest.approx(nll, rel=1e-6)


def test_perplexity_does_not_see_the_padding(random_model):
    blocks = np.arange(24, dtype=np.int32).reshape(2, 12)
    other = blocks.copy()
    other[:, 8:] = 200
    lengths = np.array([8, 8])
    assert perplexity(random_model, blocks, lengths, batch_size=2) == perplexity(
        random_model, other, lengths, batch_size=2
    )


def test_perplexity_refuses_what_it_cannot_measure(random_model):
    blocks = np.zeros((2, 4), dtype=np.int32)
    with pytest.raises(ValueError, match="no block has a predicted token"):
        perplexity(random_model, blocks, np.array([1, 0]), batch_size=1)
    with pytest.raises(ValueError, match=r"2 values in 0\.\.4"):
        perplexity(random_model, blocks, np.array([5, 1]), batch_size=1)
    with pytest.raises(ValueError, match="exceed the model's 64 positions"):
        perplexity(random_model, np.zeros((1, 65), dtype=np.int32), np.array([65]), batch_size=1)
    diverged = tiny_model()
    torch.nn.init.constant_(diverged.get_output_embeddings().weight, math.nan)
    with pytest.raises(ValueError, match="block 0 is NaN"):
        perplexity(diverged, blocks, np.array([4, 4]), batch_size=1)


# ---- last word -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 4, 16])
def test_last_word_is_right_only_when_every_token_is(memorised, tokenizer, batch_size, caplog):
    wrong = ["the cat sat on the map", "a dog ran to we"]  # `map` is wrong in its last token only
    with caplog.at_level(logging.WARNING):
        result = last_word_accuracy(
            memorised, tokenizer, [*SENTENCES, *wrong, "alone", "  alone ", ""], batch_size=batch_size
        )
    assert (result.correct, result.total, result.unusable, result.truncated) == (3, 5, 3, 0)
    assert result.accuracy == 0.6
    assert result.word_correct == (True, True, True, False, False, None, None, None)
    assert "3 of 8 texts" in caplog.text


def test_the_last_token_alone_can_be_right_where_the_word_is_not(memorised, tokenizer):
    right = last_word_accuracy(memorised, tokenizer, [SENTENCES[0]], batch_size=1)
    assert (right.accuracy, right.token_accuracy) == (1.0, 1.0)
    # in "the cat sat on the gat" the g is wrong, and "at" may or may not follow; compare with the argmax itself
    text = "the cat sat on the gat"
    ids = tokenizer(text)["input_ids"]
    greedy = memorised(torch.tensor([ids])).logits[0, -2].argmax()
    result = last_word_accuracy(memorised, tokenizer, [text, *SENTENCES], batch_size=4)
    assert result.word_correct == (False, True, True, True)
    assert result.token_correct == (bool(greedy == ids[-1]), True, True, True)
    assert result.token_accuracy == sum(result.token_correct) / 4


def test_the_space_belongs_to_the_last_word(memorised, tokenizer):
    # Two spaces were never seen: the word is right, but greedy decoding would not have written the second.
    assert last_word_accuracy(memorised, tokenizer, ["the cat sat on the mat\n"], batch_size=1).accuracy == 1.0
    assert last_word_accuracy(memorised, tokenizer, ["the cat sat on the  mat"], batch_size=1).accuracy == 0.0


def test_an_overlong_text_keeps_its_end(tokenizer):
    model = tiny_model(positions=16)
    settings = {"batch_size": 2}
    texts = ["filler " * 9 + "on the mat", "long " + "w" * 16]
    result = last_word_accuracy(model, tokenizer, texts, **settings)
    assert (result.total, result.truncated, result.unusable) == (1, 1, 1)


def test_no_usable_text_has_no_accuracy(random_model, tokenizer):
    assert last_word_accuracy(random_model, tokenizer, ["alone"], batch_size=2).accuracy is None


def test_last_words_are_read_as_documents_are_or_after_bos(memorised, tokenizer, with_bos):
    seen = []
    hook = memorised.register_forward_pre_hook(
        lambda _, arguments, named: seen.append(named["input_ids"][0].tolist()), with_kwargs=True
    )
    try:
        for special_tokens in (False, True):
            last_word_accuracy(memorised, with_bos, SENTENCES[:1], batch_size=1, special_tokens=special_tokens)
    finally:
        hook.remove()
    ids = tokenizer(SENTENCES[0])["input_ids"]
    assert seen == [ids, [257, *ids]]
    own = last_word_accuracy(memorised, with_bos, SENTENCES, batch_size=2)
    assert own == last_word_accuracy(memorised, tokenizer, SENTENCES, batch_size=2)


@given(text=st.text(st.sampled_from("ab \n\t\u3000\x1c😀"), max_size=12))
def test_the_context_is_what_comes_before_the_last_word(text: str) -> None:
    class Characters:
        def __call__(self, text: str, **_: object) -> dict[str, list]:
            return {"input_ids": list(text), "offset_mapping": [(i, i + 1) for i in range(len(text))]}

    text = text.rstrip()
    context = re.sub(r"\s*\S+$", "", text)
    expected = (list(text), len(text) - len(context)) if context else ([], 0)
    assert _split_last_word(Characters(), text, False) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize("run", ["a", " "])
def test_a_long_run_before_the_last_word_takes_one_pass(run: str) -> None:
    class Nothing:
        def __call__(self, text: str, **_: object) -> dict[str, list]:
            return {"input_ids": [7], "offset_mapping": [(0, len(text))]}

    # Each start in the run would be tried to its end: 2 * 10^11 steps.
    assert _split_last_word(Nothing(), f"x {run * 600_000} b", False) == ([7], 1)  # type: ignore[arg-type]
