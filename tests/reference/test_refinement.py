"""The Gauss-Newton product and the conjugate gradients against a dense H, in float64."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ifguide.influence.factors import fit_factors
from ifguide.influence.query import ModuleFactors, precondition
from ifguide.influence.refinement import GaussNewton, Refinement, refine
from ifguide.models import tracked_modules
from tests.reference import oracles
from tests.tiny import as_tensors, random_blocks, tiny_model

FAMILIES = ["gpt_neox", "llama", "gemma2"]  # with biases, without, and with soft caps
LENGTH = 6


@functools.cache
def dense(family: str) -> tuple[PreTrainedModel, list[str], Tensor]:
    """A model, three of its modules (of both layers), and their H on two blocks, one of them padded."""
    model = tiny_model(family, dtype=torch.float64)
    names = tracked_modules(model).names
    chosen = [names[0], names[len(names) // 2 - 1], names[-2]]
    return model, chosen, oracles.gauss_newton(model, chosen, *blocks())


def blocks() -> tuple[Tensor, Tensor]:
    tokens_NT, lengths_N = as_tensors(*random_blocks(2, LENGTH, seed=3))
    lengths_N[1] = LENGTH - 2
    return tokens_NT, lengths_N


def product_of(family: str) -> GaussNewton:
    model, names, _ = dense(family)
    tokens_NT, lengths_N = blocks()
    return GaussNewton(
        model, names, [{"input_ids": tokens_NT[n], "lengths": lengths_N[n]} for n in (slice(1), slice(1, None))]
    )


def random_vector(family: str, *, seed: int = 0) -> dict[str, Tensor]:
    model, names, _ = dense(family)
    generator = torch.Generator().manual_seed(seed)
    vector = {}
    for name in names:
        module = model.get_submodule(name)
        assert isinstance(module, nn.Linear)
        columns = module.in_features + (module.bias is not None)
        vector[name] = torch.randn(module.out_features, columns, generator=generator, dtype=torch.float64)
    return vector


@functools.cache
def factors_of(family: str) -> dict[str, ModuleFactors]:
    model, names, _ = dense(family)
    tokens_NT, lengths_N = blocks()
    return fit_factors(model, np.tile(tokens_NT.numpy(), (16, 1)), np.tile(lengths_N.numpy(), 16), module_names=names)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_product_is_that_of_the_dense_matrix(family: str) -> None:
    model, _, H = dense(family)
    before = [parameter.requires_grad for parameter in model.parameters()]
    vector = random_vector(family)
    found = oracles.flat(product_of(family)(vector))
    torch.testing.assert_close(found, H @ oracles.flat(vector), rtol=1e-9, atol=1e-9)
    assert before == [parameter.requires_grad for parameter in model.parameters()]


def test_blocks_of_one_token_have_no_curvature() -> None:
    family = FAMILIES[0]
    batch = {"input_ids": torch.tensor([[3], [4]]), "lengths": torch.tensor([1, 1])}
    model, names, _ = dense(family)
    product = GaussNewton(model, names, [batch])
    assert not oracles.flat(product(random_vector(family))).any()


def dense_product(family: str) -> Callable[[Mapping[str, Tensor]], dict[str, Tensor]]:
    """v -> H v by the dense matrix: as `product_of`, which another test compares with it, and quicker."""
    _, _, H = dense(family)

    def product(vector: Mapping[str, Tensor]) -> dict[str, Tensor]:
        parts = (H @ oracles.flat(vector)).split([tensor.numel() for tensor in vector.values()])
        return {name: part.reshape(vector[name].shape).clone() for name, part in zip(vector, parts, strict=True)}

    return product


def damped(family: str, damping_scale: float) -> Tensor:
    """H + D, dense."""
    _, _, H = dense(family)
    return H + torch.diag(
        torch.cat(
            [torch.full((own.lambda_mean.numel(),), damping_scale * float(own.lambda_mean.mean()), dtype=H.dtype)
             for own in factors_of(family).values()]
        )
    )  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_conjugate_gradients_solve_the_dense_system(family: str) -> None:
    """And what they record of the way is so: residual, curvature, cosine."""
    _, _, H = dense(family)
    factors, gradient, A = factors_of(family), random_vector(family, seed=1), damped(family, 1.0)
    G = oracles.flat(gradient)
    expected = torch.linalg.solve(A, G)
    errors = []
    for state in refine(gradient, factors, dense_product(family), steps=300, damping_scale=1.0, tolerance=1e-9):
        V, step = oracles.flat(state.direction), state.steps[-1]
        assert step.residual == pytest.approx(float((G - A @ V).norm() / G.norm()), rel=1e-3, abs=1e-10)
        assert step.curvature == pytest.approx(float(V @ H @ V), rel=1e-6)
        error = V - expected
        errors.append(float(error @ A @ error))
    assert len(errors) < 300
    assert all(later < before for before, later in itertools.pairwise(errors[:50]))
    torch.testing.assert_close(V, expected, rtol=1e-6, atol=1e-7 * float(expected.abs().max()))
    ekfac = oracles.flat(precondition(gradient, factors, damping_scale=1.0)).double()
    cosine = torch.nn.functional.cosine_similarity(expected, ekfac, dim=0)
    assert step.cosine == pytest.approx(float(cosine), abs=1e-5)


def test_damping_can_be_given() -> None:
    _, _, H = dense("llama")
    gradient = random_vector("llama", seed=1)
    *_, last = refine(gradient, factors_of("llama"), dense_product("llama"), steps=300, damping=5.0, tolerance=1e-9)
    expected = torch.linalg.solve(H + 5 * torch.eye(len(H), dtype=H.dtype), oracles.flat(gradient))
    torch.testing.assert_close(
        oracles.flat(last.direction), expected, rtol=1e-6, atol=1e-7 * float(expected.abs().max())
    )


def test_the_preconditioner_is_worth_its_price() -> None:
    """With EK-FAC a few steps on a sample of many tokens come nearer than as many with the identity."""
    model, names, _ = dense("llama")
    tokens_NT, lengths_N = random_blocks(40, 10, seed=5)
    product = GaussNewton(
        model, names, [dict(zip(("input_ids", "lengths"), as_tensors(tokens_NT, lengths_N), strict=True))]
    )
    factors, gradient = fit_factors(model, tokens_NT, lengths_N, module_names=names), random_vector("llama", seed=1)
    *_, converged = refine(gradient, factors, product, steps=80, tolerance=1e-3)
    plain = {
        name: ModuleFactors(
            Q_A=torch.eye(own.shape[1], dtype=torch.float64),
            Q_S=torch.eye(own.shape[0], dtype=torch.float64),
            lambda_mean=torch.full_like(own, float(factors[name].lambda_mean.mean())),
        )
        for name, own in gradient.items()
    }

    def gained(of: dict[str, ModuleFactors]) -> float:
        """The share of what converged V has gained of <G, V> - 1/2 <V, (H + D) V>."""
        *_, last = refine(gradient, of, product, steps=5)
        return objective(last, gradient) / objective(converged, gradient)

    assert gained(plain) < 0.75 < 0.85 < gained(factors) < 1


def objective(state: Refinement, gradient: Mapping[str, Tensor]) -> float:
    """<G, V> - 1/2 <V, (H + D) V>, with (H + D) V = G - r."""
    G, V, r = (oracles.flat(vector) for vector in (gradient, state.direction, state.residual))
    return float(V @ (G + r)) / 2


def test_one_step_scales_the_direction_of_ekfac() -> None:
    factors, gradient = factors_of("gpt_neox"), random_vector("gpt_neox", seed=1)
    (state,) = refine(gradient, factors, product_of("gpt_neox"), steps=1)
    expected = oracles.flat(precondition(gradient, factors)).double() * state.steps[0].step_size
    torch.testing.assert_close(
        oracles.flat(state.direction), expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max())
    )
    assert state.steps[0].cosine == pytest.approx(1.0)
    assert 0.1 < state.steps[0].step_size < 10


def test_lambda_is_the_diagonal_of_h_in_the_basis_of_ekfac() -> None:
    """EK-FAC and the product approximate one operator: the same labels, counts and normalisation."""
    model, names, H = dense("gpt_neox")
    tokens_NT, lengths_N = blocks()
    factors = fit_factors(
        model, np.tile(tokens_NT.numpy(), (300, 1)), np.tile(lengths_N.numpy(), 300), module_names=names, batch_size=60
    )
    begin = 0
    for name in names:
        own = factors[name].in_float64(H.device)
        end = begin + own.lambda_mean.numel()
        basis = torch.kron(own.Q_S, own.Q_A)
        diagonal = torch.diagonal(basis.T @ H[begin:end, begin:end] @ basis).reshape(own.lambda_mean.shape)
        assert float(own.lambda_mean.sum() / diagonal.sum()) == pytest.approx(1.0, abs=0.1)
        large = diagonal > 0.01 * diagonal.max()
        ratio = own.lambda_mean[large] / diagonal[large]
        assert float((ratio.log() * diagonal[large]).sum() / diagonal[large].sum()) == pytest.approx(0.0, abs=0.1)
        begin = end


def test_a_refinement_that_goes_on_is_that_in_one_go() -> None:
    factors, gradient = factors_of("llama"), random_vector("llama", seed=2)
    product = product_of("llama")
    *_, whole = refine(gradient, factors, product, steps=5)
    *_, begun = refine(gradient, factors, product, steps=2)
    copied = replace(begun, steps=list(begun.steps))
    *_, resumed = refine(gradient, factors, product, steps=5, begun=copied)
    assert resumed.steps == whole.steps
    assert all(torch.equal(resumed.direction[name], V) for name, V in whole.direction.items())


def test_directions_without_curvature_are_refused() -> None:
    factors, gradient = factors_of("llama"), random_vector("llama", seed=2)
    with pytest.raises(ValueError, match=r"step 1: curvature.*damping_scale"):
        list(refine(gradient, factors, lambda v: {name: -1e6 * tensor for name, tensor in v.items()}, steps=2))
