"""The suffix student: exact scores of V in the last third of the blocks, on the line to those of all of V."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from ifguide.influence.scorer import TokenScorer
from ifguide.student.calibration import AS_IT_IS, CalibrationSums, calibrate
from ifguide.student.fidelity import fidelity
from ifguide.student.parts import Labelled, SuffixPart, fit_suffix_parts
from ifguide.student.suffix import SuffixStudent, first_of_suffix, suffix_of
from tests.reference import oracles
from tests.reference.test_influence import random_directions
from tests.reference.test_paired_blocks import model_of
from tests.tiny import as_tensors, random_blocks

LENGTH = 12


def test_the_last_third_of_the_blocks_is_taken() -> None:
    assert [first_of_suffix(blocks) for blocks in (1, 2, 3, 4, 6, 12, 30)] == [0, 1, 2, 2, 4, 8, 20]


@pytest.mark.parametrize("family", ["gpt_neox", "llama"])
def test_its_scores_are_the_oracles_of_a_direction_with_zeros_below(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, oracle = (model_of(family, monkeypatch, torch.float64) for _ in range(2))
    directions = random_directions(model)
    suffix = suffix_of(model, directions, first_of_suffix(4))
    assert {name.split(".")[2] for name in suffix} == {"2", "3"}
    zeroed = {name: V if name in suffix else torch.zeros_like(V) for name, V in directions.items()}
    tokens_BT, _ = as_tensors(*random_blocks(2, LENGTH, ragged=False))
    scores_BT = TokenScorer(model, suffix, attribution="target").score(tokens_BT, torch.tensor([LENGTH, LENGTH]))
    for tokens_T, scores_T in zip(tokens_BT, scores_BT, strict=True):
        expected = oracles.target_scores(oracle, zeroed, tokens_T)
        torch.testing.assert_close(scores_T, expected, rtol=1e-9, atol=1e-9)


def test_what_is_not_in_the_blocks_or_not_in_the_last_ones_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("llama", monkeypatch)
    with pytest.raises(ValueError, match=r"fit_student\.kind: suffix .* lm_head is in none of them"):
        suffix_of(model, {"model.layers.3.mlp.up_proj": torch.ones(1), "lm_head": torch.ones(1)}, 2)
    with pytest.raises(ValueError, match="from block 2 on, and V touches none"):
        suffix_of(model, {"model.layers.1.mlp.up_proj": torch.ones(1)}, 2)


def test_a_calibration_is_numpys_least_squares_whole_and_in_parts() -> None:
    rng = np.random.default_rng(0)
    own = rng.normal(3, 2, 500)
    exact = 0.7 * own - 5 + rng.normal(size=500)
    slope, offset = np.polyfit(own, exact, 1)
    assert calibrate(exact, own) == pytest.approx((slope, offset), rel=1e-10)
    parts = [CalibrationSums.of(exact[i::3], own[i::3]) for i in range(3)]
    assert (parts[2] + parts[0] + parts[1]).fit() == pytest.approx((slope, offset), rel=1e-9)
    for falling in (-exact, np.full(500, 0.1), np.zeros(500)):
        assert calibrate(falling, own) == AS_IT_IS
        assert calibrate(own, falling * 0 + 0.1) == AS_IT_IS
    assert CalibrationSums.of(np.zeros(0), np.zeros(0)).fit() == AS_IT_IS


def labelled(seed: int) -> Labelled:
    """Blocks with exact scores of which the suffix tells a part."""
    rng = np.random.default_rng(seed)
    suffix = rng.normal(size=(6, LENGTH))
    known = torch.from_numpy(np.arange(LENGTH) >= 1).expand(6, LENGTH)
    exact = 2 * suffix + 1 + 0.5 * rng.normal(size=suffix.shape)
    return Labelled(torch.zeros(6, LENGTH), known, torch.from_numpy(exact), suffix_BT=torch.from_numpy(suffix))


def known(blocks: list[Labelled], values: str) -> np.ndarray:
    found: list[Tensor] = [getattr(own, values)[own.known_BT] for own in blocks]
    return torch.cat(found).float().numpy()


def test_parts_give_the_student_of_all_tokens_and_files_keep_it(tmp_path: Path) -> None:
    begun, paths, fitted, held = SuffixStudent(first=2, steps=(0.25,)), [], [], []
    for number in range(2):
        part = SuffixPart(begun, 2)
        for seed, held_out in ((10 * number, False), (10 * number + 1, True)):
            (held if held_out else fitted).append(labelled(seed))
            part.add(labelled(seed), held_out=held_out)
        paths.append(tmp_path / f"part-{number}.npz")
        part.save(paths[-1])
    student, chosen, tried, edge = fit_suffix_parts(paths)
    assert isinstance(student, SuffixStudent)
    everything = fitted + held
    slope, offset = np.polyfit(known(everything, "suffix_BT"), known(everything, "scores_BT"), 1)
    assert (student.first, student.steps) == (2, (0.25,))
    assert (student.slope, student.offset) == pytest.approx((slope, offset), rel=1e-5)
    figures = fidelity(known(held, "scores_BT"), known(held, "suffix_BT"))
    assert tried == [chosen]
    assert {name: chosen[name] for name in figures} == pytest.approx(figures)
    scores = student.scores(known(held, "suffix_BT"))
    np.testing.assert_allclose(scores, offset + slope * known(held, "suffix_BT"), rtol=1e-4, atol=1e-5)
    assert edge == pytest.approx(np.quantile(scores, 0.98))
    student.save(tmp_path / "student.npz")
    assert vars(SuffixStudent.load(tmp_path / "student.npz")) == vars(student)
    SuffixPart(begun, 1).save(tmp_path / "empty.npz")
    with pytest.raises(ValueError, match="held out"):
        fit_suffix_parts([tmp_path / "empty.npz"])
