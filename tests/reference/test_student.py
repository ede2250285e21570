"""Students against plain float64 oracles: n-grams by dictionaries."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

from ifguide.student.ngrams import NgramStudent, NgramSums, choose_ngrams, ngram_places

LONGEST = 3


def blocks(count: int = 24, size: int = 40, vocabulary: int = 9) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Token ids, scores, and where there is a score: not at the first token, not in the padding."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, vocabulary, (count, size))
    lengths = rng.integers(5, size + 1, count)[:, None]
    known = (np.arange(size) >= 1) & (np.arange(size) < lengths)
    return tokens, np.where(known, rng.normal(size=tokens.shape) + tokens, 0), known


def by_dictionary(
    tokens: np.ndarray, scores: np.ndarray, known: np.ndarray, strength: float, asked: np.ndarray
) -> np.ndarray:
    """The recursion of the module's text, one token and one n-gram at a time."""
    seen: defaultdict[tuple[int, ...], list[float]] = defaultdict(list)
    for row in range(len(tokens)):
        for j in range(tokens.shape[1]):
            for n in range(LONGEST + 1):
                if known[row, j]:
                    seen[ngram(tokens[row], j, n)].append(float(scores[row, j]))
    expected = np.zeros(asked.shape)
    for row in range(len(asked)):
        for j in range(1, asked.shape[1]):
            mean = sum(seen[()]) / len(seen[()])
            for n in range(1, LONGEST + 1):
                found = seen[ngram(asked[row], j, n)]
                mean = (sum(found) + strength * mean) / (len(found) + strength)
            expected[row, j] = mean
    return expected


def ngram(tokens: np.ndarray, j: int, n: int) -> tuple[int, ...]:
    """The n tokens up to and with j; -1 before the block."""
    return tuple(int(tokens[i]) if i >= 0 else -1 for i in range(j - n + 1, j + 1))


@pytest.mark.parametrize("strength", [0.5, 10.0])
def test_ngrams_are_shrunken_means_of_what_ends_in_a_token(strength: float) -> None:
    tokens, scores, known = blocks()
    student = NgramStudent(sums=NgramSums.of(tokens, scores, known, longest=LONGEST), strength=strength)
    asked = blocks(vocabulary=11)[0]  # two tokens that the sample does not hold
    np.testing.assert_allclose(
        student.score(asked), by_dictionary(tokens, scores, known, strength, asked), rtol=1e-5, atol=1e-6
    )


def test_ngrams_add_up_over_parts_and_files_keep_them(tmp_path: Path) -> None:
    tokens, scores, known = blocks()
    whole = NgramStudent(sums=NgramSums.of(tokens, scores, known), strength=3.0)
    parts = [NgramSums.of(tokens[i::3], scores[i::3], known[i::3]) for i in range(3)]
    added = NgramStudent(sums=parts[2] + parts[0] + parts[1], strength=3.0)
    np.testing.assert_allclose(added.score(tokens), whole.score(tokens), rtol=1e-6)
    whole.save(tmp_path / "student.npz")
    np.testing.assert_array_equal(NgramStudent.load(tmp_path / "student.npz").score(tokens), whole.score(tokens))


def test_ngrams_of_a_large_vocabulary_seldom_share_a_place() -> None:
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, 150_000, (50, 1000))
    for n, places in enumerate(ngram_places(tokens, longest=3, bits=20), start=1):
        different = len({ngram(row, j, n) for row in tokens for j in range(1000)})
        expected = 2**20 * (1 - (1 - 2**-20) ** different)  # places that so many balls hit by chance
        assert len(np.unique(places)) == pytest.approx(expected, rel=0.01)


def test_ngrams_of_nothing_and_of_no_number_are_refused() -> None:
    tokens, scores, known = blocks()
    with pytest.raises(ValueError, match="holds no token"):
        NgramStudent(sums=NgramSums.of(tokens, scores, known & False), strength=1.0).score(tokens)
    with pytest.raises(ValueError, match="not finite"):
        NgramSums.of(tokens, np.full(tokens.shape, np.nan), known)


def test_a_larger_sample_than_there_are_places_makes_a_student_no_worse(tmp_path: Path) -> None:
    """Where a place holds hundreds of different n-grams, their mean is no news; a shorter one is taken."""
    rng = np.random.default_rng(4)
    means = rng.normal(size=500)

    def sample(rows: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        tokens = rng.integers(0, 500, (rows, 64))
        known = np.ones(tokens.shape, bool)
        known[:, 0] = False
        return tokens, means[tokens] + rng.normal(size=tokens.shape), known

    held = sample(200)
    recalls = {}
    for rows in (100, 10_000):
        student, tried = choose_ngrams(NgramSums.of(*sample(rows), bits=12), *held)
        recalls[rows] = max(own["recall"] for own in tried)
        assert {own["longest"] for own in tried} == {1, 2, 3, 4}
    assert student.longest < 4, "4-grams share their places with hundreds of others"
    assert recalls[10_000] >= recalls[100] - 0.02
    whole = [own["recall"] for own in tried if own["longest"] == 4]
    assert max(whole) < recalls[100] - 0.2, "which they would bring down"
    student.save(tmp_path / "student.npz")
    assert NgramStudent.load(tmp_path / "student.npz").longest == student.longest
