"""ifguide.influence.factors: partitions, resuming, determinism; the numbers are in tests/reference."""

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from kronfluence.utils.state import State
from safetensors.torch import load_file

from ifguide.influence.factor_sample import FactorSample
from ifguide.influence.factors import EXPORTED, STEPS, EkfacFit, NextTokenTask, Step, fit_factors
from ifguide.influence.query import load_factors
from ifguide.models import state_fingerprint, tracked_modules
from tests.tiny import as_tensors, random_blocks, tiny_model

MODEL = tiny_model("gpt_neox")
NAMES = tracked_modules(MODEL).names


def sample(**options: int | None) -> FactorSample:
    """Six blocks; unless `options` say otherwise in two partitions, two blocks a batch."""
    blocks_NT, lengths_N = random_blocks(6, 8)
    chosen = {"num_partitions": 2, "batch_size": 2, "seed": 0, **options}
    return FactorSample(blocks_NT=blocks_NT, lengths_N=lengths_N, **chosen)


def steps(sample: FactorSample, workdir: Path) -> EkfacFit:
    return EkfacFit(model=MODEL, sample=sample, module_names=NAMES, workdir=workdir)


def fit(fitted: FactorSample, workdir: Path, order: tuple[int, ...]) -> Path:
    ekfac = steps(fitted, workdir)
    parts = [(p, m) for p in order for m in range(fitted.module_partitions)]
    for part in parts:
        ekfac.covariances(*part)
    for name in NAMES:
        ekfac.eigenvectors(name)
    for part in parts:
        ekfac.lambdas(*part)
    ekfac.finish(workdir / "out")
    return workdir / "out"


def test_one_call_takes_the_same_steps(tmp_path: Path) -> None:
    done = []

    def watch(step: Step, pieces: range) -> Iterator[int]:
        for index in pieces:
            yield index
            done.append((step, index))

    steps(sample(), tmp_path / "run").run(tmp_path / "out", watch=watch)
    assert done == [(step, index) for step in STEPS for index in range(steps(sample(), tmp_path).pieces(step))]
    expected = fit(sample(), tmp_path / "steps", (0, 1))
    for path in expected.iterdir():
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes(), path.name
    whole = load_factors(fit(sample(num_partitions=1), tmp_path / "whole", (0,)))
    for name, factors in fit_factors(MODEL, *random_blocks(6, 8), batch_size=2).items():
        assert torch.equal(factors.Q_A, whole[name].Q_A)
        assert torch.equal(factors.Q_S, whole[name].Q_S)
        assert torch.equal(factors.lambda_mean, whole[name].lambda_mean)


def test_a_beginning_is_read_before_every_block() -> None:
    blocks_NT, lengths_N = random_blocks(6, 8)
    fitted = fit_factors(MODEL, blocks_NT, lengths_N, beginning=5)
    longer = fit_factors(MODEL, np.insert(blocks_NT, 0, 5, axis=1), lengths_N + 1)
    without = fit_factors(MODEL, blocks_NT, lengths_N)
    for name, factors in fitted.items():
        assert torch.equal(factors.lambda_mean, longer[name].lambda_mean)
        assert not torch.allclose(factors.lambda_mean, without[name].lambda_mean)
    assert sample(beginning=5).identity() != sample().identity() == sample(beginning=None).identity()


def test_same_seed_gives_the_same_bytes_in_any_order(tmp_path: Path) -> None:
    torch.manual_seed(0)
    first = fit(sample(), tmp_path / "first", (0, 1))
    torch.manual_seed(1)
    second = fit(sample(), tmp_path / "second", (1, 0))
    other = fit(sample(seed=1), tmp_path / "other", (0, 1))
    names = {"factor_arguments.json", *(f"{name}.safetensors" for name in EXPORTED)}
    assert {path.name for path in first.iterdir()} == names
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
    lambda_file = "lambda_matrix.safetensors"
    assert (first / lambda_file).read_bytes() != (other / lambda_file).read_bytes()


def test_batch_size_and_partitions_change_float_noise_only(tmp_path: Path) -> None:
    """Labels are sampled per block, so they are the same whatever the batch and the partition."""
    first = fit(sample(), tmp_path / "first", (0, 1))
    second = fit(sample(num_partitions=1, batch_size=3), tmp_path / "second", (0,))
    one, other = load_factors(first), load_factors(second)
    for name in NAMES:
        # Eigenvectors of equal eigenvalues are free; trace and count are not.
        trace = one[name].lambda_mean.sum()
        torch.testing.assert_close(trace, other[name].lambda_mean.sum(), rtol=1e-4, atol=0.0)


def test_module_partitions_change_no_byte_and_each_holds_its_modules_alone(tmp_path: Path) -> None:
    first = fit(sample(), tmp_path / "first", (0, 1))
    second = fit(sample(module_partitions=3), tmp_path / "second", (0, 1))
    for name in EXPORTED:
        assert (first / f"{name}.safetensors").read_bytes() == (second / f"{name}.safetensors").read_bytes(), name
    held = [
        list(load_file(tmp_path / f"second/activation_covariance_data_partition1_module_partition{m}.safetensors"))
        for m in range(3)
    ]
    assert sorted(name for part in held for name in part) == sorted(NAMES)
    assert all(len(part) <= -(-len(NAMES) // 3) for part in held)


def test_more_module_partitions_than_modules_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"lower fit_factors\.module_partitions"):
        fit(sample(module_partitions=99), tmp_path, (0, 1))


def test_the_model_comes_back_as_it_was(tmp_path: Path) -> None:
    before = state_fingerprint(MODEL)
    root_level = logging.getLogger().level
    steps(sample(), tmp_path).covariances(0)
    assert state_fingerprint(MODEL) == before
    assert tracked_modules(MODEL).names == NAMES
    assert all(parameter.requires_grad for parameter in MODEL.parameters())
    assert State._shared_state == {}
    assert logging.getLogger().level == root_level
    assert not list(tmp_path.glob(".part-*"))
    MODEL.train()
    try:
        steps(sample(), tmp_path).covariances(1)
        assert MODEL.training
    finally:
        MODEL.eval()


def test_a_finished_partition_is_kept_and_a_foreign_one_refused(tmp_path: Path) -> None:
    steps(sample(), tmp_path).covariances(0)
    times = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    steps(sample(), tmp_path).covariances(0)
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == times
    with pytest.raises(ValueError, match="another sample, seed"):
        steps(sample(seed=1), tmp_path).covariances(0)


def test_steps_out_of_order_name_the_missing_file(tmp_path: Path) -> None:
    fitted = sample()
    steps(fitted, tmp_path).covariances(0)
    with pytest.raises(FileNotFoundError, match="activation_covariance_data_partition1"):
        steps(fitted, tmp_path).eigenvectors(NAMES[0])
    with pytest.raises(FileNotFoundError, match=f"{NAMES[0]}/activation_eigenvectors"):
        steps(fitted, tmp_path).gather_eigenvectors()
    with pytest.raises(FileNotFoundError, match="eigenvectors"):
        steps(fitted, tmp_path).lambdas(0)
    with pytest.raises(FileNotFoundError, match=r"factor_arguments\.json"):
        steps(fitted, tmp_path).export(tmp_path / "out")


def test_samples_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="7 partitions of 6 blocks"):
        sample(num_partitions=7)
    with pytest.raises(ValueError, match="do not fit"):
        replace(sample(), lengths_N=np.array([1, 2]))


def test_partitions_split_the_rows_once() -> None:
    fitted = sample(num_partitions=4, batch_size=1)
    rows = [batch["rows"].tolist() for p in range(4) for batch in fitted.loader(p)]
    assert rows == [[row] for row in range(6)]


def test_labels_are_sampled_from_the_model_by_row_and_stream() -> None:
    tokens_BT, _ = as_tensors(*random_blocks(2, 6))
    logits_BTV = MODEL(tokens_BT).logits
    draws = 4000
    rows = torch.arange(draws)
    task = NextTokenTask(NAMES, seed=3)
    labels = task._sampled_labels(logits_BTV[:1].expand(draws, -1, -1), rows)
    probabilities_TV = logits_BTV[0].softmax(-1)
    for j in range(1, 6):
        frequency = torch.bincount(labels[:, j], minlength=48) / draws
        # Five standard deviations of a binomial frequency, for each of 48 ids.
        bound = 5 * (probabilities_TV[j - 1] * (1 - probabilities_TV[j - 1]) / draws).sqrt() + 1e-3
        assert bool(((frequency - probabilities_TV[j - 1]).abs() < bound).all())
    batched = task._sampled_labels(logits_BTV, torch.tensor([5, 9]))
    alone = task._sampled_labels(logits_BTV[1:], torch.tensor([9]))
    assert torch.equal(batched[1], alone[0])
    other_stream = NextTokenTask(NAMES, seed=3, stream=1)._sampled_labels(logits_BTV, torch.tensor([5, 9]))
    assert not torch.equal(batched, other_stream)
