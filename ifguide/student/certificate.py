"""How near a student's scores are to the exact ones, from a random audit: figures with intervals, by source.

The audit is a simple random sample of the corpus' blocks, scored both exactly and by the student. Of its tokens,

    pearson, spearman    of the two scores;
    overlap              the share of the exact scores' top `TOP_SHARE` that is in the student's own;
    recall               the share of the exact scores' top `TOP_SHARE` that is in the student's top `RECHECK_SHARE`;
    rechecked            the share of it that lies in blocks that were rechecked: what is surely exact.

Tokens of a block are alike, so an interval resamples blocks (Field and Welsh 2007), and takes both tops anew in each
replicate. A bootstrap of shares that are all 1 has no width. So the interval of a share is the hull of the bootstrap's
and of Wilson's (1927) for as many trials as there are blocks that hold an exact top token: with ten such blocks, and
all tokens found, the bound is .72 and not 1. Where scores tie at the edge of a top, each of the tied tokens is in it
in part, so that a top has its exact size.

Figures of a source are of its tokens alone, but of the tops of all sources: a mask is cut from the whole corpus. The
sources with the most tokens in the audit have them, `MOST_SOURCES` at most.

Cost: a sort of the audit's tokens, and about ten passes over them for each replicate, twice: whole, and by source.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ifguide.evaluation.bootstrap import Bootstrap, Figure, Replicates
from ifguide.student.fidelity import TOP_SHARE, PairedScores
from ifguide.student.said import NAMED, RECHECK_SHARE, counted, interval, listed

NORMAL_QUANTILE = 1.959964  # of Wilson's interval, 95%
MOST_SOURCES = 200  # that have figures of their own: each takes a pass over its tokens for every replicate
MISTAKES = 0.05  # how often a source of many falls short by chance
FIGURES = ("pearson", "spearman", "overlap", "recall", "rechecked")
SHARES = FIGURES[2:]  # of the exact top
Floats = NDArray[np.floating]


@dataclass(frozen=True, kw_only=True, eq=False)
class Audit:
    """Tokens that have both scores, (N,) each, none of them without a prediction. `blocks_N` numbers the block and
    `sources_N` the place in `sources` of each; `sources` names all of the corpus, sampled or not. `rechecked_N`: the
    token lies in what would be scored exactly even if it were not audited."""

    exact_N: Floats
    student_N: Floats
    rechecked_N: NDArray[np.bool_]
    blocks_N: NDArray[np.integer]
    sources_N: NDArray[np.integer]
    sources: Sequence[str]

    def __post_init__(self) -> None:
        if (
            len({len(own) for own in (self.exact_N, self.student_N, self.rechecked_N, self.blocks_N, self.sources_N)})
            > 1
        ):
            raise ValueError("scores, blocks and sources of an audit must be of the same tokens")
        if len(self.exact_N) < 2:
            raise ValueError("an audit needs two tokens at least; raise the share of blocks that is audited")
        for kind, scores_N in (("exact", self.exact_N), ("student's", self.student_N)):
            if not np.isfinite(scores_N).all():
                raise ValueError(f"the {kind} scores of the audit are not finite")


@dataclass(frozen=True, kw_only=True)
class Fidelity:
    """Figures of one group of tokens, with intervals over its `blocks`; `top_tokens` of them, in `top_blocks`, are in
    the exact top."""

    pearson: Figure
    spearman: Figure
    overlap: Figure
    recall: Figure
    rechecked: Figure
    tokens: int
    blocks: int
    top_tokens: int
    top_blocks: int


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """Of all tokens, and by source: those of the `audited_sources` with the most tokens in the audit, `MOST_SOURCES` at
    most. `rechecked_share`: of the audit's tokens. `unaudited`: the first `NAMED`, by name, of the `unaudited_sources`,
    which have no token in it."""

    whole: Fidelity
    by_source: Mapping[str, Fidelity]
    audited_sources: int
    unaudited: Sequence[str]
    unaudited_sources: int
    top_share: float
    rechecked_share: float

    def shortfalls(self, least: float, *, cascade: bool) -> list[str]:
        """What is not good enough, in words; empty where all is. Of a cascade it is `rechecked` that counts, of a
        student alone `recall`.

        All tokens together must be shown to reach `least`: the bound counts. A source is small, and its interval is
        wide: it falls short where even the upper end of its interval does, and that of Wilson's at a confidence of
        1 - .05 / S too. With S sources that are good enough, one falls short by chance in one audit of twenty."""
        shortfalls = []
        figure, where = counted(cascade=cascade)

        def said(source: str, share: Figure, top_tokens: int) -> str:
            if share.value is None:
                return f"{source}: the audit holds none of the highest exact scores"
            highest = f"the {top_tokens} highest exact scores of the audit"
            return f"{source}: {interval(asdict(share))} of {highest} are in {where}"

        whole: Figure = getattr(self.whole, figure)
        if whole.low is None or whole.low < least:
            of_all = said("all sources", whole, self.whole.top_tokens)
            shortfalls.append(f"{of_all}, and its bound must reach {least:g}")
        quantile = NormalDist().inv_cdf(1 - MISTAKES / 2 / max(1, len(self.by_source)))
        for source, fidelity in self.by_source.items():
            share: Figure = getattr(fidelity, figure)
            if share.value is None or share.high is None:
                continue
            if max(share.high, wilson(share.value, fidelity.top_blocks, quantile)[1]) < least:
                shortfalls.append(f"{said(source, share, fidelity.top_tokens)}, surely below {least:g}")
        return shortfalls

    def __str__(self) -> str:
        """One line for people."""
        whole = (self.whole.spearman, self.whole.recall, self.whole.rechecked)
        spearman, recall, rechecked = (interval(asdict(figure)) for figure in whole)
        return (
            f"Spearman {spearman} with the exact scores; of their top {self.top_share:.0%} {recall} in the student's"
            f" top {RECHECK_SHARE:.0%}, {rechecked} in rechecked blocks"
            + (f"; no block of {listed(self.unaudited, self.unaudited_sources)}" if self.unaudited else "")
        )

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def certify(audit: Audit, *, bootstrap: Bootstrap | None = None) -> Certificate:
    """The certificate of an audit; the same for the same audit, whatever order its tokens are in."""
    bootstrap = bootstrap or Bootstrap()
    _, block_N = np.unique(audit.blocks_N, return_inverse=True)
    order = np.lexsort((audit.student_N, audit.exact_N, block_N))
    exact_N, student_N, rechecked_N = audit.exact_N[order], audit.student_N[order], audit.rechecked_N[order]
    block_N, source_N = block_N[order], audit.sources_N[order]
    audited, tokens_A = np.unique(source_N, return_counts=True)
    sources = np.sort(audited[np.argsort(-tokens_A, kind="stable")[:MOST_SOURCES]])
    unaudited = sorted(audit.sources[number] for number in set(range(len(audit.sources))) - set(audited.tolist()))
    parts = [np.arange(len(exact_N)), *(np.flatnonzero(source_N == source) for source in sources)]
    whole = PairedScores(exact_N, student_N)
    groups = [PairedScores(exact_N[rows], student_N[rows]) for rows in parts]

    def figures(weight_N: Floats) -> NDArray[np.float64]:
        """(groups, figures) of the tokens with their weights."""
        exact_top_N = whole.exact.top(weight_N, TOP_SHARE) * weight_N
        found_SN: list[Any] = [whole.student.top(weight_N, share) for share in (TOP_SHARE, RECHECK_SHARE)]
        found_SN.append(rechecked_N)
        rows = []
        for scores, own in zip(groups, parts, strict=True):
            highest = exact_top_N[own].sum()
            shares = (exact_top_N[own] @ found_N[own] / highest if highest else np.nan for found_N in found_SN)
            rows.append([*scores.correlations(weight_N[own]), *shares])
        return np.array(rows)

    ones_N = np.ones(len(exact_N))
    values_GF, top_N = figures(ones_N), whole.exact.top(ones_N, TOP_SHARE)
    counts = (row for chunk in bootstrap.counts(int(block_N.max()) + 1) for row in chunk)
    samples_SGF = np.stack([figures(row[block_N]) for row in counts])
    fidelities = [
        _fidelity(bootstrap, values_GF[g], samples_SGF[:, g], top_N[own], block_N[own]) for g, own in enumerate(parts)
    ]
    return Certificate(
        whole=fidelities[0],
        by_source={audit.sources[source]: own for source, own in zip(sources, fidelities[1:], strict=True)},
        audited_sources=len(audited),
        unaudited=unaudited[:NAMED],
        unaudited_sources=len(unaudited),
        top_share=TOP_SHARE,
        rechecked_share=float(rechecked_N.mean()),
    )


def _fidelity(
    bootstrap: Bootstrap, values_F: Floats, samples_SF: Floats, top_N: Floats, block_N: NDArray[np.integer]
) -> Fidelity:
    blocks, holding = len(np.unique(block_N)), len(np.unique(block_N[top_N > 0]))
    figures = {}
    for name, value, samples_S in zip(FIGURES, values_F, samples_SF.T, strict=True):
        figure = bootstrap.figure(Replicates(value=float(value), samples=samples_S, n=blocks))
        figures[name] = _widened(figure, holding) if name in SHARES else figure
    top_tokens = round(float(top_N.sum()))
    return Fidelity(**figures, tokens=len(block_N), blocks=blocks, top_tokens=top_tokens, top_blocks=holding)


def _widened(share: Figure, trials: int) -> Figure:
    """The hull of a share's interval and of Wilson's for `trials`."""
    if share.value is None or share.low is None or share.high is None or trials == 0:
        return Figure(value=None, low=None, high=None, n=share.n)
    low, high = wilson(share.value, trials)
    return Figure(value=share.value, low=min(share.low, low), high=max(share.high, high), n=share.n)


def wilson(share: float, trials: int, quantile: float = NORMAL_QUANTILE) -> tuple[float, float]:
    """Wilson's interval of a share of independent trials; 95% by default."""
    z2 = quantile**2
    centre = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    half = math.sqrt(z2 * (share * (1 - share) / trials + z2 / (4 * trials**2))) / (1 + z2 / trials)
    return max(0.0, centre - half), min(1.0, centre + half)
