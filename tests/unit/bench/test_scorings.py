"""Scorings of texts along many directions: how these are related, and what is kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bench.common.behaviours import Behaviour
from bench.common.scorings import Scorings
from ifguide.config import ModelSource
from ifguide.influence.proxy import load_proxy
from tests.tiny import ARCHITECTURES
from tests.tokenizers import byte_level


@pytest.fixture(scope="module")
def scorings(tmp_path_factory: pytest.TempPathFactory) -> Scorings:
    behaviour = Behaviour(
        documents=[],
        others=[],
        positive=[("You ", f"clown {i}") for i in range(4)],
        negative=[("You ", f"river {i} ran") for i in range(4)],
    )
    model = load_proxy(ModelSource(architecture={**ARCHITECTURES["llama"], "vocab_size": 257}), gpus=0)
    documents = [f"The number {i} is written down, and what follows it is {7 * i}." for i in range(12)]
    cache = tmp_path_factory.mktemp("bench")
    return Scorings(
        proxy=(model, byte_level()),
        behaviour=behaviour,
        documents=documents,
        steps=1,
        refine_blocks=2,
        nulls=2,
        cache=cache,
    )


def test_the_direction_is_the_mean_of_its_halves_and_its_first_refinement_scales_it(scorings: Scorings) -> None:
    found = scorings.directions(["exact", "half_0", "half_1", "cg", "null_0", "null_1"])
    for name in scorings.names:
        V, halves = found["exact"][name], found["half_0"][name] + found["half_1"][name]
        torch.testing.assert_close(V, halves / 2, rtol=1e-4, atol=1e-4 * float(V.abs().max()))

    def flat(kind: str) -> torch.Tensor:
        return torch.cat([found[kind][name].double().flatten() for name in scorings.names])

    cosine = float(flat("cg") @ flat("exact") / flat("cg").norm() / flat("exact").norm())
    assert cosine == pytest.approx(1, abs=1e-6)
    assert float(flat("null_0").norm()) > 0
    assert not torch.equal(flat("null_0"), flat("null_1"))


def test_scores_are_kept_by_direction_and_text(scorings: Scorings, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def score(self: Scorings, directions: Any, blocks: Any) -> list[list[np.ndarray]]:
        asked.append(len(directions))
        return [[np.full(len(block), k, np.float32) for block in blocks] for k in range(len(directions))]

    monkeypatch.setattr(Scorings, "_score", score)
    blocks = [np.arange(3), np.arange(5)]
    for _ in range(2):
        found = scorings.of(["exact", "half_1"], blocks)
        assert [[len(scores) for scores in own] for own in found.values()] == [[3, 5], [3, 5]]
        assert found["half_1"][1].tolist() == [1.0] * 5
    assert asked == [2]
    scorings.of(["exact"], blocks)
    scorings.of(["exact"], blocks[:1])
    assert asked == [2, 1, 1]
    assert all(Path(path).is_relative_to(scorings.cache) for path in scorings.folder.iterdir())
