"""How well do token scores find what people marked? Average precision per token, for two behaviours, beside rivals.

    python bench/localise.py [--behaviour explicit|implicit] [--proxy smollm2|FOLDER] [--words] [--sweep] [--quick]

`bench.common.behaviours` says what the behaviours' documents and queries are. Each document is scored as a block of its
own after an EOS. A token is positive when it overlaps a marked span. Factors come from other documents of the same
kinds.

Compared, all with the same queries:

- `target` (Eq. 8), `position` label-aligned, `position` one token off (as the paper's code applies it), `identity` (V
  is the gradient, without EK-FAC), `no_differential` (V of the positive queries alone), `smoothed` (`target` drawn
  towards a regression on the proxy's hidden states, each document by the others, as `score_corpus.smooth` does), and
  that `regression` alone;
- `ngrams` (log-odds of words and pairs of words between the queries), `probe` (logistic regression on the proxy's
  hidden states, of the queries' labels), `excess_loss` (of the proxy tuned on the negative queries over that tuned on
  the positive ones), and what words alone find (`bench.common.word_rivals`): `classified_words` and `word_probability`
  by alt-profanity-check, `classifier` by sentence.

`word_list`, `word_marks` and `span_probe` have seen what the others have not, the marked spans of documents outside the
sample: words that lie in them, and a probe of their tokens. `--words` measures those of words alone, in seconds.

Scores are those of the difference engine at full rank, in bfloat16 where the CPU is quicker with it; directions
share one pass. A mask is often widened by a window of neighbours, which hides much of a shift by one. So the precision
of masks of equal size (`--budget`) is given too, without a window and with one of one token on either side; ties are
broken by seed. Where people judged whole sentences, a score that is even along one has an advantage that says nothing
of tokens: `ap_sentences` is that of the sentences' means, of every score. `--sweep` adds what raises or lowers the
result. Intervals are of a bootstrap over documents, those of ratios paired.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from profanity_check import predict_prob
from sklearn.metrics import average_precision_score, roc_auc_score
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from bench.common.behaviours import BEHAVIOURS, SPANS, Behaviour, read_behaviour
from bench.common.direction import differential, fit_factors, low_rank, mean_gradient, tracked_names
from bench.common.places import DATA
from bench.common.proxies import load_proxy, proxy_source
from bench.common.scores import score_blocks
from bench.common.smoothing import TextSmoother
from bench.common.texts import Document
from bench.common.word_rivals import sentence_means, spread, word_rivals
from ifguide.config.compare import Probe
from ifguide.influence.query import load_factors, precondition
from ifguide.methods.excess_loss import tune_excess_loss
from ifguide.methods.ngrams import fit_ngrams
from ifguide.methods.probes import fit_query_probe, fit_token_probe
from ifguide.methods.reading import QuerySets
from ifguide.telemetry import configure_logging, log
from ifguide.tokenizer import load_tokenizer

MAX_TOKENS = 128
PROBE = Probe(tokens=6000, strengths=(0.03,))  # a regression for each layer and fold: minutes with more
PROBE_DOCUMENTS = 800  # whose marked tokens `span_probe` learns from
WINDOWS = (0, 1)
Encoded = tuple[np.ndarray, list[tuple[int, int]], np.ndarray]  # token ids, offsets in characters, marked or not
Scores = Mapping[str, Sequence[np.ndarray]]  # by name, (T,) of each document
Proxy = tuple[PreTrainedModel, PreTrainedTokenizerFast]


def main() -> int:
    options = _options()
    configure_logging()
    try:
        behaviour = read_behaviour(
            options.behaviour, options.data, documents=options.documents, queries=options.queries, seed=options.seed
        )
        tokenizer = load_tokenizer(proxy_source(options.proxy))
    except FileNotFoundError as error:
        print(error, file=sys.stderr)
        return 2
    blocks = [encode_document(tokenizer, document) for document in behaviour.documents]
    offsets = [places for _, places, _ in blocks]
    scores: Scores = word_rivals(behaviour.documents, behaviour.others, offsets, predict_prob)
    if not options.words:
        proxy = load_proxy(options.proxy)
        scores = {
            **_influence(proxy, behaviour, blocks, options),
            **_rivals(proxy, behaviour, blocks, options),
            **scores,
        }
    texts = [document["text"] for document in behaviour.documents]
    sentences = {
        name: [sentence_means(*each) for each in zip(texts, offsets, own, strict=True)] for name, own in scores.items()
    }
    truth = [marked for _, _, marked in blocks]
    result = measure(truth, scores, sentences, budget=options.budget, seed=options.seed)
    print(json.dumps({"behaviour": options.behaviour, **result, "proxy": options.proxy}))
    return 0


def measure(
    truth: Sequence[np.ndarray], scores: Scores, sentences: Scores, *, budget: float, seed: int
) -> dict[str, Any]:
    """Every figure of every score; prints a table. `sentences`: their means by sentence. Ratios are of `target`, where
    that is among them, else of the first."""
    base = "target" if "target" in scores else next(iter(scores))
    flat_truth = _flat(truth)
    flat = {name: _flat(blocks) for name, blocks in scores.items()}
    precision = {name: float(average_precision_score(flat_truth, values)) for name, values in flat.items()}
    intervals, ratios = bootstrap(truth, scores, seed=seed, base=base)
    rows = {
        name: {
            "ap": round(precision[name], 4),
            "ap_interval": intervals[name],
            "auroc": round(float(roc_auc_score(flat_truth, flat[name])), 4),
            "ap_sentences": round(float(average_precision_score(flat_truth, _flat(sentences[name]))), 4),
            f"{base}_over": round(precision[base] / precision[name], 3),
            f"{base}_over_interval": ratios[name],
            **{
                f"precision_window_{window}": round(
                    mask_precision(truth, scores[name], budget=budget, window=window, seed=seed), 4
                )
                for window in WINDOWS
            },
        }
        for name in sorted(scores, key=lambda name: -precision[name])
    }
    for name, row in rows.items():
        print(
            f"{name:20s} AP {row['ap']:.4f} {row['ap_interval']}  AUROC {row['auroc']:.4f}  AP of sentences' means"
            f" {row['ap_sentences']:.4f}  at {budget:.0%}:"
            f" {row['precision_window_0']:.3f}, with a window {row['precision_window_1']:.3f}"
        )
    return {
        "scores": rows,
        "budget": budget,
        "base_rate": round(float(flat_truth.mean()), 4),
        "documents": len(truth),
        "tokens": len(flat_truth),
    }


def _influence(
    proxy: Proxy, behaviour: Behaviour, blocks: Sequence[Encoded], options: argparse.Namespace
) -> dict[str, list[np.ndarray]]:
    model, tokenizer = proxy
    directions = _directions(model, tokenizer, behaviour, options)
    fill = tokenizer.eos_token_id
    target = score_blocks(model, list(directions.values()), blocks, "target", fill)
    position = score_blocks(model, [directions["target"]], blocks, "position", fill)[0]
    smoother = TextSmoother(model, [ids for ids, _, _ in blocks], {"target": target[0]})
    return dict(zip(directions, target, strict=True)) | {
        "smoothed": smoother.smoothed()["target"],
        "regression": smoother.smoothed(own_weight=0.0)["target"],
        "position": position,
        "position_off_by_one": [off_by_one(block) for block in position],
    }


def _rivals(
    proxy: Proxy, behaviour: Behaviour, blocks: Sequence[Encoded], options: argparse.Namespace
) -> dict[str, list[np.ndarray]]:
    model, tokenizer = proxy
    tokens = [ids.tolist() for ids, _, _ in blocks]
    queries = QuerySets(positive=behaviour.positive, negative=behaviour.negative)
    probe = fit_query_probe(model, tokenizer, queries, options=PROBE, seed=options.seed)
    others = [encode_document(tokenizer, document) for document in behaviour.others[:PROBE_DOCUMENTS]]
    span_probe = fit_token_probe(
        model, [ids.tolist() for ids, _, _ in others], [marked for _, _, marked in others], range(len(others)),
        options=PROBE, seed=options.seed,
    )  # fmt: skip
    log("probes", f"layers {probe.layer} of the queries, {span_probe.layer} of the spans")
    finders: dict[str, Any] = {"ngrams": fit_ngrams(tokenizer, queries), "probe": probe, "span_probe": span_probe}
    if options.tune:
        finders["excess_loss"] = tune_excess_loss(model, tokenizer, queries, seed=options.seed)
    return {name: finder.score(tokens) for name, finder in finders.items()}


def _directions(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, behaviour: Behaviour, options: argparse.Namespace
) -> dict[str, dict[str, Tensor]]:
    """Each variant of V, over the same modules."""
    names = tracked_names(model)
    sets = behaviour.positive, behaviour.negative
    positive, negative = (mean_gradient(model, tokenizer, names, queries) for queries in sets)
    difference = differential(positive, negative)
    sample = factor_documents(tokenizer, behaviour.others, options.factor_tokens)
    folder = fit_factors(model, tokenizer, names, [row["text"] for row in sample], block_size=256)
    factors = load_factors(folder, names)
    directions = {
        "target": precondition(difference, factors),
        "identity": difference,
        "no_differential": precondition(positive, factors),
    }
    if options.sweep:
        V = directions["target"]
        for scale in (0.001, 0.01, 1.0):
            directions[f"damping_{scale}"] = precondition(difference, factors, damping_scale=scale)
        for rank in (16, 64, 256):
            directions[f"rank_{rank}"] = low_rank(V, rank)
        directions["mlp_only"] = {name: V[name] * bool(re.search("mlp", name)) for name in names}
        directions["attention_only"] = {name: V[name] * (not re.search("mlp", name)) for name in names}
        directions["equal_norms"] = {name: V[name] / V[name].norm() for name in names}
        for count in (20, 80):
            few = [mean_gradient(model, tokenizer, names, queries[:count]) for queries in sets]
            directions[f"queries_{count}"] = precondition(differential(*few), factors)
    return directions


def encode_document(tokenizer: PreTrainedTokenizerFast, document: Document) -> Encoded:
    """Token ids with an EOS before them, character offsets, and which tokens overlap a marked span; (T,) each."""
    encoded = tokenizer(document["text"], add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    offsets = [(0, 0), *encoded["offset_mapping"]][:MAX_TOKENS]
    tokens = np.array([tokenizer.eos_token_id, *encoded["input_ids"]][:MAX_TOKENS])
    return tokens, offsets, spread(offsets, document.get(SPANS, []), 1.0) > 0


def off_by_one(scores_T: np.ndarray) -> np.ndarray:
    """Label-aligned `position` scores as the paper's code applies them: what speaks of t + 1 is taken for t."""
    return np.append(scores_T[1:], 0.0)


def mask_precision(
    truth: Sequence[np.ndarray], scores: Sequence[np.ndarray], *, budget: float, window: int, seed: int
) -> float:
    """The share of marked tokens in a mask of the share `budget` of all: the highest scores with their neighbours.

    The mask is the largest of at most that size that takes scores in order, ties by seed. Index 0 is no token."""
    lengths = [len(block) - 1 for block in scores]
    flat, marked = _flat(scores), _flat(truth)
    ties = np.random.default_rng(seed).permutation(len(flat))
    order = np.lexsort((ties, -flat))
    ends = np.cumsum(lengths)
    document = np.repeat(np.arange(len(lengths)), lengths)
    size = round(budget * len(flat))

    def mask(count: int) -> np.ndarray:
        chosen = np.zeros(len(flat), bool)
        for step in range(-window, window + 1):
            places = order[:count] + step
            inside = (places >= 0) & (places < ends[-1])
            places, sources = places[inside], order[:count][inside]
            chosen[places[document[places] == document[sources]]] = True
        return chosen

    low, high = 0, size  # a mask of `high` scores has at least that many tokens
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if mask(middle).sum() <= size else (low, middle - 1)
    chosen = mask(low)
    return float(marked[chosen].mean()) if chosen.any() else 0.0


def bootstrap(
    truth: Sequence[np.ndarray], scores: Scores, *, seed: int, times: int = 300, base: str = "target"
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """95% intervals over documents, of each score's average precision and of that of `base` over it."""
    rng = np.random.default_rng(seed)
    samples: dict[str, list[float]] = {name: [] for name in scores}
    marked = [block[1:] for block in truth]
    values = {name: [block[1:] for block in blocks] for name, blocks in scores.items()}
    for _ in range(times):
        rows = rng.integers(0, len(truth), len(truth))
        drawn = np.concatenate([marked[i] for i in rows])
        for name, blocks in values.items():
            samples[name].append(float(average_precision_score(drawn, np.concatenate([blocks[i] for i in rows]))))
    precisions = {name: np.array(each) for name, each in samples.items()}
    return (
        {name: _interval(each) for name, each in precisions.items()},
        {name: _interval(precisions[base] / each) for name, each in precisions.items()},
    )


def _interval(samples: np.ndarray) -> list[float]:
    return [round(float(end), 4) for end in np.percentile(samples, [2.5, 97.5])]


def _flat(blocks: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate([block[1:] for block in blocks])


def factor_documents(tokenizer: Any, others: Sequence[Document], tokens: int) -> list[Document]:
    """The first of `others` that together reach `tokens` tokens."""
    chosen, total = [], 0
    for document in others:
        if total >= tokens:
            break
        chosen.append(document)
        total += 1 + len(tokenizer(document["text"], add_special_tokens=False, verbose=False)["input_ids"])
    return chosen


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--behaviour", choices=list(BEHAVIOURS), default="explicit")
    parser.add_argument("--proxy", default="smollm2", help="smollm2, or a model's folder (with its tokenizer)")
    parser.add_argument("--no-tune", dest="tune", action="store_false", help="leave out excess_loss")
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--documents", type=int, default=500)
    parser.add_argument("--queries", type=int, default=160, help="of each set")
    parser.add_argument("--factor-tokens", type=int, default=14_000)
    parser.add_argument("--budget", type=float, default=0.05, help="share of the tokens that a mask holds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--words", action="store_true", help="only what words alone find: no proxy, seconds")
    parser.add_argument("--sweep", action="store_true", help="also dampings, ranks, module sets, numbers of queries")
    parser.add_argument("--quick", action="store_true", help="small numbers of everything: does it run?")
    options = parser.parse_args()
    if options.quick:
        vars(options).update(documents=60, queries=8, factor_tokens=1000)
    return options


if __name__ == "__main__":
    raise SystemExit(main())
