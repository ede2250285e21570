"""ifguide.training.schedule: every block once an epoch, in an order that batch size and workers do not change."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ifguide.config import Pretrain
from ifguide.training.schedule import (
    PADDING,
    BenignRise,
    Schedule,
    accumulation_steps,
    deepspeed_config,
    learning_rate,
    parameter_groups,
    rank_micro_batches,
    split_heldout,
    step_seed,
)
from tests.tiny import tiny_model


def schedule(*, num_blocks: int = 10, batch_blocks: int = 4, epochs: float = 2.0, seed: int = 0) -> Schedule:
    return Schedule(num_blocks=num_blocks, batch_blocks=batch_blocks, epochs=epochs, seed=seed)


def order(made: Schedule) -> np.ndarray:
    """Blocks of all steps, end to end, padding left out."""
    batches = np.concatenate([made.batch(step) for step in range(made.steps)])
    return batches[batches != PADDING]


@settings(deadline=None)
@given(num_blocks=st.integers(1, 30), batch_blocks=st.integers(1, 40), epochs=st.integers(1, 4), seed=st.integers(0, 9))
def test_every_block_is_seen_exactly_once_an_epoch_at_any_batch_size(num_blocks, batch_blocks, epochs, seed):
    made = schedule(num_blocks=num_blocks, batch_blocks=batch_blocks, epochs=epochs, seed=seed)
    seen = order(made).reshape(epochs, num_blocks)
    assert (np.sort(seen, axis=1) == np.arange(num_blocks)).all()


@settings(deadline=None)
@given(batch_blocks=st.integers(1, 50), epochs=st.floats(0.05, 4))
def test_order_does_not_depend_on_the_batch_size_and_a_longer_training_starts_the_same(batch_blocks, epochs):
    found = order(schedule(batch_blocks=batch_blocks, epochs=epochs))
    longest = order(schedule(batch_blocks=1, epochs=4))
    assert len(found) == max(1, round(epochs * 10))
    assert (found == longest[: len(found)]).all()


def test_epochs_and_seeds_have_orders_of_their_own():
    first, second = order(schedule(num_blocks=50)).reshape(2, 50)
    other = order(schedule(num_blocks=50, seed=1))[:50]
    assert (first != second).any()
    assert (first != other).any()


@pytest.mark.parametrize(
    ("epochs", "blocks", "steps"), [(0.25, 2, 1), (0.5, 5, 2), (1.5, 15, 4), (0.001, 1, 1), (2, 20, 5)]
)
def test_fractional_epochs_end_within_an_epoch(epochs, blocks, steps):
    made = schedule(epochs=epochs)
    assert (made.total_blocks, made.steps) == (blocks, steps)
    assert len(set(order(made)[:10].tolist())) == min(blocks, 10)


def test_padding_fills_only_the_end_of_the_last_batch():
    made = schedule(epochs=1.5)
    assert all((made.batch(step) != PADDING).all() for step in range(3))
    assert (made.batch(3) == PADDING).tolist() == [False, False, False, True]
    assert all(made.batch(step).shape == (4,) and made.batch(step).dtype == np.int64 for step in range(4))


@settings(deadline=None)
@given(world_size=st.integers(1, 5), micro=st.integers(1, 4), accumulation=st.integers(1, 4))
def test_ranks_share_a_batch_and_together_see_it_whatever_their_number(world_size, micro, accumulation):
    batch = np.random.default_rng(0).permutation(world_size * micro * accumulation)
    parts = [
        rank_micro_batches(batch, rank=rank, world_size=world_size, micro_batch_blocks=micro)
        for rank in range(world_size)
    ]
    assert all(part.shape == (accumulation, micro) for part in parts)
    assert sorted(np.concatenate(parts).reshape(-1).tolist()) == sorted(batch.tolist())
    step_by_step = np.stack(parts, axis=1).reshape(-1)
    assert (step_by_step == batch).all()


@settings(deadline=None)
@given(
    steps=st.integers(1, 200),
    warmup=st.floats(0, 1),
    floor=st.floats(0, 1),
)
def test_learning_rate_rises_linearly_to_its_peak_then_falls_to_no_less_than_the_floor(steps, warmup, floor):
    config = Pretrain(learning_rate=0.5, warmup_fraction=warmup, final_learning_rate_ratio=floor)
    rates = np.array([learning_rate(step, steps, config) for step in range(steps)])
    peak = max(1, round(warmup * steps)) - 1
    assert rates[: peak + 1] == pytest.approx(0.5 * np.arange(1, peak + 2) / (peak + 1))
    assert rates.max() == rates[peak] == 0.5
    assert (np.diff(rates[peak:]) <= 1e-12).all()
    assert (rates[peak:] >= 0.5 * floor - 1e-12).all()


def test_learning_rate_is_a_half_cosine_between_peak_and_floor():
    config = Pretrain(learning_rate=1.0, warmup_fraction=0.1, final_learning_rate_ratio=0.2)
    assert learning_rate(55, 100, config) == pytest.approx(0.6)
    assert learning_rate(99, 100, config) == pytest.approx(0.2 + 0.4 * (1 + math.cos(math.pi * 89 / 90)))


@pytest.mark.parametrize(("workers", "micro", "accumulation"), [(1, 8, 8), (2, 8, 4), (4, 16, 1), (1, 64, 1)])
def test_deepspeed_steps_over_exactly_one_batch(workers, micro, accumulation):
    made = deepspeed_config(Pretrain(batch_blocks=64, micro_batch_blocks=micro, workers=workers))
    assert made["gradient_accumulation_steps"] == accumulation
    assert made["train_micro_batch_size_per_gpu"] * accumulation * workers == 64
    assert "optimizer" not in made


def test_deepspeed_follows_dtype_clipping_and_zero():
    plain = deepspeed_config(Pretrain(dtype="float32", gradient_clipping=0.5, zero_stage=0))
    assert (plain["bf16"], plain["gradient_clipping"]) == ({"enabled": False}, 0.5)
    assert plain["zero_optimization"] == {"stage": 0}
    offloaded = deepspeed_config(Pretrain(dtype="bfloat16", zero_stage=3, offload_optimizer=True))
    assert offloaded["bf16"] == {"enabled": True}
    assert offloaded["zero_optimization"] == {"stage": 3, "offload_optimizer": {"device": "cpu"}}
    nvme = Pretrain(zero_stage=3, offload_optimizer=True, offload_parameters=True, offload_nvme="/nvme")
    assert deepspeed_config(nvme)["zero_optimization"] == {
        "stage": 3,
        "offload_optimizer": {"device": "cpu"},
        "offload_param": {"device": "nvme", "nvme_path": "/nvme"},
    }


def test_weight_decay_is_for_matrices_and_every_trained_parameter_is_in_one_group():
    model = tiny_model("gpt_neox")
    frozen = model.get_input_embeddings().weight.requires_grad_(False)
    decayed, plain = parameter_groups(model, 0.3)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.3, 0.0)
    assert all(parameter.ndim >= 2 for parameter in decayed["params"])
    assert all(parameter.ndim < 2 for parameter in plain["params"])
    grouped = [id(parameter) for parameter in decayed["params"] + plain["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters() if p is not frozen)


def test_a_matrix_that_is_parted_among_workers_decays_too():
    """ZeRO-3 leaves an empty vector in each parameter's place, and its whole shape in `ds_shape`."""
    model = torch.nn.Linear(3, 2)
    for parameter in model.parameters():
        parameter.ds_shape = parameter.shape
        parameter.data = torch.empty(0)
    decayed, plain = parameter_groups(model, 0.3)
    assert [id(p) for p in decayed["params"]] == [id(model.weight)]
    assert [id(p) for p in plain["params"]] == [id(model.bias)]


def test_the_rise_is_of_the_smoothed_loss_over_its_lowest():
    rise = BenignRise()
    assert rise.value == 0
    for loss in (5.0, 4.0, 3.0):
        rise.update(loss)
        assert rise.value == 0
    lowest = 0.9 * (0.9 * 5 + 0.1 * 4) + 0.1 * 3
    rise.update(13.0)
    assert rise.value == pytest.approx(0.9 * lowest + 1.3 - lowest)
    again = BenignRise(smoothed=rise.smoothed, lowest=rise.lowest)
    again.update(13.0)
    rise.update(13.0)
    assert again == rise


@settings(deadline=None)
@given(num_blocks=st.integers(1, 60), heldout=st.integers(0, 59), seed=st.integers(0, 9))
def test_every_block_is_trained_on_or_held_out(num_blocks, heldout, seed):
    if heldout >= num_blocks:
        with pytest.raises(ValueError, match=r"^pretrain\.heldout_blocks: "):
            split_heldout(num_blocks, heldout, seed)
        return
    trained, held = split_heldout(num_blocks, heldout, seed)
    assert sorted([*trained, *held]) == list(range(num_blocks))
    assert len(held) == heldout
    assert (np.diff(trained) > 0).all()
    assert all((a == b).all() for a, b in zip((trained, held), split_heldout(num_blocks, heldout, seed), strict=True))


def test_every_step_and_rank_has_random_numbers_of_its_own():
    seeds = {
        (seed, step, rank): step_seed(seed, step, rank) for seed in (0, 1) for step in range(50) for rank in (0, 1)
    }
    assert len(set(seeds.values())) == len(seeds)
    assert step_seed(1, 7, 0) == seeds[1, 7, 0]


@settings(deadline=None)
@given(blocks=st.integers(1, 40), world_size=st.integers(1, 5), micro=st.integers(1, 4))
def test_ranks_that_do_not_divide_a_batch_are_filled_up_with_padding(blocks, world_size, micro):
    batch = np.arange(blocks)
    parts = [
        rank_micro_batches(batch, rank=rank, world_size=world_size, micro_batch_blocks=micro)
        for rank in range(world_size)
    ]
    seen = np.concatenate(parts).reshape(-1)
    assert sorted(seen[seen != PADDING].tolist()) == batch.tolist()
    config = Pretrain(batch_blocks=blocks, micro_batch_blocks=micro)
    assert all(part.shape == (accumulation_steps(config, world_size), micro) for part in parts)
