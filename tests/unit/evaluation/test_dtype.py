"""`evaluate.dtype`: the models are loaded in it, and what was made in float32 before the key came is still valid."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import GPTNeoXForCausalLM, PreTrainedTokenizerFast

from ifguide.config import ClassifierSource, Evaluate, Input, Prompts
from ifguide.evaluation.generations import sampled_options
from ifguide.evaluation.prompts import chosen_sets
from ifguide.evaluation.subjects import measured_inputs
from ifguide.evaluation.worker import EvaluateModel, Fluency, WorkerSettings


@pytest.fixture
def settings(tmp_path: Path, memorised: GPTNeoXForCausalLM, tokenizer: PreTrainedTokenizerFast) -> WorkerSettings:
    memorised.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": "the cat"}) + "\n")
    (tmp_path / "texts.jsonl").write_text(json.dumps({"text": "the cat sat on the dog"}) + "\n")
    (tmp_path / "words.txt").write_text("pig\n")
    options = Evaluate(
        prompts=Prompts(path=str(tmp_path / "prompts.jsonl")),
        classifier=ClassifierSource(name=f"words:{tmp_path / 'words.txt'}"),
        heldout=(Input(path=str(tmp_path / "texts.jsonl")),),
    )
    options = replace(options, resources=replace(options.resources, gpus=0.0))
    return WorkerSettings(
        options=options,
        sources={"model": str(tmp_path / "model")},
        seed=0,
        block_size=32,
        report=tmp_path / "report",
        generations={},
        guides={},
        digests=measured_inputs({}, chosen_sets(options, 0), options),
    )


def test_models_are_loaded_in_the_dtype_and_measured_alike(settings: WorkerSettings) -> None:
    perplexities = {}
    for dtype in ("float32", "bfloat16"):
        worker = EvaluateModel(replace(settings, options=replace(settings.options, dtype=dtype)))
        perplexities[dtype] = worker.process(Fluency(model="model", kind="heldout"))["perplexity"]
        assert worker.loaded is not None
        assert {value.dtype for value in worker.loaded[1].parameters()} == {getattr(torch, dtype)}
    assert perplexities["bfloat16"] != perplexities["float32"]
    assert perplexities["bfloat16"] == pytest.approx(perplexities["float32"], rel=0.05)


def test_float32_continuations_are_those_of_before() -> None:
    options = Evaluate()
    assert sampled_options(options).keys() == {
        "continuations",
        "max_new_tokens",
        "top_p",
        "temperature",
        "prompts_per_shard",
        "batch_size",
    }
    assert sampled_options(replace(options, dtype="bfloat16"))["dtype"] == "bfloat16"
