"""Continuations on tiny models: the same in any batch, from the nucleus, with the special tokens of their model."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import processors

from ifguide import schemas
from ifguide.artifacts import open_artifact
from ifguide.config import Config, Evaluate, ModelSource
from ifguide.evaluation import sample_continuations, token_lengths
from ifguide.evaluation.generation import encode_prompts
from ifguide.evaluation.generations import generate_shard, takes_special_tokens
from ifguide.run import Run
from ifguide.toxicity import PromptRow
from tests.unit.evaluation.small import EOS, tiny_model

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
    room = random_model.config.max_position_embeddings - 5
    (long,) = encode_prompts(random_model, with_bos, ["the cat sat " * room], 5, special_tokens=True)
    assert (long[0], len(long)) == (257, room)
    closing = copy.deepcopy(with_bos)
    closing.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A <|endoftext|>".replace("<s>", with_bos.bos_token).replace("<|endoftext|>", with_bos.eos_token),
        special_tokens=[(with_bos.bos_token, 257), (with_bos.eos_token, 0)],
    )
    assert closing("abc")["input_ids"][-1] == 0
    assert encode_prompts(random_model, closing, prompts, 5, special_tokens=True) == [[257, *row] for row in ids]
    assert token_lengths(with_bos, prompts) == [3, 0, 11]
    assert token_lengths(with_bos, prompts, special_tokens=True) == [4, 1, 12]
    plain = sample_continuations(random_model, tokenizer, prompts, **SAMPLING)
    assert sample_continuations(random_model, with_bos, prompts, **SAMPLING) == plain
    assert sample_continuations(random_model, with_bos, prompts, **SAMPLING, special_tokens=True) != plain
    # a tokenizer that adds nothing gives the same either way
    assert sample_continuations(random_model, tokenizer, prompts, **SAMPLING, special_tokens=True) == plain


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


def test_a_model_that_another_run_trained_begins_as_the_runs_own(tmp_path: Path) -> None:
    folder = tmp_path / "other" / "model" / "penalised"
    artifact = open_artifact(folder, verb="pretrain", options={}, inputs={}, config_yaml="")
    options = Evaluate(models={"other": str(folder / "hf"), "hub": "owner/name", "local": str(tmp_path)})
    assert takes_special_tokens(options, "other"), "nothing says what made it"
    artifact.finish([], rows={}, summary={})
    found = {name: takes_special_tokens(options, name) for name in ("penalised", "other", "hub", "local")}
    assert found == {"penalised": False, "other": False, "hub": True, "local": True}


@pytest.mark.parametrize("verb", ["pretrain", "compare"])
def test_a_proxy_that_another_run_trained_begins_as_the_runs_own(tmp_path: Path, monkeypatch, verb: str) -> None:
    """Also one that is named from within the folder that it lies in, as a hub's model is."""
    folder = tmp_path / "other" / "model" / "baseline"
    artifact = open_artifact(folder, verb=verb, options={}, inputs={}, config_yaml="")
    monkeypatch.chdir(folder.parent)

    def is_trained(**proxy: Any) -> bool:
        return Run(config=Config(run_dir=str(tmp_path / "own"), proxy=ModelSource(**proxy))).proxy_is_trained

    assert not is_trained(source=str(folder / "hf")), "nothing says what made it"
    artifact.finish([], rows={}, summary={})
    assert is_trained(source=str(folder / "hf"))
    assert is_trained(source="baseline/hf")
    assert is_trained()
    assert not is_trained(source="owner/name")
    assert not is_trained(source=str(tmp_path))
    assert not is_trained(architecture={"model_type": "llama"})
