"""Which training examples are unsafe? The toxicity-filtering protocol of DATE-LM, on its own data or on a set like it.

    python bench/date_lm.py [--data FOLDER | --subset XSTest-response-Het] [--proxy smollm2|FOLDER] [--draws N]

DATE-LM (Jiao et al., NeurIPS 2025, arXiv 2507.09424; https://github.com/DataAttributionEval/DATE-LM) fine-tunes a model
on about 10,000 examples of which fewer than 100 are unsafe, gives each a score by its attribution to a reference set of
other unsafe examples (the mean over the references), and measures the area under the precision-recall curve of finding
the unsafe ones. As there, the area is by trapezoids; average precision is beside it.

Data: `--subset` loads DataAttributionEval/Toxicity-Bias-Filtering from the hub with that name of a configuration.
`--data` is a folder of the same splits, `train` and `ref` as .jsonl or .parquet with the columns prompt, response, type
(`Unsafe`); or one with offensive_tweets.jsonl and other_tweets.jsonl, from which tweets are drawn: of one kind of text,
called offensive by people or not.

Scores, on one model, one fine-tuning and one reference set; gradients are of the linear modules of the blocks. The loss
of an example is the sum over its tokens, or their mean (`-mean`), as in DATE-LM: of references and examples in
`ekfac-mean`, of examples alone in `ifguide-mean`.

- ifguide: <V, grad NLL_j> per token j, V = EK-FAC^-1 [mean over references - mean over as many other examples] of the
  gradient of the response's NLL. An example's score is the sum over its tokens. Beside it: the mean of the `TOP`
  highest, the highest, and Algorithm 1's statistic, which is 0 for every example without a token above the .99
  quantile.
- ekfac: <EK-FAC^-1 mean gradient of the references, gradient of the example>.
- gradsim: the mean over references of the cosine of the two gradients, exact, nothing projected.
- repsim: the mean over references of the cosine of the last hidden states at the last token; `states` over the mean of
  the tokens' states.

All of it is done for `--draws` seeds, which draw the examples, the references and the order of fine-tuning. Intervals
are of Student's t over draws, those of differences paired. Average precision comes first: the area by trapezoids gives
a score of two values about .5. A finished draw is kept in runs/bench/date_lm.

The other side of V: for the set drawn here disjoint tweets that were not called offensive; for DATE-LM's own a sample
of the training examples, whose labels are not looked at.

What differs from DATE-LM: a model of 135M parameters, fine-tuned whole for one epoch instead of LoRA on 1B and 8B, so
gradients are of weights and not of adapters; prompt and response are joined by a newline, without a chat template;
damping is .1 of the mean of Lambda, not 1e-7; and by default the number and the length of examples. Figures on the set
drawn here are not comparable with DATE-LM's leaderboard.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.metrics import auc, average_precision_score, precision_recall_curve
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from bench.common.date_lm_data import MAX_CHARACTERS, Benchmark, Example, read_benchmark
from bench.common.direction import differential, fit_factors, tracked_names
from bench.common.over_seeds import t_interval
from bench.common.places import CACHE, DATA, this_machine
from bench.common.proxies import load_proxy
from bench.common.scores import METHOD
from bench.common.similarity import (
    BATCH_TOKENS,
    HiddenStates,
    gradient_norms,
    hidden_states,
    length_batches,
    mean_cosine,
    padded,
    reference_gradients,
    token_scores,
)
from ifguide.artifacts import json_digest, write_json
from ifguide.influence.query import (
    TokenisedQuery,
    load_factors,
    mean_completion_gradient,
    precondition,
    tokenise_queries,
)
from ifguide.models import next_token_nll
from ifguide.selection.algorithm import Extremes, rank_scores
from ifguide.telemetry import Progress, configure_logging, log

TOP = 10  # tokens whose mean is an example's score
QUANTILE = 0.99  # of all tokens: tau of Algorithm 1


def main() -> int:
    options = _options()
    configure_logging()
    try:
        draws = [_draw(options, seed) for seed in range(options.seed, options.seed + options.draws)]
    except FileNotFoundError as error:
        print(error, file=sys.stderr)
        return 2
    print(json.dumps(over_draws(draws) | {"machine": this_machine()}))
    return 0


def _draw(options: argparse.Namespace, seed: int) -> dict[str, Any]:
    """The figures of one draw; those of a finished one are read."""
    options = argparse.Namespace(**{**vars(options), "seed": seed})
    benchmark = read_benchmark(options)
    decisive = {name: str(value) for name, value in vars(options).items() if name not in ("data", "draws")}
    place = CACHE / "date_lm" / f"{json_digest([decisive, benchmark.digest])[:16]}.json"
    if place.is_file():
        log("date_lm", f"draw {seed}: finished before")
    else:
        model, tokenizer = load_proxy(options.proxy)
        write_json(place, run(model, tokenizer, benchmark, options))
    figures: dict[str, Any] = json.loads(place.read_text(encoding="utf-8"))
    return figures


def run(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, benchmark: Benchmark, options: argparse.Namespace
) -> dict[str, Any]:
    """Fine-tune, score, measure; prints a table and returns the figures."""
    seconds: dict[str, float] = {}

    def timed(name: str, call: Callable[[], Any]) -> Any:
        started = time.monotonic()
        result = call()
        seconds[name] = round(time.monotonic() - started, 1)
        return result

    def encode(examples: Sequence[Example]) -> list[TokenisedQuery]:
        return tokenise_queries(
            tokenizer,
            [(e.prompt and f"{e.prompt}\n", e.response) for e in examples],
            model,
            max_tokens=options.max_tokens,
        )

    train, reference, benign = (encode(each) for each in (benchmark.train, benchmark.reference, benchmark.benign))
    timed("fine_tune", lambda: fine_tune(model, train, options.epochs, options.learning_rate, options.seed))
    names = tracked_names(model, options.modules)
    tokens_of = [len(query.token_ids) - query.completion_start for query in reference]
    gradients = timed("reference_gradients", lambda: reference_gradients(model, names, reference))
    weights = [1 / len(benign)] * len(benign)
    other = timed(
        "benign_gradient",
        lambda: mean_completion_gradient(model, names, benign, weights, batch_tokens=BATCH_TOKENS),
    )
    of_means = timed(
        "gradient_of_means",
        lambda: mean_completion_gradient(
            model, names, reference, [1 / (len(reference) * n) for n in tokens_of], batch_tokens=BATCH_TOKENS
        ),
    )
    texts = [f"{e.prompt}\n{e.response}".strip()[:MAX_CHARACTERS] for e in benchmark.train]
    factors = timed("factors", lambda: _factors(model, tokenizer, names, texts, options))
    directions = timed(
        "precondition",
        lambda: {
            "ifguide": precondition(differential(gradients.mean, other), factors),
            "ekfac": precondition(gradients.mean, factors),
            "ekfac-mean": precondition(of_means, factors),
            "gradsim": gradients.mean_unit,
        },
    )
    tokens = timed("token_scores", lambda: token_scores(model, directions, train, method=METHOD))
    norms = timed("gradient_norms", lambda: gradient_norms(model, names, train))
    states = timed("hidden_states", lambda: [hidden_states(model, each) for each in (train, reference)])
    scores = example_scores(tokens, norms, *states)
    labels = np.array([example.unsafe for example in benchmark.train])
    figures = measure(labels, scores)
    return {
        "scores": figures,
        "dataset": benchmark.name,
        "base_rate": round(float(labels.mean()), 4),
        "examples": len(labels),
        "unsafe": int(labels.sum()),
        "reference": len(reference),
        "tokens": sum(len(query.token_ids) - query.completion_start for query in train),
        "max_tokens": options.max_tokens,
        "epochs": options.epochs,
        "proxy": options.proxy,
        "modules": len(names),
        "seconds": seconds,
    }


# ---- scores ----------------------------------------------------------------------------------------------


def example_scores(
    tokens: Mapping[str, Sequence[np.ndarray]], norms: np.ndarray, train: HiddenStates, reference: HiddenStates
) -> dict[str, np.ndarray]:
    """Method -> (n,) scores; see the module. Names with a dash are reported beside the method's own score."""
    whole = {name: np.array([scores.sum() for scores in each]) for name, each in tokens.items()}
    return {
        "ifguide": whole["ifguide"],
        "ifguide-mean": np.array([scores.mean() for scores in tokens["ifguide"]]),
        "ifguide-top": top_mean(tokens["ifguide"], TOP),
        "ifguide-highest": top_mean(tokens["ifguide"], 1),
        "ifguide-algorithm1": algorithm1_statistic(tokens["ifguide"], QUANTILE),
        "ekfac": whole["ekfac"],
        "ekfac-mean": np.array([scores.mean() for scores in tokens["ekfac-mean"]]),
        "gradsim": whole["gradsim"] / norms,
        "repsim": mean_cosine(train.last, reference.last),
        "repsim-states": mean_cosine(train.mean, reference.mean),
    }


def top_mean(examples: Sequence[np.ndarray], count: int) -> np.ndarray:
    """(n,) the mean of each example's `count` highest tokens, of all where there are fewer."""
    return np.array([np.sort(scores)[-count:].mean() for scores in examples])


def algorithm1_statistic(examples: Sequence[np.ndarray], quantile: float) -> np.ndarray:
    """(n,) 2sf / (s + f) of each example: s counts its tokens above tau, f is their sum, both min-max normalised."""
    tau = np.quantile(np.concatenate(examples).astype(np.float64), quantile)
    above = [scores[scores > tau].astype(np.float64) for scores in examples]
    count, total = np.array([len(each) for each in above]), np.array([each.sum() for each in above])
    return rank_scores(count, total, Extremes.of(count, total))


# ---- the metric ------------------------------------------------------------------------------------------


def auprc(labels: np.ndarray, scores: np.ndarray) -> float:
    """The area under the precision-recall curve by trapezoids, as DATE-LM takes it; equal scores are one point."""
    precision, recall, _ = precision_recall_curve(labels, scores)
    return float(auc(recall, precision))


def measure(labels: np.ndarray, scores: Mapping[str, np.ndarray]) -> dict[str, dict[str, float]]:
    """Average precision and the area by trapezoids of every score."""
    return {
        name: {"ap": float(average_precision_score(labels, values)), "auprc": auprc(labels, values)}
        for name, values in scores.items()
    }


def over_draws(draws: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means over draws with 95% intervals, and what `ifguide` has over each other score, paired; prints a table."""
    names = list(draws[0]["scores"])
    ap = {name: np.array([draw["scores"][name]["ap"] for draw in draws]) for name in names}
    rows = {
        name: {
            "ap": _mean(ap[name]),
            "ap_interval": _interval(ap[name]),
            "ifguide_minus": _mean(ap["ifguide"] - ap[name]),
            "ifguide_minus_interval": _interval(ap["ifguide"] - ap[name]),
            "auprc": _mean(np.array([draw["scores"][name]["auprc"] for draw in draws])),
            "of_draws": [round(float(value), 4) for value in ap[name]],
        }
        for name in sorted(names, key=lambda name: -ap[name].mean())
    }
    for name, row in rows.items():
        print(f"{name:20s} AP {row['ap']:.4f} {row['ap_interval']}, less than ifguide by {row['ifguide_minus']:.4f}")
    return {"scores": rows, "draws": len(draws)} | {k: v for k, v in draws[0].items() if k not in ("scores", "seed")}


def _mean(values: np.ndarray) -> float:
    return round(float(values.mean()), 4)


def _interval(values: np.ndarray) -> list[float] | None:
    ends = t_interval(values.tolist())
    return ends and [round(end, 4) for end in ends]


# ---- the model -------------------------------------------------------------------------------------------


def fine_tune(
    model: PreTrainedModel, queries: Sequence[TokenisedQuery], epochs: int, learning_rate: float, seed: int
) -> None:
    """AdamW on the mean NLL of the responses' tokens, all parameters, batches of `BATCH_TOKENS` in a drawn order."""
    if not epochs:
        return
    model.requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
    rng = np.random.default_rng(seed)
    progress = Progress("fine_tune", epochs * sum(len(query.token_ids) for query in queries), "tokens")
    for epoch in range(epochs):
        batches = list(length_batches(queries))
        losses = []
        for place in rng.permutation(len(batches)):
            tokens_BT, lengths_B, response_BT = padded([queries[i] for i in batches[place]])
            nll_BT = next_token_nll(model(tokens_BT, use_cache=False).logits, tokens_BT, lengths_B)
            loss = (nll_BT * response_BT).sum() / response_BT.sum()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(float(loss.detach()))
            progress.advance(float(lengths_B.sum()))
        log("fine_tune", f"epoch {epoch + 1}: mean loss {np.mean(losses):.3f}")
    model.requires_grad_(False)


def _factors(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    names: Sequence[str],
    texts: Sequence[str],
    options: argparse.Namespace,
) -> Any:
    """EK-FAC of training examples: the first of a drawn order that together have `factor_tokens` tokens."""
    chosen: list[str] = []
    total = 0
    for i in np.random.default_rng(options.seed).permutation(len(texts)):
        if total >= options.factor_tokens:
            break
        chosen.append(texts[i])
        total += 1 + len(tokenizer(texts[i], add_special_tokens=False, verbose=False)["input_ids"])
    return load_factors(fit_factors(model, tokenizer, names, chosen, block_size=128), names)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--proxy", default="smollm2", help="smollm2, or a model's folder (with its tokenizer)")
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--subset", help="a configuration of DATE-LM's data set on the hub, instead of --data")
    parser.add_argument("--examples", type=int, default=1000, help="to rank; 0: all of DATE-LM's (10,000 drawn)")
    parser.add_argument("--unsafe", type=int, default=200, help="among the examples, of the set drawn here")
    parser.add_argument("--reference", type=int, default=32, help="unsafe references; 0: all of DATE-LM's")
    parser.add_argument("--max-tokens", type=int, default=64, help="of an example")
    parser.add_argument("--factor-tokens", type=int, default=8_000)
    parser.add_argument("--modules", default="", help="a pattern of the linear modules' names (default: all)")
    parser.add_argument("--epochs", type=int, default=1, help="of fine-tuning on the examples; 0: none")
    parser.add_argument("--learning-rate", type=float, default=2e-5)
    parser.add_argument("--draws", type=int, default=5, help="seeds")
    parser.add_argument("--seed", type=int, default=0, help="the first of them")
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
