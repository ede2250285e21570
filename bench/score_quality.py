"""What a better token score gives on texts that people judged, and what it costs.

    python bench/score_quality.py [--behaviours explicit implicit] [--proxy smollm2|FOLDER] [--steps 5] [--small]

- `explicit`: comments with the spans that people marked as toxic, among other documents, as in `bench/localise.py`.
  A figure is the average precision of tokens.
- `implicit`: sentences of a white supremacist forum, hateful or not as people called them, each scored alone by
  queries of other posts. A figure is the AUROC of a sentence's highest token.

Scores, all of the same queries:

- `exact`: <V, grad NLL_j> with V by EK-FAC; `cg`: with V refined by conjugate gradients on the first blocks that the
  factors were fitted on (`ifguide.influence.refinement`);
- `smoothed`, `cg_smoothed`: those regressed on the proxy's hidden states, each document by the others; fitted on the
  judged texts and `--smooth-documents` further ones;
- `probe`: logistic regression on the hidden states, of the queries' labels; `smoothed_probe`: the mean rank of both, as
  `build_mask.others` takes it (`ifguide.selection.ensemble`);
- `z`: `exact` over the spread of null directions of halves of the queries (explicit alone);
- `checkpoint`, `checkpoint_smoothed`: of a second checkpoint, the proxy after `--second-steps` batches of further
  documents, with the factors of the first; `ensemble`: the mean rank of `smoothed` and `checkpoint_smoothed`;
- `everything`: the mean rank of all smoothed scores and of the probe;
- `regression`: what the regression alone says, which no human mark has decided anything of.

What human marks decide: the default `own_weight` of `smoothed` was chosen by marks of the explicit behaviour's
documents and of the demo. `gain_other_half` is free of that. The weight is chosen on every second document, and the
ratio of average precisions to `exact` is taken on the others; it is the mean of both ways. `auroc_implicit_best` is
of the score that is best on the posts of one half, measured on the other half. `auroc_implicit_exact` is measured
there too. `everything_over_exact` is the figure of `everything` less that of `exact` on all posts, with an interval;
what goes into that mean was fixed before it was measured.

`query_reliability`: scores by either half of the explicit queries are correlated over the judged tokens
(`ifguide.influence.reliability`). `cost_ratio`: CPU time to score and to smooth, over that to score, of the first
judged texts; the fit of the regression is left out, for its sample does not grow with a corpus. Outliers and the
false-discovery rate are those of `bench.common.outliers`. `outlier_share_before` is of exact scores with documents by
sum, as in the paper; `outlier_share_after` of the default, smoothed scores with documents by rate.

Factors, gradients, the steps of refinement and every scoring are kept under `runs/bench`: running it again goes on.
Intervals are of a bootstrap over documents, or posts. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr
from sklearn.metrics import average_precision_score, roc_auc_score
from transformers import PreTrainedModel

from bench.common.behaviours import BEHAVIOURS, Behaviour, read_behaviour
from bench.common.direction import MAX_QUERY_TOKENS
from bench.common.outliers import lay_among, outlier_figures
from bench.common.places import DATA
from bench.common.proxies import load_proxy
from bench.common.scorings import Proxy, Scores, Scorings
from bench.common.smoothing import TextSmoother
from bench.common.texts import read_rows
from bench.localise import PROBE, encode_document, factor_documents
from ifguide.config.compare import ExcessLoss
from ifguide.influence.query import tokenise_queries
from ifguide.influence.reliability import HALVES, spearman_brown
from ifguide.methods.excess_loss import tune
from ifguide.methods.probes import fit_query_probe
from ifguide.methods.reading import QuerySets
from ifguide.selection.ensemble import mean_ranks
from ifguide.telemetry import configure_logging, log

SECOND = ExcessLoss(epochs=1, batch_size=8, learning_rate=5e-5)  # how the second checkpoint is trained
OUTLIER_SHARE, OUTLIER_TOKENS = 0.05, 200  # of each kind beside the judged tokens; of one text
TIMED_TOKENS = 2048
JOINED = ("smoothed", "cg_smoothed", "checkpoint_smoothed", "probe")
OWN_WEIGHTS = (0.0, 0.1, 0.2, 0.3, 0.5)
FIGURES = (
    "ap_exact",
    "ap_smoothed",
    "ap_cg",
    "ap_z",
    "ap_ensemble",
    "gain_other_half",
    "auroc_implicit_exact",
    "auroc_implicit_best",
    "outlier_share_before",
    "outlier_share_after",
    "fdr_nominal",
    "fdr_realised",
    "query_reliability",
    "cost_ratio",
)


@dataclass(frozen=True, kw_only=True, eq=False)
class Made:
    """Scores by name; `by_weight` those smoothed with other own weights; `cost` of smoothed scores over exact ones."""

    scores: dict[str, Scores]
    by_weight: dict[float, Scores]
    cost: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Judged:
    """Texts as blocks of token ids after an EOS. The first `len(truth)` are judged: `truth` has a label for each token
    (T,), or one for the text (1,). `groups` are what a bootstrap draws. The others only help to smooth."""

    blocks: list[np.ndarray]
    truth: list[np.ndarray]
    groups: np.ndarray

    @property
    def whole(self) -> bool:
        """Whether a text has one label, not one for each token."""
        return len(self.truth[0]) == 1

    def values(self, scores: Scores) -> list[np.ndarray]:
        """What each judged text's labels are compared with: its tokens' scores, or the highest of them."""
        own = [block[1:] for block in scores[: len(self.truth)]]
        return [block.max(keepdims=True) for block in own] if self.whole else own

    def labels(self) -> list[np.ndarray]:
        """The labels, in step with `values`."""
        return self.truth if self.whole else [marked[1:] for marked in self.truth]


def main() -> int:
    options = _options()
    configure_logging()
    try:
        behaviours = {
            name: read_behaviour(
                name, options.data, documents=options.documents, queries=options.queries, seed=options.seed
            )
            for name in options.behaviours
        }
        sentences = read_rows(options.data / "forum_sentences.jsonl") if "implicit" in behaviours else []
        proxy = load_proxy(options.proxy)
    except FileNotFoundError as error:
        print(error, file=sys.stderr)
        return 2
    result: dict[str, Any] = {}
    for name, behaviour in behaviours.items():
        make = _sentences if name == "implicit" else _tokens
        judged = make(proxy, sentences, behaviour, options)
        scorings = scorings_of(proxy, behaviour, options)
        if name == "explicit":
            result |= explicit(scorings, judged, options)
        else:
            scores = all_scores(scorings, judged, options).scores
            result |= chosen_on_one_half(judged, scores)
            result["everything_over_exact"] = difference(judged, scores["everything"], scores["exact"], options.seed)
            result["auroc_implicit"] = tabulate(judged, scores, options.seed)
    ordered = {key: result.pop(key) for key in FIGURES if key in result}
    print(json.dumps({**ordered, **result, "proxy": options.proxy, "steps": options.steps, "queries": options.queries}))
    return 0


def explicit(scorings: Scorings, judged: Judged, options: argparse.Namespace) -> dict[str, Any]:
    """Every figure of the explicit behaviour."""
    made = all_scores(scorings, judged, options)
    texts, (model, tokenizer) = judged.blocks[: len(judged.truth)], scorings.proxy
    halves = scorings.of([f"half_{half}" for half in range(HALVES)], texts)
    correlation = float(spearmanr(*(_flat(own) for own in halves.values())).statistic)
    laid = lay_among(texts, tokenizer, share=OUTLIER_SHARE, length=OUTLIER_TOKENS, seed=options.seed)
    kinds = ["exact", *(f"null_{number}" for number in range(scorings.nulls))]
    of_laid = scorings.of(kinds, laid.blocks)
    scores_KN = np.stack([_flat(of_laid[kind]) for kind in kinds]).astype(np.float32)
    outliers = outlier_figures(model, laid, scores_KN, judged.truth)
    found = tabulate(judged, made.scores, options.seed)
    return {
        **{f"ap_{kind}": value for kind, value in found.items()},
        **gain_on_the_other_half(judged, made),
        **outliers,
        "query_reliability": round(spearman_brown(correlation, HALVES), 4),
        "cost_ratio": round(made.cost, 3),
    }


def scorings_of(proxy: Proxy, behaviour: Behaviour, options: argparse.Namespace) -> Scorings:
    """The proxy's scorings, with factors of other documents of the same kinds."""
    rows = factor_documents(proxy[1], behaviour.others, options.factor_tokens)
    return Scorings(
        proxy=proxy,
        behaviour=behaviour,
        documents=[row["text"] for row in rows],
        steps=options.steps,
        refine_blocks=options.refine_blocks,
        seed=options.seed,
    )


def all_scores(scorings: Scorings, judged: Judged, options: argparse.Namespace) -> Made:
    """Every score of the texts but `z`."""
    (model, tokenizer), behaviour = scorings.proxy, scorings.behaviour
    scores: dict[str, Scores] = dict(scorings.of(["exact", "cg"] if options.steps else ["exact"], judged.blocks))
    smoother = TextSmoother(model, judged.blocks, scores)
    for name, own in smoother.smoothed().items():
        scores["smoothed" if name == "exact" else f"{name}_smoothed"] = own
    by_weight: dict[float, Scores] = {weight: smoother.smoothed(weight)["exact"] for weight in OWN_WEIGHTS}
    scores["regression"] = by_weight[0.0]
    cost = scorings.smoothing_cost(smoother.smoother, _timed(judged))
    if not options.no_probe:
        sets = QuerySets(positive=behaviour.positive, negative=behaviour.negative)
        probe = fit_query_probe(model, tokenizer, sets, options=PROBE, seed=options.seed)
        scores["probe"] = probe.score([block.tolist() for block in judged.blocks])
        scores["smoothed_probe"] = _mean_rank(scores["smoothed"], scores["probe"])
    if options.second_steps:
        second = replace(scorings, proxy=(_checkpoint(scorings, options), tokenizer), factors=scorings.factors_folder())
        scores["checkpoint"] = second.of(["exact"], judged.blocks)["exact"]
        of_second = TextSmoother(second.proxy[0], judged.blocks, {"checkpoint": scores["checkpoint"]})
        scores["checkpoint_smoothed"] = of_second.smoothed()["checkpoint"]
        scores["ensemble"] = _mean_rank(scores["smoothed"], scores["checkpoint_smoothed"])
    scores["everything"] = _mean_rank(*(scores[name] for name in JOINED if name in scores))
    return Made(scores=scores, by_weight=by_weight, cost=cost)


def _checkpoint(scorings: Scorings, options: argparse.Namespace) -> PreTrainedModel:
    """The proxy after `--second-steps` batches of further documents; nothing is known of their marks."""
    model, tokenizer = scorings.proxy
    last = max(0, len(scorings.behaviour.others) - options.smooth_documents)
    documents = scorings.behaviour.others[max(0, last - SECOND.batch_size * options.second_steps) : last]
    texts = [("", row["text"]) for row in documents if row["text"].strip()]
    second = copy.deepcopy(model)
    queries = tokenise_queries(tokenizer, texts, model, max_tokens=MAX_QUERY_TOKENS)
    losses = tune(second, queries, SECOND, np.random.default_rng(options.seed))
    log("checkpoint", f"{len(texts)} documents, mean loss of a token {losses[0]:.3f}")
    return second


def _timed(judged: Judged) -> list[np.ndarray]:
    """The first judged texts, of TIMED_TOKENS tokens in all."""
    ends = np.cumsum([len(block) for block in judged.blocks[: len(judged.truth)]])
    return judged.blocks[: 1 + int(np.searchsorted(ends, TIMED_TOKENS))]


def _mean_rank(*several: Scores) -> list[np.ndarray]:
    """Scores (T,) of each text from 0 to 1: the mean rank of each token in the scorings."""
    return in_place_of(several[0], mean_ranks([_flat(scores) for scores in several]))


def in_place_of(scores: Scores, flat: np.ndarray) -> list[np.ndarray]:
    """Values of all tokens but the first of each text, as scores (T,) of each."""
    ends = np.cumsum([len(block) - 1 for block in scores])[:-1]
    return [np.append(0.0, own) for own in np.split(flat, ends)]


def tabulate(judged: Judged, scores: Mapping[str, Scores], seed: int) -> dict[str, float]:
    """Print the figure of every score with its 95% interval; returns the figures."""
    figure = roc_auc_score if judged.whole else average_precision_score
    labels = judged.labels()
    found = {}
    for name, own in scores.items():
        values = judged.values(own)
        found[name] = round(float(figure(np.concatenate(labels), np.concatenate(values))), 4)
        low, high = bootstrap(labels, values, judged.groups, figure, seed=seed)
        print(f"{name:12s} {'AUROC' if judged.whole else 'AP'} {found[name]:.4f} [{low:.4f}, {high:.4f}]")
    return found


def difference(judged: Judged, one: Scores, other: Scores, seed: int) -> list[float]:
    """The AUROC of one score less that of another, with its 95% interval over the same groups of texts."""
    labels = judged.labels()
    pairs = [np.stack(both, axis=1) for both in zip(judged.values(one), judged.values(other), strict=True)]

    def figure(truth: np.ndarray, values: np.ndarray) -> float:
        return float(roc_auc_score(truth, values[:, 0]) - roc_auc_score(truth, values[:, 1]))

    low, high = bootstrap(labels, pairs, judged.groups, figure, seed=seed)
    return [round(value, 4) for value in (figure(np.concatenate(labels), np.concatenate(pairs)), low, high)]


def bootstrap(
    labels: Scores, values: Scores, groups: np.ndarray, figure: Callable[..., float], *, seed: int, times: int = 300
) -> tuple[float, float]:
    """The 95% interval of a figure over groups of texts."""
    rng = np.random.default_rng(seed)
    members = [np.flatnonzero(groups == group) for group in np.unique(groups)]
    drawn: list[float] = []
    while len(drawn) < times:
        rows = np.concatenate([members[i] for i in rng.integers(0, len(members), len(members))])
        truth = np.concatenate([labels[i] for i in rows])
        if 0 < truth.sum() < len(truth):
            drawn.append(float(figure(truth, np.concatenate([values[i] for i in rows]))))
    low, high = np.percentile(drawn, [2.5, 97.5])
    return float(low), float(high)


def chosen_on_one_half(judged: Judged, scores: Mapping[str, Scores]) -> dict[str, Any]:
    """AUROC on every second group, of `exact` and of the score that is best on the other groups."""
    _, numbers = np.unique(judged.groups, return_inverse=True)
    labels, halves = np.concatenate(judged.labels()), [numbers % 2 == half for half in range(2)]
    values = {name: np.concatenate(judged.values(own)) for name, own in scores.items()}
    best = max(values, key=lambda name: float(roc_auc_score(labels[halves[0]], values[name][halves[0]])))
    found = {name: float(roc_auc_score(labels[halves[1]], values[name][halves[1]])) for name in ("exact", best)}
    return {
        "auroc_implicit_exact": round(found["exact"], 4),
        "auroc_implicit_best": round(found[best], 4),
        "implicit_best": best,
    }


def gain_on_the_other_half(judged: Judged, made: Made) -> dict[str, Any]:
    """The average precision of smoothed scores over that of exact ones on every second document, with the own weight
    that is best on the others, and the other way round: the mean ratio, and both weights."""
    labels = judged.labels()

    def precisions(scores: Scores) -> list[float]:
        """Of the documents of either half."""
        values = judged.values(scores)
        return [
            float(average_precision_score(np.concatenate(labels[half::2]), np.concatenate(values[half::2])))
            for half in range(2)
        ]

    exact, of_weight = precisions(made.scores["exact"]), {w: precisions(own) for w, own in made.by_weight.items()}
    weights = [max(of_weight, key=lambda weight: of_weight[weight][half]) for half in range(2)]
    gains = [of_weight[weight][1 - half] / exact[1 - half] for half, weight in enumerate(weights)]
    return {"gain_other_half": round(float(np.mean(gains)), 3), "own_weight_by_half": weights}


def _flat(scores: Scores) -> np.ndarray:
    return np.concatenate([block[1:] for block in scores]).astype(np.float64)


def _tokens(proxy: Proxy, _: Sequence[Mapping[str, Any]], behaviour: Behaviour, options: argparse.Namespace) -> Judged:
    """The behaviour's documents."""
    judged = [encode_document(proxy[1], document) for document in behaviour.documents]
    return Judged(
        blocks=[ids for ids, _, _ in judged] + _further(proxy, behaviour, options),
        truth=[marked.astype(np.int64) for _, _, marked in judged],
        groups=np.arange(len(judged)),
    )


def _sentences(
    proxy: Proxy, sentences: Sequence[Mapping[str, Any]], behaviour: Behaviour, options: argparse.Namespace
) -> Judged:
    """Sentences of the behaviour's documents, up to `--sentences`; none that is a query too."""
    queried = {(prompt + completion).strip() for prompt, completion in (*behaviour.positive, *behaviour.negative)}
    texts = {line for row in behaviour.documents for line in row["text"].split("\n")}
    rows = [row for row in sentences if row["text"] in texts and row["text"].strip() not in queried]
    rows = rows[: options.sentences]
    blocks = [encode_document(proxy[1], {"text": row["text"]})[0] for row in rows]
    kept = [i for i, block in enumerate(blocks) if len(block) > 1]
    return Judged(
        blocks=[blocks[i] for i in kept] + _further(proxy, behaviour, options),
        truth=[np.array([int(rows[i]["hateful"])]) for i in kept],
        groups=np.array([rows[i]["post"] for i in kept]),
    )


def _further(proxy: Proxy, behaviour: Behaviour, options: argparse.Namespace) -> list[np.ndarray]:
    """The last of the other documents; factors are of the first ones."""
    others = behaviour.others[max(0, len(behaviour.others) - options.smooth_documents) :]
    return [encode_document(proxy[1], document)[0] for document in others]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--behaviours", nargs="+", choices=list(BEHAVIOURS), default=list(BEHAVIOURS))
    parser.add_argument("--proxy", default="smollm2", help="smollm2, or a model's folder (with its tokenizer)")
    parser.add_argument("--steps", type=int, default=5, help="of refinement; 0: none")
    parser.add_argument("--refine-blocks", type=int, default=16, help="of the factors' sample, for refinement")
    parser.add_argument("--second-steps", type=int, default=12, help="that make the second checkpoint; 0: no ensemble")
    parser.add_argument("--no-probe", action="store_true", help="its regressions of every layer take minutes")
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--documents", type=int, default=500)
    parser.add_argument("--sentences", type=int, default=1000)
    parser.add_argument("--smooth-documents", type=int, default=700, help="further texts that smoothing is fitted on")
    parser.add_argument("--queries", type=int, default=160, help="of each set")
    parser.add_argument("--factor-tokens", type=int, default=14_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--small", action="store_true", help="small numbers of everything: does it run?")
    options = parser.parse_args()
    if options.small:
        vars(options).update(
            documents=40, queries=16, factor_tokens=600, steps=2, refine_blocks=2, second_steps=2, sentences=60,
            smooth_documents=20, no_probe=True,
        )  # fmt: skip
    return options


if __name__ == "__main__":
    raise SystemExit(main())
