"""The head student against autograd, central differences, and scikit-learn's ridge regression on the tokens."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from transformers import PreTrainedModel

from ifguide.influence.head_derivatives import HeadDerivatives
from ifguide.influence.method import Method
from ifguide.influence.scorer import TokenScorer
from ifguide.influence.smoothing import FoldSums, token_sums
from ifguide.models import predicted_positions
from ifguide.student import head_fit
from ifguide.student.fidelity import fidelity
from ifguide.student.head import HeadScorer, HeadStudent, read_features
from ifguide.student.head_fit import TRANSFORMS, HeadSample, Transforms, _of_layers, fit_head, layer_choices
from tests.reference.test_influence import random_directions
from tests.tiny import as_tensors, random_blocks, tiny_model

LAYERS, BLOCKS, LENGTH, HELD = (1, 2), 60, 20, 20


class Labelled(NamedTuple):
    """Blocks of a tiny proxy with their exact scores, and the student that was fitted to them."""

    model: PreTrainedModel
    tokens_BT: Tensor
    lengths_B: Tensor
    known_BT: Tensor
    scores_BT: Tensor
    features_BTF: Tensor
    tangents_BTD: Tensor
    student: HeadStudent
    tried: list[dict[str, float]]


@pytest.fixture(scope="module", params=["llama", "gemma2"])
def labelled(request: pytest.FixtureRequest) -> Labelled:
    model = tiny_model(request.param, dtype=torch.float64)
    tokens_BT, lengths_B = as_tensors(*random_blocks(BLOCKS, LENGTH, seed=2))
    scorer = TokenScorer(model, random_directions(model), attribution="target")
    scores_BT, states, tangents_KBTD = scorer.score_and_read(tokens_BT, lengths_B, LAYERS, tangents=True)
    assert tangents_KBTD is not None
    known_BT, features_BTF = predicted_positions(tokens_BT, lengths_B), torch.cat(states, dim=-1)
    sample = HeadSample(Transforms.of(scores_BT[0][known_BT].numpy()), LAYERS)
    for rows, held_out in ((slice(0, HELD), True), (slice(HELD, 40), False), (slice(40, None), False)):
        sample.add(
            tokens_BT[rows], known_BT[rows], scores_BT[0, rows], features_BTF[rows], tangents_KBTD[0, rows],
            held_out=held_out,
        )  # fmt: skip
    student, tried, _ = fit_head(sample, HeadDerivatives(model))
    return Labelled(model, tokens_BT, lengths_B, known_BT, scores_BT[0], features_BTF, tangents_KBTD[0], student, tried)


def by_hand(given: Labelled, rows: Tensor, target: np.ndarray, ridge: float, features: Tensor) -> np.ndarray:
    """A ridge of `target` (N, ...), a row a known token, fitted on the tokens of `rows`; what it says of all tokens."""
    fitted = rows[:, None].expand_as(given.known_BT)[given.known_BT].numpy()
    x = features[given.known_BT].numpy()
    scaler = StandardScaler().fit(x[fitted])
    model = Ridge(alpha=ridge * fitted.sum()).fit(scaler.transform(x[fitted]), target[fitted])
    flat = model.predict(scaler.transform(features.flatten(0, 1).numpy()))
    return np.asarray(flat).reshape(*given.known_BT.shape, *target.shape[1:])


def derivative(given: Labelled, tangents: np.ndarray) -> np.ndarray:
    """(B, T) of the NLL of each token along the tangent of the state before it, by autograd."""
    hidden = given.features_BTF[:, :-1, -tangents.shape[-1] :].clone().requires_grad_()
    linear = hidden @ given.model.get_output_embeddings().weight.detach().T
    cap = getattr(given.model.config, "final_logit_softcapping", None)
    logits = linear if cap is None else cap * torch.tanh(linear / cap)
    nll = -logits.log_softmax(-1).gather(2, given.tokens_BT[:, 1:, None]).sum()
    (gradient,) = torch.autograd.grad(nll, hidden)
    return np.pad((gradient.numpy() * tangents[:, :-1]).sum(-1), ((0, 0), (1, 0)))


def test_the_tangents_are_those_of_the_final_states(labelled: Labelled) -> None:
    directions, step = random_directions(labelled.model), 1e-6
    moved = []
    for sign in (1, -1):
        model = tiny_model(labelled.model.config.model_type, dtype=torch.float64)
        with torch.no_grad():
            for name, V in directions.items():
                module = model.get_submodule(name)
                module.weight += sign * step * V[:, : module.weight.shape[1]]
                if module.bias is not None:
                    module.bias += sign * step * V[:, -1]
            moved.append(model.base_model(labelled.tokens_BT, use_cache=False).last_hidden_state)
    expected = (moved[0] - moved[1]) / (2 * step)
    real = torch.arange(LENGTH) < labelled.lengths_B[:, None]
    torch.testing.assert_close(labelled.tangents_BTD[real], expected[real], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        derivative(labelled, labelled.tangents_BTD.numpy())[labelled.known_BT.numpy()],
        labelled.scores_BT[labelled.known_BT].numpy(), rtol=1e-8, atol=1e-9,
    )  # fmt: skip


def test_the_fast_engine_gives_the_same_tangents(labelled: Labelled) -> None:
    model = tiny_model(labelled.model.config.model_type)
    directions = random_directions(model)
    other = {name: V.flip(0) for name, V in directions.items()}
    scorer = TokenScorer(
        model, [directions, other], attribution="target",
        method=Method(engine="difference", precision="float32", rank=None),
    )  # fmt: skip
    scores, states, tangents = scorer.score_and_read(labelled.tokens_BT, labelled.lengths_B, LAYERS, tangents=True)
    assert tangents is not None
    known = labelled.known_BT
    for found, expected in (
        (tangents[0], labelled.tangents_BTD),
        (torch.cat(states, dim=-1), labelled.features_BTF),
        (scores[0], labelled.scores_BT),
    ):
        error = (found[known].double() - expected[known]).norm() / expected[known].norm()
        assert error < 2e-3


def test_the_student_is_both_regressions_on_all_blocks_on_the_scale_of_those_held_out(labelled: Labelled) -> None:
    student, best = labelled.student, max(labelled.tried, key=lambda own: (own["recall"], own["overlap"]))
    features = labelled.features_BTF[..., -len(student.weights_F) :]
    everything, fitted = torch.ones(BLOCKS, dtype=torch.bool), torch.arange(BLOCKS) >= HELD
    transforms = Transforms.of(labelled.scores_BT[labelled.known_BT].numpy())
    targets = transforms(labelled.scores_BT[labelled.known_BT].numpy())
    column = targets[:, TRANSFORMS.index(str(best["target"]))]
    direct = by_hand(labelled, everything, column, best["ridge"], features)
    np.testing.assert_allclose(student.direct(features).numpy(), direct, rtol=1e-6, atol=1e-8)
    tangents = by_hand(
        labelled, everything, labelled.tangents_BTD[labelled.known_BT].numpy(), best["tangent_ridge"], features
    )
    head = HeadDerivatives(labelled.model)
    found = student.tangent(features, labelled.tokens_BT, head).numpy()
    np.testing.assert_allclose(found, derivative(labelled, tangents), rtol=1e-6, atol=1e-7)
    held = labelled.known_BT[:HELD].numpy()
    unseen = by_hand(labelled, fitted, column, best["ridge"], features)[:HELD][held]
    of_states = labelled.tangents_BTD[labelled.known_BT].numpy()
    along = derivative(labelled, by_hand(labelled, fitted, of_states, best["tangent_ridge"], features))[:HELD][held]
    mixed = (1 - student.mix) * unseen / unseen.std() + student.mix * along / along.std()
    slope, intercept = np.polyfit(mixed, labelled.scores_BT[:HELD].numpy()[held], 1)
    slope, intercept = (slope, intercept) if slope > 0 else (1, 0)
    scales = unseen.std() / slope, along.std() / slope
    assert (student.direct_scale, student.tangent_scale) == pytest.approx(scales, rel=1e-6)
    assert student.offset == pytest.approx(intercept, rel=1e-6, abs=1e-9)
    expected = (1 - student.mix) * direct / student.direct_scale + student.mix * found / student.tangent_scale
    expected += student.offset
    np.testing.assert_allclose(student.scores(features, labelled.tokens_BT, head).numpy(), expected, rtol=1e-6)
    assert student.mix == best["mix"]
    assert student.layers == best["layers"]


def test_what_was_tried_is_of_the_blocks_that_were_held_out(labelled: Labelled) -> None:
    assert len(labelled.tried) == len(layer_choices(LAYERS)) * (4 * 4 * 4 + 1)
    fitted = torch.arange(BLOCKS) >= HELD
    known = labelled.known_BT[:HELD].numpy()
    for own in (labelled.tried[0], next(own for own in labelled.tried if own["mix"] == 1), labelled.tried[-1]):
        width = labelled.tangents_BTD.shape[-1] * len(own["layers"])  # type: ignore[arg-type]
        features = labelled.features_BTF[..., -width:]
        scores = labelled.scores_BT[labelled.known_BT].numpy()
        targets = Transforms.of(scores)(scores)[:, TRANSFORMS.index(str(own["target"]))]
        direct = by_hand(labelled, fitted, targets, own["ridge"], features)[:HELD][known]
        tangents = by_hand(
            labelled, fitted, labelled.tangents_BTD[labelled.known_BT].numpy(), own["tangent_ridge"], features
        )
        tangent = derivative(labelled, tangents)[:HELD][known]
        score = (1 - own["mix"]) * direct / direct.std() + own["mix"] * tangent / tangent.std()
        expected = fidelity(labelled.scores_BT[:HELD].numpy()[known], score)
        for name, value in expected.items():
            assert own[name] == pytest.approx(value, abs=1e-6)


def test_a_score_that_the_states_tell_is_found(labelled: Labelled) -> None:
    weights = torch.from_numpy(np.random.default_rng(3).normal(size=labelled.features_BTF.shape[-1]))
    scores_BT = labelled.features_BTF @ weights
    sample = HeadSample(Transforms.of(scores_BT[labelled.known_BT].numpy()), LAYERS)
    zeros = torch.zeros_like(labelled.tangents_BTD)
    for rows, held_out in ((slice(0, HELD), True), (slice(HELD, None), False)):
        sample.add(
            labelled.tokens_BT[rows], labelled.known_BT[rows], scores_BT[rows], labelled.features_BTF[rows],
            zeros[rows], held_out=held_out,
        )  # fmt: skip
    student = fit_head(sample, HeadDerivatives(labelled.model)).student
    found = student.scores(
        labelled.features_BTF[..., -len(student.weights_F) :], labelled.tokens_BT, HeadDerivatives(labelled.model)
    )
    figures = fidelity(scores_BT[labelled.known_BT].numpy(), found[labelled.known_BT].numpy())
    assert figures["recall"] == 1
    assert figures["spearman"] > 0.9


@pytest.mark.parametrize("beginning", [None, 1])
def test_a_scorer_reads_the_model_once_and_files_keep_the_student(
    labelled: Labelled, beginning: int | None, tmp_path: Path
) -> None:
    labelled.student.save(tmp_path / "student.npz")
    scorer = HeadScorer(labelled.model, HeadStudent.load(tmp_path / "student.npz"), beginning=beginning)
    found = scorer.score(labelled.tokens_BT, labelled.lengths_B)
    assert not found[~labelled.known_BT].any()
    read = labelled.tokens_BT if beginning is None else torch.nn.functional.pad(labelled.tokens_BT, (1, 0), value=1)
    states = labelled.model(read, use_cache=False, output_hidden_states=True).hidden_states
    features = torch.cat([states[layer][:, read.shape[1] - LENGTH :] for layer in labelled.student.layers], dim=-1)
    torch.testing.assert_close(
        read_features(labelled.model, labelled.tokens_BT, labelled.student.layers, beginning=beginning),
        features.detach(),
    )
    expected = labelled.student.scores(features.detach(), labelled.tokens_BT, HeadDerivatives(labelled.model))
    torch.testing.assert_close(found[labelled.known_BT], expected[labelled.known_BT])


def test_a_sample_that_cannot_be_fitted_is_refused(labelled: Labelled) -> None:
    with pytest.raises(ValueError, match="held out"):
        fit_head(HeadSample(Transforms.of(np.arange(9.0)), LAYERS), HeadDerivatives(labelled.model))
    with pytest.raises(ValueError, match="differ"):
        Transforms.of(np.ones(7))
    scorer = TokenScorer(labelled.model, random_directions(labelled.model), attribution="position")
    with pytest.raises(ValueError, match="use target"):
        scorer.score_and_read(labelled.tokens_BT[:2], labelled.lengths_B[:2], LAYERS, tangents=True)


def test_the_features_of_a_top_layer_of_another_width_are_known() -> None:
    """OPT-350M's last state is narrower than the others: the columns of some layers are counted from the end."""
    rng = np.random.default_rng(0)
    sample = HeadSample(Transforms.of(np.arange(99.0)), (1, 2, 4))
    features_BTF, tangents_BTD = (
        torch.from_numpy(rng.normal(size=(2, 9, 16))),
        torch.from_numpy(rng.normal(size=(2, 9, 4))),
    )
    known_BT, tokens_BT = torch.ones(2, 9, dtype=torch.bool), torch.zeros(2, 9, dtype=torch.long)
    sample.add(tokens_BT, known_BT, features_BTF[..., 0], features_BTF, tangents_BTD, held_out=True)
    for layers, first in (((1, 2, 4), 0), ((2, 4), 6), ((4,), 12)):
        sums, columns = _of_layers(sample, layers)
        assert columns == slice(first, 16)
        assert sums.features_KD.shape[1] == sums.products_KDD.shape[1] == 16 - first
        np.testing.assert_allclose(sums.features_KD.sum(axis=0), features_BTF.sum(dim=(0, 1))[first:])


def test_sums_are_the_same_bytes_on_a_cpu_and_near_where_tensors_or_fewer_tokens_at_a_time_make_them(
    labelled: Labelled, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = labelled.known_BT
    x, tangents = labelled.features_BTF[known].numpy(), labelled.tangents_BTD[known].numpy()
    transforms = Transforms.of(labelled.scores_BT[known].numpy())
    targets = np.concatenate([transforms(labelled.scores_BT[known].numpy()), tangents], axis=1)
    expected = vars(FoldSums.of(x, targets, np.zeros(len(x), np.int64), 2))

    def sums() -> dict[str, np.ndarray]:
        sample = HeadSample(transforms, LAYERS)
        blocks = labelled.tokens_BT, known, labelled.scores_BT, labelled.features_BTF, labelled.tangents_BTD
        sample.add(*blocks, held_out=False)
        assert sample.sums is not None
        return vars(sample.sums)

    assert {name: own.tobytes() for name, own in sums().items()} == {
        name: own.tobytes() for name, own in expected.items()
    }
    monkeypatch.setattr(head_fit, "AT_ONCE", 100)
    for name, own in sums().items():
        np.testing.assert_allclose(own, expected[name], rtol=1e-12, atol=1e-12)
    by_torch = token_sums(torch.from_numpy(x), torch.from_numpy(targets))
    for own, array in zip(by_torch, expected.values(), strict=False):
        np.testing.assert_allclose(own.numpy(), array[0], rtol=1e-12, atol=1e-12)
