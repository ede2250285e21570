"""How well do token scores find what people marked? Average precision and AUROC per token, on real comments.

    python bench/localise.py [--proxy smollm2|FOLDER] [--data data/real_text] [--sweep] [--quick]

Documents: a seeded sample of comments with human-marked toxic spans, unflagged comments and encyclopedia paragraphs,
each scored as a block of its own after an EOS. A token is positive when it overlaps a marked span. Factors come from
other documents of the same kinds, queries from RealToxicityPrompts by its labels (continuation toxicity >= .5 or < .1).

Compared: `target` (Eq. 8), `position` label-aligned, `position` one token off (as the paper's code applies it), V
without EK-FAC (`identity`: V is the gradient), V without the non-toxic set (`no_differential`), a word list (words that
the marked spans of documents outside the sample hold in at least half of five or more uses: it has seen human marks,
which the others have not), and alt-profanity-check's probability of the token's sentence.

Scores are those of the difference engine at full rank, in bfloat16 where the CPU has instructions for it; directions
share one pass. `--sweep` adds what raises or lowers the result. Intervals are of a bootstrap over documents.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from profanity_check import predict_prob
from sklearn.metrics import average_precision_score, roc_auc_score
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from bench.common.direction import differential, fit_factors, low_rank, mean_gradient, tracked_names
from bench.common.places import ABSENT, DATA
from bench.common.proxies import load_proxy
from bench.common.scores import score_blocks
from bench.common.texts import Document, read_paragraphs, read_rows
from ifguide.influence.query import load_factors, precondition
from ifguide.methods.finders import sentence_spans
from ifguide.telemetry import configure_logging, log
from ifguide.words import WordList

MAX_TOKENS = 128


def main() -> int:
    options = _options()
    configure_logging()
    if not (options.data / "civil_comments_spans.jsonl").is_file():
        print(f"{options.data} has no civil_comments_spans.jsonl: {ABSENT}, or --data", file=sys.stderr)
        return 2
    model, tokenizer = load_proxy(options.proxy)
    documents, others = sample_documents(options.data, options.documents, options.seed)
    print(json.dumps(localise(model, tokenizer, documents, others, options)))
    return 0


def localise(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    documents: Sequence[Document],
    others: Sequence[Document],
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Every comparison; prints a table and returns the figures."""
    blocks = [encode_document(tokenizer, document) for document in documents]
    truth = [marked for _, _, marked in blocks]
    directions = _directions(model, tokenizer, others, options)
    names = list(directions)
    target = score_blocks(model, [directions[name] for name in names], blocks, "target", tokenizer.eos_token_id)
    position = score_blocks(model, [directions["target"]], blocks, "position", tokenizer.eos_token_id)[0]
    words = WordList(marked_words(others))
    scores = dict(zip(names, target, strict=True)) | {
        "position": position,
        "position_off_by_one": [off_by_one(block) for block in position],
        "wordlist": [spread(offsets, words.spans(text), 1.0) for text, offsets in _texts(documents, blocks)],
        "classifier": [sentence_scores(text, offsets) for text, offsets in _texts(documents, blocks)],
    }
    flat_truth = np.concatenate([marked[1:] for marked in truth])
    flat = {name: np.concatenate([block[1:] for block in each]) for name, each in scores.items()}
    precision = {name: float(average_precision_score(flat_truth, each)) for name, each in flat.items()}
    for name, value in sorted(precision.items(), key=lambda item: -item[1]):
        print(f"{name:28s} AP {value:.4f}   AUROC {roc_auc_score(flat_truth, flat[name]):.4f}")
    intervals = bootstrap(truth, scores["target"], scores["position_off_by_one"], seed=options.seed)
    return {
        **{f"ap_{name}": round(value, 4) for name, value in precision.items()},
        "auroc_target": round(float(roc_auc_score(flat_truth, flat["target"])), 4),
        "base_rate": round(float(flat_truth.mean()), 4),
        "target_over_off_by_one": round(precision["target"] / precision["position_off_by_one"], 3),
        **intervals,
        "documents": len(documents),
        "tokens": len(flat_truth),
        "proxy": options.proxy,
    }


def _directions(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, others: Sequence[Document], options: argparse.Namespace
) -> dict[str, dict[str, Tensor]]:
    """Each variant of V, over the same modules."""
    names = tracked_names(model)
    toxic, benign = read_queries(options.data, options.queries, options.seed)
    gradient = {
        side: mean_gradient(model, tokenizer, names, each) for side, each in (("toxic", toxic), ("benign", benign))
    }
    difference = differential(gradient["toxic"], gradient["benign"])
    folder = fit_factors(
        model, tokenizer, names, [row["text"] for row in factor_documents(tokenizer, others, options.factor_tokens)],
        block_size=256,
    )  # fmt: skip
    factors = load_factors(folder, names)
    directions = {
        "target": precondition(difference, factors),
        "identity": difference,
        "no_differential": precondition(gradient["toxic"], factors),
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
            few = [mean_gradient(model, tokenizer, names, each[:count]) for each in (toxic, benign)]
            directions[f"queries_{count}"] = precondition(differential(*few), factors)
    return directions


def encode_document(
    tokenizer: PreTrainedTokenizerFast, document: Document
) -> tuple[np.ndarray, list[tuple[int, int]], np.ndarray]:
    """Token ids with an EOS before them, character offsets, and which tokens overlap a marked span; (T,) each."""
    encoded = tokenizer(document["text"], add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    offsets = [(0, 0), *encoded["offset_mapping"]][:MAX_TOKENS]
    tokens = np.array([tokenizer.eos_token_id, *encoded["input_ids"]][:MAX_TOKENS])
    return tokens, offsets, spread(offsets, document.get("toxic_spans", []), 1.0) > 0


def spread(offsets: Sequence[tuple[int, int]], spans: Sequence[Sequence[int]], value: float) -> np.ndarray:
    """`value` at the tokens that overlap one of the character spans, 0 elsewhere; index 0, the EOS, is 0."""
    return np.array([value * any(begin < stop and end > start for start, stop in spans) for begin, end in offsets])


def off_by_one(scores_T: np.ndarray) -> np.ndarray:
    """Label-aligned `position` scores as the paper's code applies them: what speaks of t + 1 is taken for t."""
    return np.append(scores_T[1:], 0.0)


def sentence_scores(text: str, offsets: Sequence[tuple[int, int]]) -> np.ndarray:
    """The classifier's probability of the sentence that a token lies in."""
    spans = sentence_spans(text)
    scores = np.zeros(len(offsets))
    if spans:
        for span, probability in zip(spans, predict_prob([text[a:b] for a, b in spans]), strict=True):
            scores = np.maximum(scores, spread(offsets, [span], float(probability)))
    return scores


def marked_words(documents: Sequence[Document], *, least: int = 5, share: float = 0.5) -> list[str]:
    """Words with at least `least` uses of which at least `share` lie in marked spans."""
    uses, inside = Counter[str](), Counter[str]()
    for document in documents:
        for match in re.finditer(r"\w[\w'*$@]*", document["text"]):
            word = match.group().lower()
            uses[word] += 1
            inside[word] += any(match.start() < b and match.end() > a for a, b in document.get("toxic_spans", []))
    return sorted(word for word, count in uses.items() if count >= least and inside[word] >= share * count)


def bootstrap(
    truth: Sequence[np.ndarray],
    target: Sequence[np.ndarray],
    other: Sequence[np.ndarray],
    *,
    seed: int,
    times: int = 300,
) -> dict[str, list[float]]:
    """95% intervals over documents of `target`'s average precision and of its ratio to `other`'s."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(times):
        rows = rng.integers(0, len(truth), len(truth))
        marked, a, b = (np.concatenate([each[i][1:] for i in rows]) for each in (truth, target, other))
        precision = average_precision_score(marked, a)
        found.append((precision, precision / average_precision_score(marked, b)))
    low, high = np.percentile(np.array(found), [2.5, 97.5], axis=0)
    return {
        "ap_target_interval": [round(float(low[0]), 4), round(float(high[0]), 4)],
        "ratio_interval": [round(float(low[1]), 3), round(float(high[1]), 3)],
    }


def sample_documents(data: Path, count: int, seed: int) -> tuple[list[Document], list[Document]]:
    """(sample, others): 3/5 comments with spans, 3/10 unflagged ones, the rest paragraphs; others are disjoint."""
    rng = np.random.default_rng(seed)
    sample, others = [], []
    pools = (
        read_rows(data / "civil_comments_spans.jsonl"),
        read_rows(data / "civil_comments_unflagged.jsonl"),
        read_paragraphs(data),
    )
    for pool, share in zip(pools, (0.6, 0.3, 0.1), strict=True):
        order = rng.permutation(len(pool))
        number = round(share * count)
        sample += [pool[i] for i in order[:number]]
        others += [pool[i] for i in order[number:]]
    return sample, [others[i] for i in rng.permutation(len(others))]


def factor_documents(tokenizer: Any, others: Sequence[Document], tokens: int) -> list[Document]:
    """The first of `others` that together reach `tokens` tokens."""
    chosen, total = [], 0
    for document in others:
        if total >= tokens:
            break
        chosen.append(document)
        total += 1 + len(tokenizer(document["text"], add_special_tokens=False, verbose=False)["input_ids"])
    return chosen


def read_queries(data: Path, count: int, seed: int) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """`count` toxic and `count` other (prompt, continuation) pairs, by the labels of the rows."""
    toxic, benign = [], []
    for row in read_rows(data / "rtp_prompts.jsonl"):
        toxicity, text = row["continuation"]["toxicity"], row["continuation"]["text"]
        if toxicity is not None and text.strip():
            if toxicity >= 0.5:
                toxic.append((row["prompt"]["text"], text))
            elif toxicity < 0.1:
                benign.append((row["prompt"]["text"], text))
    rng = np.random.default_rng(seed)
    first, second = ([each[i] for i in rng.permutation(len(each))[:count]] for each in (toxic, benign))
    log("queries", f"{len(first)} of {len(toxic)} toxic, {len(second)} of {len(benign)} other")
    return first, second


def _texts(documents: Sequence[Document], blocks: Sequence[Any]) -> Iterator[tuple[str, list[tuple[int, int]]]]:
    return ((document["text"], block[1]) for document, block in zip(documents, blocks, strict=True))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--proxy", default="smollm2", help="smollm2, or a model's folder (with its tokenizer)")
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--documents", type=int, default=500)
    parser.add_argument("--queries", type=int, default=160, help="of each set")
    parser.add_argument("--factor-tokens", type=int, default=14_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sweep", action="store_true", help="also dampings, ranks, module sets, numbers of queries")
    parser.add_argument("--quick", action="store_true", help="small numbers of everything: does it run?")
    options = parser.parse_args()
    if options.quick:
        options.documents, options.queries, options.factor_tokens = 60, 8, 1000
    return options


if __name__ == "__main__":
    raise SystemExit(main())
