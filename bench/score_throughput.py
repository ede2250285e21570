"""How fast tokens are scored, beside kronfluence's per-token scores, and how well the fast preset agrees.

    python bench/score_throughput.py [--shape neox30m|smollm2|pythia160m|llama1b] [--device cuda] [--rounds 5]
    on a GPU: --shape pythia160m --v gradient --block-size 2048 --blocks 16 --micro-batch 16 --check-blocks 2
              --sides full --kronfluence-batches 4 --rounds 1

Every side scores the same blocks with the same V in one process, one after the other in rounds; a side's time is the
median of its rounds. kronfluence runs its own loop (`compute_dot_products_with_loader`) over its own wrapped modules,
with V put where it keeps a preconditioned query gradient: at several batch sizes in float32 and in its own bfloat16
settings, at full rank and at rank 64; its best is taken. V is fitted: EK-FAC of a sample of blocks and
the differential gradient of two query sets, on real text for SmolLM2, on random tokens where the weights are random;
with `--v gradient` it is that gradient alone, for models whose factors would take longer than the benchmark.

Floor: 6N FLOP a token for the fast preset (forward, tangent, V; 4N for the LM head), 4N for `full` in float32 (two
forward passes), N the tracked parameters, at the rate this machine multiplies matrices of the model's width, measured
in the run.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from bench.common.kronfluence_side import KronfluenceSide, kronfluence_settings
from bench.common.places import CACHE
from ifguide.config import ModelSource
from ifguide.influence.agreement import compare
from ifguide.influence.memory import keep_memory
from ifguide.influence.method import PRESETS, Attribution, Method
from ifguide.influence.scorer import TokenScorer
from ifguide.models import load_model, predicted_positions

RANK = 64  # of the low-rank sides
ALWAYS = ("full", "fast")
SIDES = [*ALWAYS, "exact", f"fast_rank{RANK}", "position_fast", "fast_two_behaviours"]
NEOX = {"model_type": "gpt_neox", "hidden_act": "gelu", "initializer_range": 0.02}
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        **NEOX, "vocab_size": 512, "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 512,
    },
    "neox30m": {
        **NEOX, "vocab_size": 8192, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8,
        "num_attention_heads": 8, "max_position_embeddings": 512,
    },
    "pythia160m": {
        **NEOX, "vocab_size": 50304, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
        "num_attention_heads": 12, "max_position_embeddings": 2048,
    },
    "llama1b": {
        "model_type": "llama", "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192,
        "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
        "max_position_embeddings": 2048, "tie_word_embeddings": True,
    },
}  # fmt: skip


def main() -> None:
    options = _options()
    keep_memory()  # as workers of score_corpus do; kronfluence has the same advantage
    device = torch.device(options.device)
    model, directions, tokens_BT = _workload(options, device)
    result = {"shape": options.shape, **measure(model, directions, tokens_BT, options)}
    result["machine"] = torch.cuda.get_device_name() if device.type == "cuda" else platform.machine()
    result["threads"] = torch.get_num_threads()
    print(json.dumps(result))


def measure(
    model: PreTrainedModel, directions: dict[str, Tensor], tokens_BT: Tensor, options: argparse.Namespace
) -> dict[str, Any]:
    """Times every side in alternation; returns ratios, agreement and shares of the floor."""
    lengths_B = torch.full((len(tokens_BT),), tokens_BT.shape[1])
    fast = PRESETS["fast"]
    methods = {
        "full": Method(engine="difference", precision="float32", rank=None),
        "exact": PRESETS["exact"],
        "fast": fast,
        f"fast_rank{RANK}": replace(fast, rank=RANK),
    }
    names = list(directions)
    sides: dict[str, Callable[[], Any]] = {}

    def scorer(attribution: Attribution, method: Method, behaviours: Any = directions) -> TokenScorer:
        return TokenScorer(model, behaviours, attribution=attribution, method=method)

    scorers = {name: scorer("target", method) for name, method in methods.items() if name in options.sides}
    if "position_fast" in options.sides:
        scorers["position_fast"] = scorer("position", fast)
    if "fast_two_behaviours" in options.sides:
        scorers["fast_two_behaviours"] = scorer("target", fast, [directions] * 2)
    for name, each in scorers.items():
        sides[name] = _ours(each, tokens_BT, lengths_B, options.micro_batch)
    checked = slice(options.check_blocks)
    exact = _exact(scorer("target", PRESETS["exact"]), tokens_BT[checked])
    agreement = {
        name: compare(sides[name]()[checked], exact, _predicted(tokens_BT[checked]))
        for name in ("fast", f"fast_rank{RANK}")
        if name in scorers
    }
    reference = scorer("position", PRESETS["exact"]).score(tokens_BT[:2], lengths_B[:2])
    low_rank = f"fast_rank{RANK}" in scorers
    settings = kronfluence_settings(RANK if low_rank else 0)
    with KronfluenceSide(model, names, directions) as theirs:
        for setting in settings:
            for batch in options.kronfluence_batches:
                sides[f"kronfluence_{setting}_b{batch}"] = partial(theirs.score, tokens_BT, batch, setting)
        cosine = F.cosine_similarity(theirs.score(tokens_BT[:2], 2, "float32").flatten(), reference.flatten(), dim=0)
        seconds, peaks = _alternate(sides, options.rounds, theirs)
    rate = {name: tokens_BT.numel() / value for name, value in seconds.items()}
    best = {
        setting: max(value for name, value in rate.items() if name.startswith(f"kronfluence_{setting}_b"))
        for setting in settings
    }
    for name, value in rate.items():
        print(f"{name:36s} {value:12,.0f} tok/s")
    matmul = {dtype: _matmul_rate(model, dtype) for dtype in (torch.float32, torch.bfloat16)}
    modules: list[Any] = [*map(model.get_submodule, names), model.get_output_embeddings()]
    *of_tracked, of_head = (module.weight.numel() for module in modules)
    tracked = sum(of_tracked)
    N = tracked + of_head
    theirs_bf16 = max(value for setting, value in best.items() if setting.startswith("bfloat16"))
    figures: dict[str, Any] = {
        "full_vs_kronfluence": round(max(rate["full"], rate.get("exact", 0)) / best["float32"], 3),
        "fast_vs_kronfluence": round(rate["fast"] / best["float32"], 3),
        "fast_vs_kronfluence_bf16": round(rate["fast"] / theirs_bf16, 3),
        "fast_spearman": round(agreement["fast"].spearman, 5),
        "fast_top1pct_agreement": round(agreement["fast"].top, 4),
        "floor_share": round(rate["fast"] * (6 * tracked + 4 * (N - tracked)) / matmul[torch.bfloat16], 3),
        "full_floor_share": round(rate["full"] * 4 * N / matmul[torch.float32], 3),
        "fast_correlation": round(agreement["fast"].correlation, 6),
        "position_cosine_with_kronfluence": round(float(cosine), 7),
    }
    if low_rank:
        low, energy = agreement[f"fast_rank{RANK}"], list(scorers[f"fast_rank{RANK}"].energy.values())
        figures[f"rank{RANK}_vs_kronfluence"] = round(rate[f"fast_rank{RANK}"] / best["float32"], 3)
        figures[f"rank{RANK}_spearman_top1pct"] = [round(low.spearman, 5), round(low.top, 4)]
        figures[f"rank{RANK}_energy_least_mean"] = [round(min(energy), 3), round(sum(energy) / len(energy), 3)]
    if "fast_two_behaviours" in rate:
        figures["second_behaviour_cost"] = round(rate["fast"] / rate["fast_two_behaviours"] - 1, 3)
    return figures | {
        "tokens_per_second": {name: round(value) for name, value in rate.items()},
        "peak_gigabytes": peaks,
        "matmul_gflops": {str(dtype).removeprefix("torch."): round(value / 1e9) for dtype, value in matmul.items()},
        "tokens": tokens_BT.numel(),
        "block_size": tokens_BT.shape[1],
        "v": options.v,
    }


def _ours(scorer: TokenScorer, tokens_BT: Tensor, lengths_B: Tensor, micro_batch: int) -> Callable[[], Tensor]:
    def score() -> Tensor:
        starts = range(0, len(tokens_BT), micro_batch)
        scores = [scorer.score(tokens_BT[i : i + micro_batch], lengths_B[i : i + micro_batch]) for i in starts]
        return torch.cat(scores, dim=-2)

    return score


def _exact(scorer: TokenScorer, tokens_BT: Tensor) -> Tensor:
    length = torch.tensor([tokens_BT.shape[1]])
    return torch.cat([scorer.score(tokens_T[None], length) for tokens_T in tokens_BT])


def _predicted(tokens_BT: Tensor) -> Tensor:
    return predicted_positions(tokens_BT, torch.full((len(tokens_BT),), tokens_BT.shape[1])).to(tokens_BT.device)


def _alternate(
    sides: dict[str, Callable[[], Any]], rounds: int, theirs: KronfluenceSide
) -> tuple[dict[str, float], dict[str, float]]:
    """Median seconds of each side, and on a GPU its peak memory in GB; one uncounted round warms caches up."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    peaks: dict[str, float] = {}
    on_gpu = theirs.model.device.type == "cuda"
    for round_number in range(rounds + 1):
        for name, side in sides.items():
            with theirs.active(name.startswith("kronfluence")):
                if on_gpu:
                    torch.cuda.reset_peak_memory_stats()
                _synchronise()
                started = time.perf_counter()
                side()
                _synchronise()
            if round_number:
                seconds[name].append(time.perf_counter() - started)
            if on_gpu:
                peaks[name] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
        gc.collect()
        print(f"round {round_number} of {rounds}", file=sys.stderr)
    return {name: statistics.median(values) for name, values in seconds.items()}, peaks


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _matmul_rate(model: PreTrainedModel, dtype: torch.dtype) -> float:
    """FLOP/s of a product of the model's width: the median of 15."""
    width = model.config.hidden_size
    a, w = (torch.randn(shape, device=model.device).to(dtype) for shape in ((4096, width), (4 * width, width)))
    times = []
    for _ in range(20):
        _synchronise()
        started = time.perf_counter()
        F.linear(a, w)
        _synchronise()
        times.append(time.perf_counter() - started)
    return 2 * a.shape[0] * w.numel() / statistics.median(times[5:])


def _workload(options: argparse.Namespace, device: torch.device) -> tuple[PreTrainedModel, dict[str, Tensor], Tensor]:
    if options.shape == "smollm2":
        from bench.common.workloads import smollm2_workload

        model, directions, tokens_BT = smollm2_workload(options.blocks, options.block_size)
    else:
        model = load_model(ModelSource(architecture=SHAPES[options.shape]), device=device)
        directions = _directions_of_random_tokens(model, options)
        generator = torch.Generator().manual_seed(7)
        vocabulary = model.config.vocab_size
        tokens_BT = torch.randint(1, vocabulary, (options.blocks, options.block_size), generator=generator)
    return nn.Module.to(model, device), directions, tokens_BT.to(device)


def _directions_of_random_tokens(model: PreTrainedModel, options: argparse.Namespace) -> dict[str, Tensor]:
    from bench.common.workloads import differential_gradient, fit_on_tokens

    if options.v == "gradient":
        return differential_gradient(model)
    path = CACHE / f"throughput-{options.shape}.safetensors"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.contiguous().cpu() for name, tensor in fit_on_tokens(model).items()}, path)
    return load_file(path)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=[*SHAPES, "smollm2"], default="neox30m")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--block-size", type=int, default=512)
    parser.add_argument("--micro-batch", type=int, default=4, help="blocks at a time on our side")
    parser.add_argument("--kronfluence-batches", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--v", choices=["fitted", "gradient"], default="fitted", help="gradient: not preconditioned")
    parser.add_argument("--sides", choices=SIDES, nargs="+", default=SIDES, help="full and fast always run")
    parser.add_argument("--check-blocks", type=int, help="blocks scored exactly, for the agreement (all)")
    options = parser.parse_args()
    options.sides = {*options.sides, *ALWAYS}
    return options


if __name__ == "__main__":
    main()
