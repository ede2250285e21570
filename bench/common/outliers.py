"""Texts that stand out but show no behaviour, laid among judged ones: what share of a mask they take, and why.

Four kinds are injected, as many tokens of each: `repeated` (one or a few tokens over and over), `list` (names, numbers,
dates), `code` (functions of Python's standard library) and `language` (plain sentences in ten other languages). None
shows the behaviour, so any of them in a mask is there by leverage: its scores are far from 0 along any direction.

Each token is scored along V and along null directions of halves of the queries (`ifguide.influence.nulls`) in one pass.
Masks of the highest 2% by the exact score, the smoothed one and the z-score; and Algorithm 1 by each, ranking documents
by sum and by rate. `fdr_realised`: each null in turn takes the place of the score, the others being its nulls. That is
a query of shuffled labels, and the share of its tokens with p at most `fdr_nominal` should be just that.
"""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.metrics import average_precision_score
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from bench.common.smoothing import TextSmoother
from ifguide.selection.algorithm import Documents
from ifguide.selection.fdr import fit_spread, null_variance, standardise
from ifguide.selection.quantiles import high_histogram
from ifguide.selection.whole import select_tokens

Scores = Sequence[NDArray[np.floating]]  # (T,) of each block; entry 0 is of no token
BUDGET = 0.02
NOMINAL = 0.05  # the share of tokens with p at most this, along shuffled queries
REPEATED = (" the", " ha", "!", " buy now", " la", "=", " very", " 0")
SENTENCES = (
    "Der Zug nach Hamburg hatte gestern zwanzig Minuten Verspätung, weil auf der Strecke ein Baum lag.",
    "Nous avons planté des tomates derrière la maison, mais les limaces les ont toutes mangées.",
    "Mi hermana trabaja en una biblioteca pequeña y vuelve a casa en bicicleta por la tarde.",
    "Il mercato del sabato comincia presto, e i pescatori portano ancora le ceste dal porto.",
    "A minha avó faz pão todas as semanas e deixa arrefecer a massa junto da janela.",
    "De brug over het kanaal blijft tot vrijdag dicht, dus fietsers moeten langs de molen.",
    "Pociąg odjeżdża z trzeciego peronu, a bilety można kupić u konduktora bez dopłaty.",
    "Yağmur başlayınca pazarcılar tezgâhlarını topladı ve çay ocağına sığındı.",
    "Vlak z Brna přijede o půl hodiny později, protože na trati opravují výhybku.",
    "Mustikat kypsyivät tänä vuonna myöhään, mutta metsästä löytyi silti kaksi täyttä ämpäriä.",
)


@dataclass(frozen=True, kw_only=True, eq=False)
class Laid:
    """Blocks of token ids after an EOS, and the kind of each: `judged`, or what was injected."""

    blocks: list[NDArray[np.int32]]
    kinds: list[str]

    def of_tokens(self) -> NDArray[np.str_]:
        """The kind of each predicted token."""
        return np.repeat(self.kinds, [len(block) - 1 for block in self.blocks])


def lay_among(
    judged: Sequence[NDArray[np.int32]], tokenizer: PreTrainedTokenizerFast, *, share: float, length: int, seed: int
) -> Laid:
    """The judged blocks, then outliers of `length` tokens each, every kind with `share` of the judged tokens."""
    rng = np.random.default_rng(seed)
    number = max(1, round(share * sum(map(len, judged)) / length))
    blocks, kinds = list(judged), ["judged"] * len(judged)
    for kind, texts in _texts(number, length, rng).items():
        for text in texts:
            ids = tokenizer(text, add_special_tokens=False)["input_ids"][:length]
            blocks.append(np.array([tokenizer.eos_token_id, *ids], np.int32))
            kinds.append(kind)
    return Laid(blocks=blocks, kinds=kinds)


def _texts(number: int, length: int, rng: np.random.Generator) -> dict[str, list[str]]:
    """`number` texts of each kind, of at least `length` tokens."""
    functions = [
        inspect.getsource(item)
        for module in (textwrap, inspect)
        for item in vars(module).values()
        if inspect.isfunction(item) and item.__code__.co_filename == module.__file__  # others patch `inspect`
    ]

    def listed() -> str:
        start = int(rng.integers(1, 90))
        names = rng.permutation(["Adler", "Brandt", "Costa", "Duarte", "Eriksen", "Fontana", "Grabowski", "Haas"])
        rows = (
            f"{start + row}. {names[row % 8]}, {1900 + (37 * row) % 120}, {row * start % 97}.5" for row in range(length)
        )
        return "\n".join(rows)

    return {
        "repeated": [REPEATED[row % len(REPEATED)] * length for row in range(number)],
        "list": [listed() for _ in range(number)],
        "code": ["\n\n".join(functions[i] for i in rng.permutation(len(functions))[:12]) for _ in range(number)],
        "language": [" ".join(rng.permutation(SENTENCES)) * (1 + length // 200) for _ in range(number)],
    }


def outlier_figures(
    model: PreTrainedModel, laid: Laid, scores_KN: NDArray[np.float32], truth: Sequence[NDArray[np.bool_]]
) -> dict[str, Any]:
    """The figures of the last line, and on the way a table of shares and one of leverage.

    scores_KN: (1 + K, N) of the predicted tokens along V and its nulls. truth: (T,) labels of the tokens of the judged
    blocks, the first ones.
    """
    kinds, sizes = laid.of_tokens(), [len(block) - 1 for block in laid.blocks]
    z_KN = z_scores(scores_KN)
    exact = [np.append(0, part).astype(np.float32) for part in np.split(scores_KN[0], np.cumsum(sizes)[:-1])]
    measures = {
        "exact": scores_KN[0],
        "smoothed": _flat(TextSmoother(model, laid.blocks, {"exact": exact}).smoothed()["exact"]),
        "z": z_KN[0],
    }
    shares: dict[str, dict[str, float]] = {}
    for name, values in measures.items():
        shares[name] = shares_of(top(values), kinds)
        shares[f"{name}, documents by sum"] = shares_of(algorithm_1(values, sizes, rank_by="sum"), kinds)
        shares[f"{name}, documents by rate"] = shares_of(algorithm_1(values, sizes, rank_by="rate"), kinds)
    for name, row in shares.items():
        print(f"{name:28s} " + "  ".join(f"{kind} {share:.3f}" for kind, share in row.items()))
    for kind, row in leverage(model, laid, scores_KN).items():
        print(f"{kind:28s} " + "  ".join(f"{name} {value:.4g}" for name, value in row.items()))
    judged = kinds == "judged"
    labels = np.concatenate([marked[1:] for marked in truth])
    return {
        "ap_z": round(float(average_precision_score(labels, z_KN[0][judged])), 4),
        "outlier_share_before": round(1 - shares["exact, documents by sum"]["judged"], 4),
        "outlier_share_after": round(1 - shares["smoothed, documents by rate"]["judged"], 4),
        "outlier_shares": {name: round(1 - row["judged"], 4) for name, row in shares.items()},
        "fdr_nominal": NOMINAL,
        "fdr_realised": round(shuffled_rate(scores_KN[1:], NOMINAL), 4),
    }


def z_scores(scores_KN: NDArray[np.float32]) -> NDArray[np.float32]:
    """z of the first row and of its nulls, the others."""
    spread = fit_spread(high_histogram(null_variance(scores_KN[1:])), len(scores_KN) - 1)
    return standardise(scores_KN[0], scores_KN[1:], spread)


def shuffled_rate(nulls_KN: NDArray[np.float32], level: float) -> float:
    """The mean share of tokens with p <= level, each null in turn in place of the score."""
    rates = []
    for row in range(len(nulls_KN)):
        z_KN = z_scores(np.concatenate([nulls_KN[row : row + 1], np.delete(nulls_KN, row, axis=0)]))
        rates.append(float(np.mean(z_KN[0] > np.quantile(z_KN[1:], 1 - level))))
    return float(np.mean(rates))


def top(values: NDArray[np.floating], budget: float = BUDGET) -> NDArray[np.bool_]:
    """The highest values, a share `budget` of them; ties by position."""
    chosen = np.zeros(len(values), bool)
    chosen[np.argsort(-values, kind="stable")[: int(budget * len(values))]] = True
    return chosen


def algorithm_1(
    values: NDArray[np.floating], sizes: Sequence[int], *, rank_by: Literal["sum", "rate"]
) -> NDArray[np.bool_]:
    """The mask of Algorithm 1 at its defaults, the texts end to end in one block after a token that none predicts."""
    begins = 1 + np.concatenate([[0], np.cumsum(sizes)[:-1]])
    documents = Documents(
        token_start=np.append(0, begins).astype(np.int64), num_tokens=np.append(1, sizes).astype(np.int64)
    )
    scores = np.append(0, values).astype(np.float32)[None]
    return select_tokens(scores, np.array([scores.shape[1]]), documents, rank_by=rank_by)[0, 1:]


def shares_of(mask: NDArray[np.bool_], kinds: NDArray[np.str_]) -> dict[str, float]:
    """The share of the masked tokens that each kind is of; of an empty mask 0, and `judged` 1."""
    total = max(int(mask.sum()), 1)
    found = {
        str(kind): float(np.count_nonzero(mask & (kinds == kind))) / total for kind in dict.fromkeys(kinds.tolist())
    }
    return found if mask.any() else found | {"judged": 1.0}


def leverage(model: PreTrainedModel, laid: Laid, scores_KN: NDArray[np.float32]) -> dict[str, dict[str, float]]:
    """Of each kind: the spread of the nulls over that of all tokens, that of the scores over that of the kind's nulls,
    mean NLL, and the mean norm of the loss' gradient of the head's weight."""
    kinds, (nll, norm) = laid.of_tokens(), _head(model, laid.blocks)
    null = np.sqrt(null_variance(scores_KN[1:]).astype(np.float64))
    found = {}
    for kind in dict.fromkeys(kinds.tolist()):
        mine = kinds == kind
        found[str(kind)] = {
            "tokens": float(mine.sum()),
            "null_spread": float(np.sqrt(np.mean(null[mine] ** 2) / np.mean(null**2))),
            "score_over_null": float(
                np.sqrt(np.mean(scores_KN[0][mine].astype(np.float64) ** 2) / np.mean(null[mine] ** 2))
            ),
            "nll": float(nll[mine].mean()),
            "head_gradient": float(norm[mine].mean()),
        }
    return found


@torch.no_grad()
def _head(model: PreTrainedModel, blocks: Sequence[NDArray[np.int32]]) -> tuple[NDArray[np.floating], ...]:
    """Of the predicted tokens (N,): NLL, and the norm of its gradient of the head's weight, which is that of the last
    state times that of p - onehot."""
    losses, norms = [], []
    for block in blocks:
        ids = torch.from_numpy(block.astype(np.int64))[None].to(model.device)
        output = model(ids, output_hidden_states=True, use_cache=False)
        logs, states = output.logits[0, :-1].float().log_softmax(-1), output.hidden_states[-1][0, :-1].float()
        own = logs.gather(1, ids[0, 1:, None])[:, 0]
        errors = logs.exp().square().sum(-1) - 2 * own.exp() + 1
        losses.append(-own.cpu().numpy())
        norms.append((errors.clamp(min=0).sqrt() * states.norm(dim=-1)).cpu().numpy())
    return np.concatenate(losses), np.concatenate(norms)


def _flat(scores: Scores) -> NDArray[np.floating]:
    return np.concatenate([np.asarray(block)[1:] for block in scores])
