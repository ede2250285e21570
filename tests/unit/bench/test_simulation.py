"""The simulated cluster against closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest

from bench.common.simulation import Cluster, simulate

RATE = 1000.0


@pytest.mark.parametrize("prefetch", [True, False])
@pytest.mark.parametrize(("shards", "actors"), [(1, 1), (7, 3), (9, 3), (10, 4), (5, 8)])
def test_without_failures_or_stragglers_it_takes_the_longest_actor(shards: int, actors: int, prefetch: bool) -> None:
    cluster = Cluster(actors=actors, tokens_per_second=RATE, start_seconds=5.0, prefetch=prefetch)
    outcome = simulate(cluster, tokens=shards * 2000, shard_tokens=2000)
    assert outcome.shards == shards
    assert outcome.seconds == pytest.approx(5.0 + math.ceil(shards / actors) * 2.0)
    assert outcome.failures == 0


def test_the_last_shard_holds_what_is_left() -> None:
    outcome = simulate(Cluster(actors=1, tokens_per_second=RATE), tokens=4500, shard_tokens=2000)
    assert outcome.shards == 3
    assert outcome.seconds == pytest.approx(4.5)


def test_a_slow_driver_sets_the_pace() -> None:
    cluster = Cluster(actors=50, tokens_per_second=RATE, dispatch_seconds=0.1)
    outcome = simulate(cluster, tokens=1000 * 1000, shard_tokens=1000)  # 50 actors could take 50 shards a second
    assert outcome.seconds == pytest.approx(1000 * 0.1 + 1.0)  # the last shard is handed out, then computed
    assert outcome.driver == pytest.approx(100 / 101)


def test_a_driver_that_is_quick_enough_costs_its_first_round_only() -> None:
    cluster = Cluster(actors=10, tokens_per_second=RATE, dispatch_seconds=0.01)
    outcome = simulate(cluster, tokens=400 * 1000, shard_tokens=1000)
    assert 40.0 < outcome.seconds < 40.0 + 2 * 10 * 0.01 + 1e-9
    assert outcome.driver == pytest.approx(400 * 0.01 / outcome.seconds)


def test_waiting_for_a_driver_is_that_of_an_m_d_1_queue() -> None:
    """Many actors with shards of widely spread lengths ask almost as a Poisson stream, for a service that always takes
    d: the mean wait at load rho is rho d / (2 (1 - rho)). It is taken between 20,000 and 80,000 shards, for at the
    start all actors ask at once."""
    actors, d = 400, 0.02
    cluster = Cluster(actors=actors, tokens_per_second=RATE, dispatch_seconds=d, straggler_sigma=1.0, prefetch=False)
    waited, spent = {}, {}
    for shards in (20_000, 80_000):
        outcome = simulate(cluster, tokens=shards * 16_000, shard_tokens=16_000, seed=1, sample=shards)
        actor_seconds = outcome.seconds * actors
        spent[shards] = actor_seconds * (1 - outcome.tail)
        waited[shards] = spent[shards] - actor_seconds * outcome.useful - shards * d
    rho = 60_000 * d * actors / (spent[80_000] - spent[20_000])
    wait = (waited[80_000] - waited[20_000]) / 60_000
    assert 0.4 < rho < 0.6
    assert wait == pytest.approx(rho * d / (2 * (1 - rho)), rel=0.15)


def test_the_store_sets_the_pace_by_its_requests_or_its_bandwidth() -> None:
    fast = {"actors": 20, "tokens_per_second": RATE}
    requests = Cluster(**fast, requests_per_shard=6, requests_per_second=12.0)
    outcome = simulate(requests, tokens=500_000, shard_tokens=1000)
    assert outcome.seconds == pytest.approx(500 * 6 / 12.0, rel=0.02)
    assert outcome.requests > 0.98
    bandwidth = Cluster(**fast, read_bytes_per_token=4, write_bytes_per_token=6, bytes_per_second=50_000.0)
    outcome = simulate(bandwidth, tokens=500_000, shard_tokens=1000)
    assert outcome.seconds == pytest.approx(500_000 * 10 / 50_000, rel=0.02)
    assert outcome.bandwidth > 0.98


@pytest.mark.parametrize("mtbf", [math.inf, 40.0])
def test_work_is_conserved(mtbf: float) -> None:
    cluster = Cluster(actors=16, tokens_per_second=RATE, start_seconds=3.0, actor_mtbf_seconds=mtbf, node_actors=4,
                      node_mtbf_seconds=4 * mtbf, dispatch_seconds=1e-3)  # fmt: skip
    tokens = 3_000_500
    outcome = simulate(cluster, tokens=tokens, shard_tokens=2000, seed=3)
    assert outcome.useful * outcome.seconds * 16 == pytest.approx(tokens / RATE)  # each shard once, none twice
    assert outcome.useful + outcome.lost + outcome.starting + outcome.idle == pytest.approx(1.0)
    assert (outcome.failures > 0) == math.isfinite(mtbf)
    assert (outcome.lost > 0) == math.isfinite(mtbf)


def test_stragglers_leave_the_mean_time_of_a_shard() -> None:
    cluster = Cluster(actors=1, tokens_per_second=RATE, straggler_sigma=0.5)
    shards = 4000
    outcome = simulate(cluster, tokens=shards * RATE, shard_tokens=RATE, seed=5)
    error = math.sqrt((math.exp(0.25) - 1) * shards)
    assert abs(outcome.seconds - shards) < 4 * error


def test_rework_after_exponential_failures_is_what_theory_says() -> None:
    """One actor, shards of t seconds, failures at rate r, starts of s seconds that may fail too:
    E[time of a shard] = (exp(r t) - 1) exp(r s) / r."""
    t, s, r, shards = 20.0, 5.0, 1 / 50.0, 1500
    times = []
    for seed in range(12):
        cluster = Cluster(actors=1, tokens_per_second=RATE, start_seconds=s, actor_mtbf_seconds=1 / r, prefetch=False)
        times.append(simulate(cluster, tokens=shards * t * RATE, shard_tokens=t * RATE, seed=seed).seconds / shards)
    expected = (math.exp(r * t) - 1) * math.exp(r * s) / r
    assert abs(np.mean(times) - expected) < 4 * np.std(times, ddof=1) / math.sqrt(len(times))
    assert expected > 1.2 * t


def test_a_node_takes_all_its_actors_with_it() -> None:
    nodes = Cluster(actors=8, tokens_per_second=RATE, node_actors=8, node_mtbf_seconds=100.0, start_seconds=1.0)
    outcome = simulate(nodes, tokens=8_000_000, shard_tokens=5000, seed=2)
    assert outcome.failures % 8 == 0
    assert outcome.failures > 0


def test_the_same_seed_is_the_same_run_and_another_is_not() -> None:
    cluster = Cluster(actors=5, tokens_per_second=RATE, straggler_sigma=0.3, actor_mtbf_seconds=100.0)
    runs = [simulate(cluster, tokens=1e6, shard_tokens=1e4, seed=seed) for seed in (1, 1, 2)]
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


def test_a_sampled_run_ends_where_the_whole_run_does() -> None:
    cluster = Cluster(actors=8, tokens_per_second=RATE, start_seconds=10.0, straggler_sigma=0.2, dispatch_seconds=1e-3)
    whole = simulate(cluster, tokens=8000 * 1000, shard_tokens=1000, sample=8000)
    part = simulate(cluster, tokens=8000 * 1000, shard_tokens=1000, sample=1000)
    assert not whole.sampled
    assert part.sampled
    assert part.seconds == pytest.approx(whole.seconds, rel=0.02)
    assert part.useful == pytest.approx(whole.useful, rel=0.02)


@pytest.mark.parametrize("failing", ["actor_mtbf_seconds", "node_mtbf_seconds"])
def test_actors_that_fail_before_their_first_shard_are_refused(failing: str) -> None:
    """They start for 5 s, are served 0.25 s each one after the other, and compute for 2 s."""
    slow = {"tokens_per_second": RATE, "start_seconds": 5.0, "dispatch_seconds": 0.25, "actors": 4}
    for seconds in (-1.0, 0.0, 1.0, 8.0):
        with pytest.raises(ValueError, match=r"must be above the 8 s in which it starts and scores a shard of 2,000"):
            simulate(Cluster(**slow, **{failing: seconds}), tokens=1e5, shard_tokens=2000)
    outcome = simulate(Cluster(**slow, **{failing: 8.5}), tokens=1e5, shard_tokens=2000)
    assert outcome.useful * outcome.seconds * 4 == pytest.approx(100.0)
    assert outcome.failures > 0
    short = simulate(Cluster(**slow, **{failing: 8.5}), tokens=1000, shard_tokens=1e9)  # its one shard is short
    assert short.shards == 1


def test_nothing_to_score_is_refused() -> None:
    with pytest.raises(ValueError, match="must be > 0"):
        simulate(Cluster(actors=0, tokens_per_second=1.0), tokens=1, shard_tokens=1)
