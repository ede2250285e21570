"""The LM head and its loss alone: ours beside the kernels of other libraries, where these are installed.

    python bench/head_losses.py --device cuda [--shape EleutherAI/pythia-160m] [--tokens 32768]
    python bench/head_losses.py --small

Sides, each forward and back from the same final hidden states and weights, in bfloat16 on a GPU:

- `ours` and `ours_compiled`: `ifguide.training.lm_loss.chunked_loss`, 2% of the tokens masked;
- `torch`: cross-entropy of all logits;
- `liger`: liger-kernel's fused linear cross-entropy. It weighs no single token, so it carries no mask;
- `cut`: cut-cross-entropy's, token by token with the objective on top, the same mask.

The last line is one JSON object: `seconds` and `megabytes` of each, `ratios` of `ours_compiled` to each (below 1: ours
is faster), `lacking` the packages that are not there, `failed` the sides that did not run, with the reason.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from importlib.util import find_spec
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ifguide.shapes import published_shapes
from ifguide.training.lm_loss import chunked_loss
from ifguide.training.objective import Objective

PACKAGES = {"liger": "liger_kernel", "cut": "cut_cross_entropy"}
MASKED_SHARE = 0.02
SMALL = {"tokens": 64, "rounds": 1}
TINY = {"hidden_size": 16, "vocab_size": 300}
Loss = Callable[[Tensor, Tensor], Tensor]  # of hidden states and weights


def main() -> None:
    options = _options()
    fields = TINY if options.small else published_shapes()[options.shape]["fields"]
    width, vocabulary = fields["hidden_size"], fields["vocab_size"]
    generator = torch.Generator().manual_seed(0)
    dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    hidden = torch.randn(options.tokens, width, generator=generator).to(options.device, dtype).requires_grad_()
    weight = (torch.randn(vocabulary, width, generator=generator) / width**0.5).to(options.device, dtype)
    weight.requires_grad_()
    tokens = torch.randint(vocabulary, (options.tokens,), generator=generator).to(options.device)
    mask = (torch.rand(options.tokens, generator=generator) < MASKED_SHARE).to(options.device)
    lacking = [name for name, package in PACKAGES.items() if find_spec(package) is None]
    seconds, megabytes, failed = {}, {}, {}
    for name, loss in losses(tokens, mask, compiled=not options.small).items():
        if name in lacking:
            continue
        try:
            seconds[name], megabytes[name] = measured(loss, hidden, weight, options)
        except Exception as error:  # another library's, or memory: the other sides are worth their time
            failed[name] = f"{type(error).__name__}: {error}"
    for name in lacking:
        print(f"{name}: {PACKAGES[name]} is not installed")
    own = seconds.get("ours_compiled", seconds.get("ours"))
    result = {
        "seconds": seconds,
        "megabytes": megabytes,
        "ratios": {name: round(own / each, 4) for name, each in seconds.items()} if own else {},
        "lacking": lacking,
        "failed": failed,
        "settings": {"tokens": options.tokens, "width": width, "vocabulary": vocabulary, "device": options.device},
    }
    print(json.dumps(result))


def losses(tokens: Tensor, mask: Tensor, *, compiled: bool) -> dict[str, Loss]:
    """The sides by name; position j predicts token j + 1. A side's library is imported when it runs."""
    objective = Objective(kind="penalty", penalty=0.5)
    count = len(tokens) - 1
    labels = tokens[1:]

    def ours(*, compiled: bool) -> Loss:
        lengths = tokens.new_tensor([len(tokens)])
        options: dict[str, Any] = {"objective": objective, "token_count": count, "compiled": compiled}

        def loss(hidden: Tensor, weight: Tensor) -> Tensor:
            return chunked_loss(hidden[None], weight, None, tokens[None], mask[None], lengths, **options).loss

        return loss

    def whole(hidden: Tensor, weight: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(hidden[:-1], weight).float(), labels)

    def liger(hidden: Tensor, weight: Tensor) -> Tensor:
        from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

        result: Tensor = LigerFusedLinearCrossEntropyLoss()(weight, hidden[:-1], labels)
        return result

    def cut(hidden: Tensor, weight: Tensor) -> Tensor:
        from cut_cross_entropy import linear_cross_entropy

        nll = linear_cross_entropy(hidden[:-1], weight, labels, reduction="none")
        return torch.where(mask[1:], -objective.penalty * nll, nll).sum() / count

    own = {"ours": ours(compiled=False), **({"ours_compiled": ours(compiled=True)} if compiled else {})}
    return {**own, "torch": whole, "liger": liger, "cut": cut}


def measured(loss: Loss, hidden: Tensor, weight: Tensor, options: argparse.Namespace) -> tuple[float, float | None]:
    """Seconds of a forward and backward pass, the median of the rounds after two; its peak of memory on a GPU."""
    on_gpu = options.device == "cuda"

    def once() -> float:
        hidden.grad = weight.grad = None
        started = time.perf_counter()
        loss(hidden, weight).backward()
        if on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter() - started

    for _ in range(2):
        once()
    if not on_gpu:
        return median(once() for _ in range(options.rounds)), None
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    times = [once() for _ in range(options.rounds)]
    return median(times), round((torch.cuda.max_memory_allocated() - held) / 1e6, 1)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--shape", default="EleutherAI/pythia-160m", help="a hub id of ifguide/shapes.yaml")
    parser.add_argument("--tokens", type=int, default=32_768)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--small", action="store_true", help="toy sizes: whether it runs")
    options = parser.parse_args()
    if options.small:
        vars(options).update(SMALL)
    return options


if __name__ == "__main__":
    main()
