"""How well two scorings of the same tokens agree: what the self-check of a run and the benchmarks report.

A low-precision path can return scores that are finite, plausible and wrong, so the chosen method is compared with the
exact one on tokens of the corpus itself. Selection uses the upper end of the scores: hence the top 1% beside the
correlations. Of few tokens the top is wider, 30 of them: a single swap at the edge of a top of 5 would be a fifth of it
(a correct bfloat16 path had .8 in 5 of 50 samples of 508 tokens, and .967 at the least by a top of 30). Cost: a sort of
the tokens compared.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

TOP_SHARE, LEAST_TOP = 0.01, 30  # of the tokens, and how many of them at the least


@dataclass(frozen=True, kw_only=True)
class ScoreAgreement:
    """`correlation` Pearson's, `spearman` of ranks, `top` the share of one's `top_tokens` highest that are also the
    other's; of `tokens` tokens."""

    correlation: float
    spearman: float
    top: float
    tokens: int

    @property
    def least(self) -> float:
        """What must reach the threshold: the smaller of the correlation and the agreement of the top."""
        return min(self.correlation, self.top)

    @property
    def top_tokens(self) -> int:
        """How many tokens the top is of."""
        return top_count(self.tokens)


def top_count(tokens: int) -> int:
    """How many of so many tokens are their top: 1%, but 30 at the least, and then no more than half of them."""
    return max(1, round(TOP_SHARE * tokens), min(LEAST_TOP, tokens // 2))


def compare(scores: Tensor, exact: Tensor, predicted: Tensor) -> ScoreAgreement:
    """Agreement of two score tensors of one shape over the tokens where `predicted` is true.

    Raises ValueError when there are fewer than two tokens, or a score is not finite.
    """
    a, b = scores[predicted].double(), exact[predicted].double()
    if len(a) < 2:
        raise ValueError("scores of fewer than two tokens cannot be compared")
    require_finite(a)
    require_finite(b)
    count = top_count(len(a))
    top_a, top_b = (set(torch.topk(scored, count).indices.tolist()) for scored in (a, b))
    return ScoreAgreement(
        correlation=_pearson(a, b),
        spearman=_pearson(ranks(a), ranks(b)),
        top=len(top_a & top_b) / count,
        tokens=len(a),
    )


def require_finite(scores: Tensor) -> None:
    """Raises ValueError when a score is not finite."""
    if not bool(torch.isfinite(scores).all()):
        raise ValueError("scores are not finite; the proxy or the query overflows, check both for NaN")


def _pearson(a: Tensor, b: Tensor) -> float:
    a, b = a - a.mean(), b - b.mean()
    norm = float(a.norm() * b.norm())
    return float(a @ b) / norm if norm > 0 else 0.0


def ranks(values: Tensor) -> Tensor:
    """(N,) float64 ranks from 0 to N - 1, equal values sharing their mean rank."""
    _, inverse, counts = torch.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - 0.5 * (counts + 1))[inverse]
