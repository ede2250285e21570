"""ifguide.methods.random_masks: as many tokens, of the same types, each as likely."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from ifguide.methods.random_masks import random_of_types, random_tokens

BLOCK = 16


def corpus(seed: int, size: int = 800) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens of Zipf-like types, a mask that prefers some, and the tokens that have a prediction."""
    rng = np.random.default_rng(seed)
    tokens = rng.zipf(1.5, size).clip(max=40).astype(np.int32)
    candidates = np.arange(size) % BLOCK > 0
    return tokens, candidates & (rng.random(size) < 0.03 + 0.2 * (tokens % 5 == 0)), candidates


@pytest.mark.parametrize("seed", range(5))
def test_a_mask_of_the_same_types_has_as_many_of_each_id_and_no_first_token(seed: int) -> None:
    tokens, masked, candidates = corpus(seed)
    drawn = random_of_types(tokens, masked, candidates, np.random.default_rng(seed))
    assert Counter(tokens[drawn].tolist()) == Counter(tokens[masked].tolist())
    assert not drawn[~candidates].any()
    assert (drawn != masked).any()
    again = random_of_types(tokens, masked, candidates, np.random.default_rng(seed))
    np.testing.assert_array_equal(drawn, again)


@pytest.mark.parametrize("seed", range(5))
def test_other_uses_share_with_the_mask_only_what_its_types_leave_no_choice_of(seed: int) -> None:
    tokens, masked, candidates = corpus(seed)
    masked |= candidates & (tokens == 7)  # all uses of one type
    drawn = random_of_types(tokens, masked, candidates, np.random.default_rng(seed), others_first=True)
    assert Counter(tokens[drawn].tolist()) == Counter(tokens[masked].tolist())
    assert not drawn[~candidates].any()
    wanted, left = Counter(tokens[masked].tolist()), Counter(tokens[candidates & ~masked].tolist())
    shared = Counter(tokens[drawn & masked].tolist())
    assert shared == +Counter({token: wanted[token] - left[token] for token in wanted})
    assert shared[7] == wanted[7] > 0
    other = random_of_types(tokens, masked, candidates, np.random.default_rng(seed + 100), others_first=True)
    assert (other != drawn).any()


def test_each_occurrence_of_a_type_is_as_likely() -> None:
    tokens = np.array([7, 3, 7, 7, 3, 7, 9, 7])
    masked, candidates = np.array([0, 0, 1, 1, 1, 0, 0, 0], bool), np.array([0, 1, 1, 1, 1, 1, 1, 1], bool)
    rng = np.random.default_rng(0)
    shares = np.mean([random_of_types(tokens, masked, candidates, rng) for _ in range(8000)], axis=0)
    # two of four 7s and one of two 3s; the 7 at the start of the block is none of them
    np.testing.assert_allclose(shares, [0, 0.5, 0.5, 0.5, 0.5, 0.5, 0, 0.5], atol=0.03)


def test_a_mask_of_more_tokens_of_a_type_than_can_be_drawn_is_refused() -> None:
    tokens = np.array([4, 4, 5])
    with pytest.raises(ValueError, match="token 4: 2 are masked, 1 can be drawn"):
        random_of_types(tokens, np.array([1, 1, 0], bool), np.array([0, 1, 1], bool), np.random.default_rng(0))
    with pytest.raises(ValueError, match="token 4 is masked and has no candidate"):
        random_of_types(tokens, np.array([1, 0, 0], bool), np.array([0, 0, 1], bool), np.random.default_rng(0))


def test_nothing_masked_is_nothing_drawn() -> None:
    tokens, _, candidates = corpus(0)
    for drawn in (
        random_of_types(tokens, np.zeros(len(tokens), bool), candidates, np.random.default_rng(0)),
        random_tokens(np.zeros(len(tokens), bool), candidates, np.random.default_rng(0)),
    ):
        assert not drawn.any()


def test_random_tokens_are_as_many_of_the_candidates() -> None:
    _, masked, candidates = corpus(1)
    drawn = random_tokens(masked, candidates, np.random.default_rng(1))
    assert drawn.sum() == masked.sum()
    assert not drawn[~candidates].any()
