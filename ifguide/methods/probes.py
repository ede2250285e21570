"""Linear probes of tokens: a logistic regression on the proxy's hidden states says which kind a token is of.

(Alain and Bengio, arXiv 1610.01644.) A token's features are the state at its own position, which has read it and what
stands before it. Features are standardised, both kinds weigh as much in all, and layer and L2 penalty are those of the
highest AUROC by cross-validation in which no query (or document) is in two folds. The score is the log-odds.

`fit_query_probe` learns what the query sets say: a completion's tokens have the label of their query. `fit_token_probe`
learns from labelled tokens, human spans for instance; `fit_cross_probe` does so without those of the document scored.

Cost: one forward pass over what is learnt from, then layers * strengths * (folds + 1) regressions; to score, one
forward pass. All layers of `options.tokens` tokens are held: 4 bytes * width * layers each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from transformers import PreTrainedModel

from ifguide.config.compare import Probe
from ifguide.folds import DEALT, fold_of, require_dealt
from ifguide.methods.reading import Blocks, QuerySets, hidden_states

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]
DEFAULTS = Probe()


@dataclass(frozen=True, kw_only=True, eq=False)
class LinearProbe:
    """log-odds = state @ `weight` (D,) + `bias` at `layer`; `auroc` (L,) out of fold, at each layer's best strength."""

    layer: int
    strength: float
    weight: Floats
    bias: float
    auroc: Floats


def fit_probe(
    features_LND: NDArray[np.float32], labels_N: Bools, groups_N: Ints, options: Probe, seed: int
) -> LinearProbe:
    """The probe of N tokens at L layers. Tokens of one group are in one fold.

    Raises ValueError where fewer groups than folds have a token of one kind."""
    split = split_groups(labels_N, groups_N, options.folds, seed)
    auroc = np.array(
        [
            [_out_of_fold(features_ND, labels_N, split, strength) for strength in options.strengths]
            for features_ND in features_LND
        ]
    )
    layer, best = np.unravel_index(int(np.argmax(auroc)), auroc.shape)
    strength = options.strengths[int(best)]
    weight, bias = _fit(features_LND[layer], labels_N, strength)
    return LinearProbe(layer=int(layer), strength=strength, weight=weight, bias=bias, auroc=auroc.max(axis=1))


def split_groups(labels_N: Bools, groups_N: Ints, folds: int, seed: int) -> list[tuple[Ints, Ints]]:
    """(training, held out) rows of each fold, no group in two folds, the kinds spread over them.

    Raises ValueError where fewer groups than folds have a token of one kind."""
    for kind, name in ((True, "positive"), (False, "negative")):
        groups = len(np.unique(groups_N[labels_N == kind]))
        if groups < folds:
            raise ValueError(
                f"{groups} queries or documents with {name} tokens for {folds} folds; give more, or lower"
                " compare.probe.folds"
            )
    folder = StratifiedGroupKFold(folds, shuffle=True, random_state=seed % 2**32)  # it takes no larger one
    return list(folder.split(np.zeros((len(labels_N), 1)), labels_N, groups_N))


def _out_of_fold(features_ND: NDArray[np.float32], labels_N: Bools, split: list[tuple[Ints, Ints]], C: float) -> float:
    odds_N = np.zeros(len(labels_N))
    for train, held_out in split:
        weight, bias = _fit(features_ND[train], labels_N[train], C)
        odds_N[held_out] = features_ND[held_out] @ weight + bias
    return float(roc_auc_score(labels_N, odds_N))


def _fit(features_ND: NDArray[np.float32], labels_N: Bools, C: float) -> tuple[Floats, float]:
    """Weight and bias on features as they are, of the regression on standardised ones."""
    regression = LogisticRegression(C=C, class_weight="balanced", max_iter=2000)
    fitted = make_pipeline(StandardScaler(), regression).fit(features_ND.astype(np.float64), labels_N)
    scaler, weight = fitted[0], regression.coef_[0]
    weight = weight / scaler.scale_
    return weight, float(regression.intercept_[0] - weight @ scaler.mean_)


class ProbeFinder:
    """Token scores by one probe, or by that of each fold of documents (`weights` (K, D), `biases` (K,)). `precision`
    is that of the states it was fitted on."""

    in_stream = False  # it reads blocks
    summary: dict[str, Any]

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        layer: int,
        weights: Floats,
        biases: Floats,
        auroc: Sequence[float],
        precision: str,
        beginning: int | None = None,
    ):
        self.model, self.layer, self.weights, self.biases = model, layer, weights, biases
        self.auroc, self.precision, self.beginning = list(auroc), precision, beginning
        self.summary = {"layer": layer, "auroc": [round(value, 4) for value in self.auroc]}

    def score(self, blocks: Blocks, documents: Sequence[Ints] | None = None) -> list[NDArray[np.float32]]:
        """For each block of token ids its log-odds (T,), entry t of token t; entry 0 is 0.

        documents: the number (T,) of the document of each token, where the probe was fitted in folds of them."""
        scores = [np.zeros(len(block), np.float32) for block in blocks]
        for number, states in hidden_states(self.model, blocks, beginning=self.beginning, precision=self.precision):
            odds_TK = states[self.layer].double().cpu().numpy() @ self.weights.T + self.biases
            folds_T = (
                fold_of(documents[number], len(self.biases)) if documents is not None else np.zeros(len(odds_TK), int)
            )
            scores[number][:] = odds_TK[np.arange(len(odds_TK)), folds_T]
            scores[number][0] = 0
        return scores

    def save(self, path: Path) -> None:
        """Write what `load_probe` reads."""
        with path.open("wb") as file:
            np.savez(
                file,
                dealt=DEALT,
                layer=self.layer,
                weights=self.weights,
                biases=self.biases,
                auroc=self.auroc,
                precision=self.precision,
            )


def load_probe(path: Path, model: PreTrainedModel, *, beginning: int | None) -> ProbeFinder:
    """What `ProbeFinder.save` wrote, of the same model. Raises ValueError where it has folds of an earlier version."""
    with np.load(path) as saved:
        if len(saved["biases"]) > 1:
            require_dealt(path, saved)
        return ProbeFinder(
            model,
            layer=int(saved["layer"]),
            weights=saved["weights"],
            biases=saved["biases"],
            auroc=saved["auroc"].tolist(),
            precision=str(saved["precision"]),
            beginning=beginning,
        )


def fit_query_probe(
    model: PreTrainedModel, tokenizer: Any, sets: QuerySets, *, options: Probe = DEFAULTS, seed: int = 0
) -> ProbeFinder:
    """Completion tokens with the label of their query; queries are drawn by `seed` until `options.tokens` are reached.

    Raises ValueError for fewer queries than folds."""
    rng, chosen, kinds = np.random.default_rng(seed), [], []
    for side, pairs in sets.sides():
        queries, tokens = sets.tokenised(tokenizer, pairs, model), 0
        for i in rng.permutation(len(queries)).tolist():
            if tokens >= options.tokens // 2:
                break
            chosen.append(queries[i])
            kinds.append(side == "positive")
            tokens += len(queries[i].token_ids) - queries[i].completion_start
    features = _features(
        model,
        [query.token_ids for query in chosen],
        [np.arange(query.completion_start, len(query.token_ids)) for query in chosen],
        precision=options.precision,
    )
    sizes = [len(query.token_ids) - query.completion_start for query in chosen]
    probe = fit_probe(features, np.repeat(kinds, sizes), np.repeat(np.arange(len(chosen)), sizes), options, seed)
    return _finder(model, probe, options, sets.beginning)


def fit_token_probe(
    model: PreTrainedModel,
    blocks: Blocks,
    labels: Sequence[Bools],
    groups: Sequence[int] | Sequence[Ints],
    *,
    options: Probe = DEFAULTS,
    seed: int = 0,
    beginning: int | None = None,
) -> ProbeFinder:
    """Tokens of blocks with their labels (T,). groups: the document of each block, or (T,) of each of its tokens.

    Half of `options.tokens` are drawn of each kind. Raises ValueError for fewer documents than folds."""
    sample = _sample(blocks, labels, groups, options, seed)
    features = _features(model, blocks, sample.rows, precision=options.precision, beginning=beginning)
    probe = fit_probe(features, sample.labels_N, sample.groups_N, options, seed)
    return _finder(model, probe, options, beginning)


def fit_cross_probe(
    model: PreTrainedModel,
    blocks: Blocks,
    labels: Sequence[Bools],
    documents: Sequence[Ints],
    *,
    options: Probe = DEFAULTS,
    seed: int = 0,
    beginning: int | None = None,
) -> ProbeFinder:
    """As `fit_token_probe`, with a probe for each fold of documents, from tokens of the other folds' documents alone.

    `ifguide.folds` deals the documents. Layer and strength, two numbers, are chosen with all documents."""
    sample = _sample(blocks, labels, documents, options, seed)
    features = _features(model, blocks, sample.rows, precision=options.precision, beginning=beginning)
    chosen = fit_probe(features, sample.labels_N, sample.groups_N, options, seed)
    weights, biases = [], []
    for fold in range(options.folds):
        others = fold_of(sample.groups_N, options.folds) != fold
        if len(np.unique(sample.labels_N[others])) < 2:
            raise ValueError(
                f"documents outside of fold {fold} have tokens of one kind alone; lower compare.probe.folds"
            )
        weight, bias = _fit(features[chosen.layer][others], sample.labels_N[others], chosen.strength)
        weights.append(weight)
        biases.append(bias)
    return ProbeFinder(
        model,
        layer=chosen.layer,
        weights=np.stack(weights),
        biases=np.array(biases),
        auroc=chosen.auroc.tolist(),
        precision=options.precision,
        beginning=beginning,
    )


def _finder(model: PreTrainedModel, probe: LinearProbe, options: Probe, beginning: int | None) -> ProbeFinder:
    return ProbeFinder(
        model,
        layer=probe.layer,
        weights=probe.weight[None],
        biases=np.array([probe.bias]),
        auroc=probe.auroc.tolist(),
        precision=options.precision,
        beginning=beginning,
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class _Sample:
    """`rows`: of each block the tokens drawn; labels and groups of all of them in order, (N,)."""

    rows: list[Ints]
    labels_N: Bools
    groups_N: Ints


def _sample(
    blocks: Blocks,
    labels: Sequence[Bools],
    groups: Sequence[int] | Sequence[Ints],
    options: Probe,
    seed: int,
) -> _Sample:
    sizes = np.array([len(block) for block in blocks])
    block_N = np.repeat(np.arange(len(blocks)), sizes)
    place_N = np.arange(len(block_N)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    labels_N = np.concatenate([np.zeros(0, bool), *labels]).astype(bool)
    of_blocks = [np.broadcast_to(np.asarray(group), size) for group, size in zip(groups, sizes, strict=True)]
    groups_N = np.concatenate([np.zeros(0, np.int64), *of_blocks])
    rng, drawn = np.random.default_rng(seed), []
    for kind in (True, False):
        candidates = np.flatnonzero((labels_N == kind) & (place_N > 0))
        drawn.append(rng.permutation(candidates)[: options.tokens // 2])
    chosen = np.sort(np.concatenate(drawn))
    rows = [place_N[chosen[block_N[chosen] == i]] for i in range(len(blocks))]
    return _Sample(rows=rows, labels_N=labels_N[chosen], groups_N=groups_N[chosen])


def _features(
    model: PreTrainedModel, blocks: Blocks, rows: Sequence[Ints], *, precision: str, beginning: int | None = None
) -> NDArray[np.float32]:
    """(L, N, D) states of the tokens `rows` of each block, block by block; blocks without any are not read."""
    wanted = [i for i, places in enumerate(rows) if len(places)]
    features: list[NDArray[np.float32]] = [np.zeros(0, np.float32)] * len(wanted)
    for number, states in hidden_states(model, [blocks[i] for i in wanted], beginning=beginning, precision=precision):
        places = rows[wanted[number]]
        features[number] = np.stack([layer[places].float().cpu().numpy() for layer in states])
    if not features:
        raise ValueError("no tokens to fit a probe on; give queries of both sets, or labelled documents")
    return np.concatenate(features, axis=1)
