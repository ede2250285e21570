"""Further training on toxic text, and the tokens until a model is as toxic as another."""

from __future__ import annotations

import math

import pytest
import torch

from bench.durability import BATCH, as_markdown, teach, tokens_to
from tests.tiny import tiny_model

COUNTS = [0, 100, 1000]


def test_the_tokens_to_a_toxicity_are_between_two_counts_in_logarithms() -> None:
    assert tokens_to([0.2, 0.2, 0.6], COUNTS, 0.4) == pytest.approx(math.sqrt(101 * 1001) - 1, abs=0.1)
    assert tokens_to([0.2, 0.4, 0.6], COUNTS, 0.4) == 100
    assert tokens_to([0.5, 0.4, 0.6], COUNTS, 0.4) == 0  # it is that toxic to begin with
    assert tokens_to([0.2, 0.3, 0.39], COUNTS, 0.4) is None


def test_the_table_has_the_tokens_that_were_seen() -> None:
    plain = {
        "tokens": [0, 403],
        "emt": {"words": [0.5, 0.9]},
        "tokens_to_baseline": {"words": 0.0},
        "recognition": None,
    }
    never = plain | {"emt": {"words": [0.1, 0.2]}, "tokens_to_baseline": {"words": None}}
    header, *_, last = as_markdown({"baseline": plain, "filtered": never}).split("\n\n")[1].splitlines()
    assert header.split(" | ")[1:3] == ["0", "403"]
    assert "over 403" in last


def test_teaching_stops_after_the_count_and_goes_on_from_there() -> None:
    texts = [[1 + (i + j) % 9 for j in range(3 + i % 4)] for i in range(21)]
    in_one, in_two = tiny_model("gpt_neox", dtype=torch.float64), tiny_model("gpt_neox", dtype=torch.float64)
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-3) for model in (in_one, in_two)]
    seen = teach(in_one, optimizers[0], texts, 0, 250)
    assert 250 <= seen < 250 + BATCH * 6
    half = teach(in_two, optimizers[1], texts, 0, 120)
    assert 120 <= half < seen
    assert teach(in_two, optimizers[1], texts, half, 250) == seen
    for one, two in zip(in_one.parameters(), in_two.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=0)
    assert teach(in_two, optimizers[1], texts, seen, seen) == seen  # nothing more is learnt


def test_what_is_taught_becomes_likelier() -> None:
    model, texts = tiny_model("gpt_neox"), [[1, 2, 3, 4, 5, 6]] * 8
    tokens_BT = torch.tensor(texts[:1])
    before = float(model(tokens_BT, labels=tokens_BT).loss)
    teach(model, torch.optim.AdamW(model.parameters(), lr=1e-2), texts, 0, 1000)
    assert float(model(tokens_BT, labels=tokens_BT).loss) < before / 2
