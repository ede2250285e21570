"""ifguide.methods.influence_words: the scores of words against sums written out use by use, in float64."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ifguide.methods.influence_words import USES, WORDS, score_words

Uses = Mapping[str, Sequence[float]]


def table(uses: Uses) -> pa.Table:
    rows = [
        {"word": word, "uses": len(values), "sum": sum(values), "squares": sum(value * value for value in values)}
        for word, values in uses.items()
    ]
    return pa.Table.from_pylist(rows, schema=USES)


def slowly(uses: Uses) -> tuple[dict[str, float], float]:
    """Shrunken means and k, by their definitions."""
    means = {word: sum(values) / len(values) for word, values in uses.items()}
    around = sum((value - means[word]) ** 2 for word, values in uses.items() for value in values)
    within = around / sum(len(values) - 1 for values in uses.values())
    centre = sum(means.values()) / len(means)
    spread = sum((mean - centre) ** 2 for mean in means.values()) / (len(means) - 1)
    between = spread - within * sum(1 / len(values) for values in uses.values()) / len(uses)
    k = within / between
    scores = {word: (sum(values) + k * centre) / (len(values) + k) for word, values in uses.items()}
    return scores, k


@st.composite
def uses_of_words(draw: st.DrawFn) -> Uses:
    value = st.floats(-100, 100).map(lambda x: round(x, 3))
    uses = {
        word: draw(st.lists(value.map(lambda x, at=at: x + at), min_size=1, max_size=6))
        for word, at in zip("abcdef", draw(st.lists(st.sampled_from([-900, -300, 0, 500]), min_size=6)), strict=False)
    }
    uses["a"] = [*uses["a"], uses["a"][0] + 1.0]  # one is used twice
    return uses


@given(uses=uses_of_words(), cut=st.integers(0, 6))
def test_scores_of_words_are_their_shrunken_means(uses: Uses, cut: int) -> None:
    try:
        expected, k = slowly(uses)
    except ZeroDivisionError:
        return
    if k < 1e-9 or not 0 < k < 1e3:  # the other sign is refused, and near 0 rounding decides
        return
    parts = [  # of two shards: the first uses of each word, and the others
        {word: values[:cut] for word, values in uses.items() if values[:cut]},
        {word: values[cut:] for word, values in uses.items() if values[cut:]},
    ]
    scored, shrinkage = score_words(table(part) for part in parts)
    assert scored.schema == WORDS
    assert shrinkage == pytest.approx(k, rel=1e-6)
    rows = {row["word"]: row for row in scored.to_pylist()}
    assert {word: row["score"] for word, row in rows.items()} == pytest.approx(expected, rel=1e-6, abs=1e-6)
    assert {word: row["uses"] for word, row in rows.items()} == {word: len(values) for word, values in uses.items()}
    scores = scored.column("score").to_pylist()
    assert all(a >= b for a, b in itertools.pairwise(scores))


def test_k_is_the_ratio_of_the_variances_that_made_the_scores() -> None:
    rng = np.random.default_rng(0)
    effects, counts = rng.normal(5.0, 2.0, 4000), rng.integers(1, 9, 4000)
    uses = {f"w{i}": rng.normal(effects[i], 3.0, counts[i]).tolist() for i in range(4000)}
    scored, k = score_words([table(uses)])
    assert k == pytest.approx(9 / 4, rel=0.1)
    # Drawn to the common mean they are nearer to what made them than plain means are.
    rows = {row["word"]: row for row in scored.to_pylist()}
    errors = {
        name: np.mean([(rows[f"w{i}"][name] - effects[i]) ** 2 for i in range(4000)]) for name in ("mean", "score")
    }
    assert errors["score"] < 0.7 * errors["mean"]


def test_words_that_cannot_be_told_from_their_uses_are_refused() -> None:
    with pytest.raises(ValueError, match="no word is used twice"):
        score_words([table({"a": [1.0], "b": [2.0]})])
    with pytest.raises(ValueError, match="differ by no more than"):
        score_words([table({"a": [-1.0, 1.0], "b": [-1.0, 1.0]})])
    with pytest.raises(ValueError, match="differ by no more than"):
        score_words([table({"a": [1.0, 2.0]})])
