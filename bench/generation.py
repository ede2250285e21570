"""Continuations per second against the paper's way: `python bench/generation.py [--model neox|smollm2]`.

The paper's way: every prompt padded on the left to 256 tokens, `generate` of transformers with
`num_return_sequences=25`, in one process; the better of two numbers of prompts at once. Ours: `sample_tokens`, which
batches prompts of one length without padding, encodes a prompt once, and draws from the nucleus without sorting. Both
draw exactly 20 tokens, or to an EOS, of top-p 0.9 in float32 on the same threads, from prompts of mixed length.

Rounds alternate; medians of continuations per second, and per second of CPU time (`cpu_speedup`), which other work on
the machine disturbs less. Before timing, greedy continuations of both are compared, and the
shares of sampled tokens with those of the float64 nucleus. One JSON line is printed last.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

from bench.common.places import DATA, this_machine
from bench.common.proxies import load_smollm2
from ifguide.config import ModelSource
from ifguide.evaluation.generation import UNIFORMS, Sampling, sample_nucleus, sample_tokens
from ifguide.models import load_model
from ifguide.tokenizer import train_tokenizer

RTP = DATA / "rtp_prompts.jsonl"
NEOX = {
    "model_type": "gpt_neox",
    "hidden_size": 384,
    "num_hidden_layers": 8,
    "num_attention_heads": 6,
    "intermediate_size": 1536,
    "max_position_embeddings": 512,
    "initializer_range": 0.06,
}
WORDS = ("the", "of", "and", "to", "in", "a", "is", "that", "for", "it", "was", "on", "are", "as", "with", "they", "be")
PADDED = 256


def prompts_of_mixed_length(count: int) -> list[str]:
    """RealToxicityPrompts where it is at hand, else sentences of as many words, 4 to 16."""
    if RTP.is_file():
        with RTP.open(encoding="utf-8") as lines:
            return [json.loads(line)["prompt"]["text"] for _, line in zip(range(count), lines, strict=False)]
    rng = np.random.default_rng(0)
    return [" ".join(rng.choice(WORDS, size=rng.integers(4, 17))) for _ in range(count)]


def load(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """SmolLM2-135M, or a GPT-NeoX of random weights with a vocabulary of 32,768 (only some of which texts use)."""
    if name == "smollm2":
        return load_smollm2()
    tokenizer = train_tokenizer([*prompts_of_mixed_length(2000), " ".join(WORDS)], vocab_size=8192)
    architecture = {**NEOX, "vocab_size": 32_768, "eos_token_id": tokenizer.eos_token_id}
    return load_model(ModelSource(architecture=architecture)), tokenizer


def papers_way(
    model: Any, tokenizer: Any, prompts: list[str], sampling: Sampling, *, at_once: int, greedy: bool = False
) -> list[list[list[int]]]:
    """`generate` on prompts padded to PADDED; per prompt its continuations' tokens before the first EOS."""
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    draw: dict[str, Any] = {"do_sample": False} if greedy else {"do_sample": True, "top_p": sampling.top_p, "top_k": 0}
    number = 1 if greedy else sampling.continuations
    options = GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        num_return_sequences=number,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=pad,
        **draw,
    )
    saved, model.generation_config = model.generation_config, GenerationConfig()
    results: list[list[list[int]]] = []
    for start in range(0, len(prompts), at_once):
        encoded = [tokenizer(text)["input_ids"] for text in prompts[start : start + at_once]]
        ids = torch.tensor([[pad] * (PADDED - len(row)) + row for row in encoded])
        mask = torch.tensor([[0] * (PADDED - len(row)) + [1] * len(row) for row in encoded])
        with torch.inference_mode():
            new = model.generate(ids, attention_mask=mask, generation_config=options)[:, PADDED:].tolist()
        cut = [row[: row.index(tokenizer.eos_token_id)] if tokenizer.eos_token_id in row else row for row in new]
        results += [cut[i : i + number] for i in range(0, len(cut), number)]
    model.generation_config = saved
    return results


def check(model: Any, tokenizer: Any, prompts: list[str]) -> dict[str, float]:
    """Greedy equality of both ways, and the total variation of 20,000 sampled tokens from the float64 nucleus.

    `sampling_noise` is the total variation that draws from the nucleus itself have on average."""
    greedy = Sampling(continuations=1, max_new_tokens=20, top_p=1e-9, temperature=1.0, seed=0)
    ours = sample_tokens(model, tokenizer, prompts, greedy, batch_size=64)
    theirs = papers_way(model, tokenizer, prompts, greedy, at_once=1, greedy=True)
    same = sum(a == b for a, b in zip(ours, theirs, strict=True)) / len(prompts)
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([tokenizer(prompts[0])["input_ids"]])).logits[:, -1]
    probabilities = torch.softmax(logits[0].double(), -1).numpy()
    order = np.argsort(-probabilities, kind="stable")
    before = np.cumsum(probabilities[order]) - probabilities[order]
    nucleus = np.zeros_like(probabilities)
    nucleus[order[before < 0.9]] = probabilities[order[before < 0.9]]
    nucleus /= nucleus.sum()
    rng, draws = np.random.default_rng(0), 20_000
    drawn = sample_nucleus(logits.expand(draws, -1), torch.from_numpy(rng.random((draws, UNIFORMS))), 0.9).numpy()
    assert (nucleus[drawn] > 0).all(), "a token outside the nucleus was sampled"

    def distance(counts: np.ndarray) -> float:
        return float(np.abs(counts / draws - nucleus).sum() / 2)

    noise = statistics.mean(distance(rng.multinomial(draws, nucleus)) for _ in range(20))
    return {
        "greedy_equal": same,
        "nucleus_tokens": int((nucleus > 0).sum()),
        "sampled_distance": round(distance(np.bincount(drawn, minlength=len(nucleus))), 4),
        "sampling_noise": round(noise, 4),
    }


def timed(function: Any, prompts: list[str], sampling: Sampling) -> tuple[float, float]:
    """Continuations per second, and per second of this process' CPU time."""
    started, cpu_started = time.perf_counter(), time.process_time()
    sampled = function(prompts)
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
    assert all(len(rows) == sampling.continuations for rows in sampled)
    count = len(prompts) * sampling.continuations
    return count / seconds, count / cpu_seconds


def main() -> None:
    """Check, alternate, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=("neox", "smollm2"), default="neox")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompts", type=int, default=64, help="of a round of ours (default 64)")
    parser.add_argument("--padded-prompts", type=int, default=4, help="of a round of the paper's way (default 4)")
    parser.add_argument("--batch-size", type=int, default=400, help="sequences at once in ours (default 400)")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model, tokenizer = load(options.model)
    prompts = prompts_of_mixed_length(options.prompts)
    sampling = Sampling(continuations=25, max_new_tokens=20, top_p=0.9, temperature=1.0, seed=0)
    checks = check(model, tokenizer, prompts[:8])

    def ours(texts: list[str]) -> Any:
        return sample_tokens(model, tokenizer, texts, sampling, batch_size=options.batch_size)

    rates: dict[str, list[tuple[float, float]]] = {}
    for _ in range(options.rounds):
        for at_once in sorted({1, options.padded_prompts}):
            padded = prompts[: options.padded_prompts]
            rate = timed(
                lambda texts, size=at_once: papers_way(model, tokenizer, texts, sampling, at_once=size),
                padded,
                sampling,
            )
            rates.setdefault(f"padded_{at_once}_at_once", []).append(rate)
        rates.setdefault("ifguide", []).append(timed(ours, prompts, sampling))
    medians = {name: np.median(values, axis=0).tolist() for name, values in rates.items()}
    best, best_cpu = (max(value[i] for name, value in medians.items() if name != "ifguide") for i in (0, 1))
    lengths = [len(tokenizer(text)["input_ids"]) for text in prompts]
    result = {
        "speedup": round(medians["ifguide"][0] / best, 2),
        "cpu_speedup": round(medians["ifguide"][1] / best_cpu, 2),
        "continuations_per_second": round(medians["ifguide"][0], 2),
        "padded_continuations_per_second": round(best, 2),
        "rates": {name: [round(rate, 2) for rate, _ in values] for name, values in rates.items()},
        **checks,
        "model": options.model,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "layers": model.config.num_hidden_layers,
        "width": model.config.hidden_size,
        "vocabulary": model.config.vocab_size,
        "prompt_tokens": [min(lengths), statistics.median(lengths), max(lengths)],
        "threads": options.threads,
        "machine": this_machine(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
