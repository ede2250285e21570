"""What a better token score gives on texts that people judged, and what it costs.

    python bench/score_quality.py [--behaviours explicit implicit] [--proxy smollm2|FOLDER] [--steps 8] [--quick]

- `explicit`: comments with the spans that people marked as toxic, among other documents, as in `bench/localise.py`.
  A figure is the average precision of tokens.
- `implicit`: sentences of a white supremacist forum, hateful or not as people called them, each scored alone by
  queries of other posts. A figure is the AUROC of a sentence's highest token.

Scores, all of one proxy and the same queries:

- `exact`: <V, grad NLL_j> with V by EK-FAC; `cg`: with V refined by conjugate gradients on the blocks that the factors
  were fitted on (`ifguide.influence.refinement`);
- `smoothed`, `cg_smoothed`: those regressed on the proxy's hidden states, each document by the others; fitted on the
  judged texts and `--smooth-documents` further ones;
- `probe`: logistic regression on the hidden states, of the queries' labels; `ensemble`: the mean rank of `smoothed` and
  `probe`.

No human mark decides anything, with one exception: `auroc_implicit_best` is of the score that is best on the posts of
one half, measured on the other half; `auroc_implicit_exact` is measured there too.

`query_reliability`: scores by either half of the explicit queries are correlated over the judged tokens
(`ifguide.influence.reliability`). `cost_ratio`: CPU seconds to score and to smooth, over those to score; the fit of
the regression is left out, for its sample does not grow with a corpus.

Factors, gradients, the steps of refinement and every scoring are kept under `runs/bench`: running it again goes on.
`--only NAME ...` makes only those scorings (exact, cg, half_0, half_1), and no figures. Intervals are of a bootstrap
over documents, or posts. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from sklearn.metrics import average_precision_score, roc_auc_score
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from bench.common.behaviours import BEHAVIOURS, Behaviour, Query, read_behaviour
from bench.common.direction import differential, digest, factor_sample, fit_factors, mean_gradient, tracked_names
from bench.common.places import CACHE, DATA
from bench.common.proxies import load_proxy
from bench.common.scores import score_blocks
from bench.common.texts import read_rows
from bench.localise import PROBE, encode_document, factor_documents
from ifguide.artifacts import publish
from ifguide.influence.agreement import mean_rank
from ifguide.influence.query import load_factors, precondition
from ifguide.influence.refinement import GaussNewton, Refinement, refine
from ifguide.influence.reliability import HALVES, spearman_brown
from ifguide.methods.probes import fit_query_probe
from ifguide.methods.smoothed import fit_smoothed
from ifguide.models import state_fingerprint
from ifguide.telemetry import configure_logging, log

BLOCK_SIZE = 256  # of the factor sample
Proxy = tuple[PreTrainedModel, PreTrainedTokenizerFast]
Scores = Sequence[np.ndarray]  # (T,) of each text; entry 0 is of no token


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
    except FileNotFoundError as error:
        print(error, file=sys.stderr)
        return 2
    proxy = load_proxy(options.proxy)
    result: dict[str, Any] = {}
    for name, behaviour in behaviours.items():
        make = _sentences if name == "implicit" else _tokens
        judged = make(proxy, sentences, behaviour, options)
        scorings = Scorings(proxy, behaviour, judged, options)
        if options.only:
            for kind in options.only:
                scorings.of(kind)
            continue
        scores, cost = all_scores(proxy, behaviour, judged, scorings, options)
        if name == "explicit":
            result |= {f"ap_{kind}": value for kind, value in tabulate(judged, scores, options.seed).items()}
            result |= {"query_reliability": round(reliability(scorings), 4), "cost_ratio": round(cost, 3)}
        else:
            tabulate(judged, scores, options.seed)
            result |= chosen_on_one_half(judged, scores)
    if not options.only:
        print(json.dumps({**result, "proxy": options.proxy, "steps": options.steps, "queries": options.queries}))
    return 0


class Scorings:
    """Scorings of the blocks along directions of one behaviour, by name; made where they are not kept."""

    def __init__(self, proxy: Proxy, behaviour: Behaviour, judged: Judged, options: argparse.Namespace):
        self.model, self.tokenizer = proxy
        self.sets = behaviour.positive, behaviour.negative
        self.names = tracked_names(self.model)
        documents = [row["text"] for row in factor_documents(self.tokenizer, behaviour.others, options.factor_tokens)]
        self.documents, self.judged, self.steps = documents, judged, options.steps
        self.sample = factor_sample(self.tokenizer, documents, block_size=BLOCK_SIZE)
        self.direction_key = digest(state_fingerprint(self.model), self.names, self.sample.identity(), self.sets)
        self.key = digest(self.direction_key, [block.tolist() for block in judged.blocks], len(judged.truth))
        self.seconds: dict[str, float] = {}

    def of(self, kind: str) -> list[np.ndarray]:
        """The scores along `kind` of every block (exact, cg), or of the judged ones (half_N)."""
        name = f"{kind}-{self.steps}" if kind == "cg" else kind
        path = CACHE / "score_quality" / self.key / f"{name}.npz"
        blocks = self.judged.blocks[: len(self.judged.truth) if kind.startswith("half_") else None]
        ends = np.cumsum([len(block) for block in blocks])[:-1]
        if not path.is_file():
            direction = self._refined() if kind == "cg" else self._preconditioned(kind)
            fill, started = self.tokenizer.eos_token_id, time.process_time()
            triples = [(block, None, None) for block in blocks]
            (scores,) = score_blocks(self.model, [direction], triples, "target", fill)
            with publish(path) as part, part.open("wb") as file:
                np.savez(file, scores=np.concatenate(scores), seconds=time.process_time() - started)
        with np.load(path) as kept:
            self.seconds[kind] = float(kept["seconds"])
            return np.split(kept["scores"], ends)

    def _gradient(self, *, half: int | None = None) -> dict[str, Tensor]:
        sets: list[Sequence[Query]] = [own if half is None else own[half::HALVES] for own in self.sets]
        return differential(*(mean_gradient(self.model, self.tokenizer, self.names, own) for own in sets))

    def _factors(self) -> Path:
        return fit_factors(self.model, self.tokenizer, self.names, self.documents, block_size=BLOCK_SIZE)

    def _preconditioned(self, kind: str) -> dict[str, Tensor]:
        half = int(kind.removeprefix("half_")) if kind.startswith("half_") else None
        return precondition(self._gradient(half=half), load_factors(self._factors(), self.names))

    def _refined(self) -> dict[str, Tensor]:
        path = CACHE / "score_quality" / self.direction_key / f"refinement-{self.steps}.safetensors"
        gradient, factors = self._gradient(), load_factors(self._factors(), self.names)
        batches = [
            (batch["input_ids"], batch["lengths"])
            for partition in range(self.sample.num_partitions)
            for batch in self.sample.loader(partition)
        ]
        state = Refinement.load(path, self.model.device) if path.is_file() else Refinement.begin(gradient)
        product = GaussNewton(self.model, self.names, batches)
        for _ in refine(gradient, factors, product, steps=self.steps, begun=state):
            log("refinement", f"step {len(state.steps)} of {self.steps}: {state.steps[-1]}")
            with publish(path) as part:
                state.save(part)
        return state.direction


def all_scores(
    proxy: Proxy, behaviour: Behaviour, judged: Judged, scorings: Scorings, options: argparse.Namespace
) -> tuple[dict[str, Scores], float]:
    """Every score of the texts, and the cost of smoothed ones over exact ones."""
    model, tokenizer = proxy
    tokens = [block.tolist() for block in judged.blocks]
    scores: dict[str, Scores] = {"exact": scorings.of("exact")}
    if options.steps:
        scores["cg"] = scorings.of("cg")
    cost = 1.0
    for kind in list(scores):
        smoother = fit_smoothed(model, tokens, scores[kind])
        log("smoothing", f"{kind}: {smoother.summary}")
        started = time.process_time()
        scores["smoothed" if kind == "exact" else f"{kind}_smoothed"] = smoother.score(tokens)
        if kind == "exact":
            cost += (time.process_time() - started) / scorings.seconds["exact"]
    probe = fit_query_probe(model, tokenizer, behaviour.positive, behaviour.negative, options=PROBE, seed=options.seed)
    scores["probe"] = probe.score(tokens)
    scores["ensemble"] = in_place_of(
        scores["exact"], mean_rank([_flat(scores[kind]) for kind in ("smoothed", "probe")])
    )
    return scores, cost


def in_place_of(scores: Scores, flat: Tensor) -> list[np.ndarray]:
    """Values of all tokens but the first of each text, as scores (T,) of each."""
    ends = np.cumsum([len(block) - 1 for block in scores])[:-1]
    return [np.append(0.0, own) for own in np.split(flat.numpy(), ends)]


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


def bootstrap(
    labels: Scores, values: Scores, groups: np.ndarray, figure: Callable[..., float], *, seed: int, times: int = 300
) -> tuple[float, float]:
    """The 95% interval of a figure over groups of texts."""
    rng = np.random.default_rng(seed)
    members = [np.flatnonzero(groups == group) for group in np.unique(groups)]
    drawn = []
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


def reliability(scorings: Scorings) -> float:
    """That of the scores by all queries, of the judged texts' tokens."""
    halves = [_flat(scorings.of(f"half_{half}")) for half in range(HALVES)]
    return spearman_brown(float(spearmanr(*halves).statistic), HALVES)


def _flat(scores: Scores) -> Tensor:
    return torch.from_numpy(np.concatenate([block[1:] for block in scores]).astype(np.float64))


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
    parser.add_argument("--only", nargs="+", default=[], help="make these scorings and no figures")
    parser.add_argument("--steps", type=int, default=8, help="of refinement; 0: none")
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--documents", type=int, default=500)
    parser.add_argument("--sentences", type=int, default=2000)
    parser.add_argument("--smooth-documents", type=int, default=700, help="further texts that smoothing is fitted on")
    parser.add_argument("--queries", type=int, default=160, help="of each set")
    parser.add_argument("--factor-tokens", type=int, default=14_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="small numbers of everything: does it run?")
    options = parser.parse_args()
    if options.quick:
        vars(options).update(documents=40, queries=8, factor_tokens=600, steps=2, sentences=60, smooth_documents=20)
    return options


if __name__ == "__main__":
    raise SystemExit(main())
