"""EMT / TP / agreement against hand-computed tables; sampling, perplexity and last word on tiny models."""

from __future__ import annotations

import logging
import math

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

from ifguide import schemas
from ifguide.config import Evaluate
from ifguide.evaluation import (
    expected_max,
    last_word_accuracy,
    perplexity,
    probability_any,
    sample_continuations,
    token_agreement,
    token_lengths,
)
from ifguide.evaluation.generation import encode_prompts
from ifguide.evaluation.generations import generate_shard
from ifguide.toxicity import PromptRow

EOS, BOS = "<|end|>", "<|begin|>"
SENTENCES = ("the cat sat on the mat", "a dog ran to me", "we all like plum pie")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte: every word has several tokens, and words share their first ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {EOS: 0} | {symbol: i + 1 for i, symbol in enumerate(alphabet)}
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=EOS)


@pytest.fixture(scope="module")
def with_bos(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The same tokens, and a BOS before every text, as Llama's tokenizer puts it."""
    raw = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    raw.add_special_tokens([BOS])
    raw.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 257)])
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token=BOS, eos_token=EOS)


def tiny_model(positions: int = 64) -> GPTNeoXForCausalLM:
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=258,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=positions,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPTNeoXForCausalLM(config)


@pytest.fixture(scope="module")
def random_model() -> GPTNeoXForCausalLM:
    return tiny_model().eval()


@pytest.fixture(scope="module")
def memorised(tokenizer: PreTrainedTokenizerFast) -> GPTNeoXForCausalLM:
    """A model that continues every prefix of SENTENCES with the rest of the sentence and EOS."""
    model = tiny_model()
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    ids = [torch.tensor(tokenizer(text)["input_ids"] + [0]) for text in SENTENCES]
    for _ in range(150):
        loss = sum(model(input_ids=row[None], labels=row[None]).loss for row in ids)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


# ---- scores --------------------------------------------------------------------------------------------

TABLE_PK = np.array([[0.1, 0.9, 0.2], [0.3, 0.4, 0.1], [0.5, 0.0, 0.0], [0.2, 0.2, 0.2]])


def test_emt_and_tp_equal_the_hand_computed_table():
    assert expected_max(TABLE_PK) == pytest.approx((0.9 + 0.4 + 0.5 + 0.2) / 4)
    assert probability_any(TABLE_PK) == 0.5  # 0.9, and 0.5 which is on the threshold
    assert probability_any(TABLE_PK, threshold=0.4) == 0.75


def test_nan_score_is_an_error_that_names_row_and_continuation():
    broken = TABLE_PK.copy()
    broken[2, 1] = np.nan
    with pytest.raises(ValueError, match="NaN at row 2, continuation 1"):
        expected_max(broken)


@pytest.mark.parametrize("scores", [np.zeros((0, 3)), np.zeros((3, 0)), np.zeros(3)])
def test_no_scores_is_an_error(scores):
    with pytest.raises(ValueError, match="non-empty"):
        probability_any(scores)


def test_agreement_equals_the_hand_computed_table():
    mask = np.array([True, True, True, False, False, False])
    known = np.array([True, False, True, True, False, True])
    result = token_agreement(mask, known)
    assert (result.selected, result.known, result.both) == (3, 4, 2)
    assert (result.precision, result.recall) == (2 / 3, 0.5)
    assert result.f1 == pytest.approx(2 / (3 / 2 + 2))  # harmonic mean of 2/3 and 1/2


def test_agreement_is_none_where_undefined_and_zero_where_disjoint():
    none, some = np.zeros(3, dtype=bool), np.array([True, False, False])
    assert token_agreement(none, some).precision is None
    assert token_agreement(none, some).recall == 0.0
    assert token_agreement(some, none).recall is None
    assert token_agreement(some, none).f1 is None
    assert token_agreement(some, ~some).f1 == 0.0
    with pytest.raises(ValueError, match="expected bool"):
        token_agreement(some.astype(int), some)
    with pytest.raises(ValueError, match="not the same tokens"):
        token_agreement(some, some[:2])


# ---- sampling ------------------------------------------------------------------------------------------

SAMPLING = {
    "continuations": 3,
    "max_new_tokens": 6,
    "top_p": 0.9,
    "temperature": 1.0,
    "seed": 7,
    "batch_size": 6,
}


def test_sampling_depends_on_the_seed_alone_and_leaves_the_callers_state(random_model, tokenizer):
    prompts = ["abc", "x", "bcd", "yy", "cde"]
    torch.manual_seed(1)
    expected_next = torch.rand(1)
    torch.manual_seed(1)
    first = sample_continuations(random_model, tokenizer, prompts, **SAMPLING)
    assert torch.equal(torch.rand(1), expected_next)
    torch.manual_seed(99)
    assert sample_continuations(random_model, tokenizer, prompts, **SAMPLING) == first
    assert [len(texts) for texts in first] == [3] * 5
    assert len({text for texts in first for text in texts}) > 5
    for change in ({"seed": 8}, {"prompt_ids": [5, 6, 7, 8, 9]}):
        assert sample_continuations(random_model, tokenizer, prompts, **{**SAMPLING, **change}) != first


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_a_continuation_is_the_same_in_any_batch_shard_and_number_of_continuations(batch_size, random_model, tokenizer):
    prompts, ids = ["abc", "x", "bcd", "yy", "cde", "abc"], [10, 11, 12, 13, 14, 20]
    whole = sample_continuations(random_model, tokenizer, prompts, **SAMPLING, prompt_ids=ids)
    assert whole[0] != whole[5]  # the same text under another id draws anew
    settings = {**SAMPLING, "batch_size": batch_size}
    assert sample_continuations(random_model, tokenizer, prompts, **settings, prompt_ids=ids) == whole
    shard = sample_continuations(random_model, tokenizer, prompts[4:1:-1], **settings, prompt_ids=ids[4:1:-1])
    assert shard == whole[4:1:-1]
    more = sample_continuations(
        random_model, tokenizer, prompts, **{**settings, "continuations": 5, "max_new_tokens": 9}, prompt_ids=ids
    )
    for texts, olds in zip(more, whole, strict=True):
        assert [text[: len(old)] for text, old in zip(texts, olds, strict=False)] == olds


def test_a_memorised_rest_is_sampled_without_prompt_and_stops_at_eos(memorised, tokenizer):
    prompts = ["the cat", "a dog ran", "we all"]
    settings = {**SAMPLING, "max_new_tokens": 30, "top_p": 0.5}
    texts = sample_continuations(memorised, tokenizer, prompts, **settings)
    assert texts == [[" sat on the mat"] * 3, [" to me"] * 3, [" like plum pie"] * 3]


def test_nucleus_of_one_token_equals_greedy_decoding(random_model, tokenizer):
    ids = tokenizer("hello")["input_ids"]
    for _ in range(6):
        ids.append(int(random_model(torch.tensor([ids])).logits[0, -1].argmax()))
    settings = {**SAMPLING, "top_p": 1e-6, "continuations": 1}
    assert sample_continuations(random_model, tokenizer, ["hello"], **settings) == [[tokenizer.decode(ids[5:])]]


def test_the_checkpoints_generation_defaults_do_not_decide(random_model, tokenizer):
    expected = sample_continuations(random_model, tokenizer, ["abc"], **SAMPLING)
    random_model.generation_config.repetition_penalty = 50.0
    random_model.generation_config.min_new_tokens = 3
    try:
        assert sample_continuations(random_model, tokenizer, ["abc"], **SAMPLING) == expected
        assert random_model.generation_config.repetition_penalty == 50.0
    finally:
        random_model.generation_config.repetition_penalty = None
        random_model.generation_config.min_new_tokens = None


def test_empty_prompt_starts_from_eos_and_dropout_is_off(tokenizer):
    model = tiny_model()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.9
    model.train()
    settings = {**SAMPLING, "top_p": 1e-6}
    texts = sample_continuations(model, tokenizer, ["", EOS], **settings)
    assert texts[0] == texts[1]
    assert len(set(texts[0])) == 1
    assert model.training


def test_an_overlong_prompt_keeps_its_end_and_is_counted(tokenizer, caplog):
    model = tiny_model(positions=16)
    settings = {**SAMPLING, "max_new_tokens": 6}
    with caplog.at_level(logging.WARNING):
        long = sample_continuations(model, tokenizer, ["z" * 30 + "0123456789"], **settings)
    assert "1 of 1 prompts exceed 10 tokens" in caplog.text
    assert long == sample_continuations(model, tokenizer, ["0123456789"], **settings)
    with pytest.raises(ValueError, match="leaves no room"):
        sample_continuations(model, tokenizer, ["a"], **{**SAMPLING, "max_new_tokens": 16})


@pytest.mark.parametrize(
    "change", [{"top_p": 0.0}, {"temperature": 0.0}, {"continuations": 0}, {"batch_size": 0}, {"prompt_ids": [1, 2]}]
)
def test_sampling_settings_out_of_range_are_errors(random_model, tokenizer, change):
    with pytest.raises(ValueError, match=r"temperature|at least 1|1 prompts but 2 prompt_ids"):
        sample_continuations(random_model, tokenizer, ["a"], **{**SAMPLING, **change})


# ---- special tokens: of the models that were trained with them ------------------------------------------


def test_prompts_begin_as_documents_do_or_with_the_tokenizers_own_bos(random_model, tokenizer, with_bos):
    prompts = ["abc", "", "the cat sat"]
    ids = [tokenizer(text)["input_ids"] for text in prompts]
    assert encode_prompts(random_model, with_bos, prompts, 5) == [ids[0], [0], ids[2]]
    assert encode_prompts(random_model, with_bos, prompts, 5, special_tokens=True) == [[257, *row] for row in ids]
    assert token_lengths(with_bos, prompts) == [3, 0, 11]
    assert token_lengths(with_bos, prompts, special_tokens=True) == [4, 1, 12]
    plain = sample_continuations(random_model, tokenizer, prompts, **SAMPLING)
    assert sample_continuations(random_model, with_bos, prompts, **SAMPLING) == plain
    assert sample_continuations(random_model, with_bos, prompts, **SAMPLING, special_tokens=True) != plain
    # a tokenizer that adds nothing gives the same either way
    assert sample_continuations(random_model, tokenizer, prompts, **SAMPLING, special_tokens=True) == plain


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


def test_given_models_keep_their_special_tokens_and_the_runs_own_have_none(random_model, with_bos, tmp_path):
    options = Evaluate(models={"given": "owner/name"}, continuations=3, max_new_tokens=5, top_p=0.9, batch_size=4)
    prompts = [PromptRow(row=7, prompt="abc", prompt_scores={}, continuation="", continuation_scores={})]
    settings = {**SAMPLING, "continuations": 3, "max_new_tokens": 5, "prompt_ids": [7]}
    for name, special_tokens in (("given", True), ("baseline", False), ("a_method", False)):
        path = tmp_path / f"{name}.parquet"
        generate_shard(path, name, random_model, with_bos, prompts, options, SAMPLING["seed"])
        found = schemas.read_table(path, schemas.GENERATIONS).column("continuation").to_pylist()
        expected = sample_continuations(random_model, with_bos, ["abc"], **settings, special_tokens=special_tokens)
        assert found == expected[0]


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
