"""A discrete-event simulation of scoring: thousands of actors, a driver, an object store, failures and stragglers.

Model. Shards wait in one queue. An actor asks for a shard; the driver hands them out one at a time, `dispatch_seconds`
each; the shard is read through the store, computed, and its scores written. With `prefetch` an actor asks for its next
shard when it begins to compute one, as the stage does. The store is two fluids in series: `requests_per_second`
(`requests_per_shard` for each shard, half before and half after the computing) and `bytes_per_second` over all actors,
with `actor_bytes_per_second` for each transfer alone. Computing takes tokens / `tokens_per_second` times a lognormal
factor of mean 1. Actors fail one by one and by nodes, after exponential times; a failed actor loses the shard it
computes and the one it holds, which go back to the front of the queue, and starts again in `start_seconds`. A start
may fail too.

One heap of events, three a shard: about a second for 50,000 shards. Of a larger corpus the first `sample`
shards are simulated and the rest is added at the rate of their middle half. Everything is drawn from `seed`.

It does not know of Ray's own memory, of networks between nodes, or of actors that differ for good.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import deque
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Rates in SI units; infinite where nothing limits. `node_actors` actors share a node, and its failures."""

    actors: int
    tokens_per_second: float
    start_seconds: float = 0.0
    straggler_sigma: float = 0.0
    actor_mtbf_seconds: float = math.inf
    node_actors: int = 8
    node_mtbf_seconds: float = math.inf
    dispatch_seconds: float = 0.0
    requests_per_shard: float = 0.0
    requests_per_second: float = math.inf
    read_bytes_per_token: float = 0.0
    write_bytes_per_token: float = 0.0
    bytes_per_second: float = math.inf
    actor_bytes_per_second: float = math.inf
    prefetch: bool = True

    @property
    def mtbf_seconds(self) -> float:
        """Of one actor, by itself or with its node."""
        return min(self.actor_mtbf_seconds, self.node_mtbf_seconds)

    def first_shard_seconds(self, shard_tokens: float) -> float:
        """What an actor must live for to score a shard at all: it starts, waits for its turn among all, computes."""
        served = self.dispatch_seconds + self.requests_per_shard / self.requests_per_second
        served += shard_tokens * self.read_bytes_per_token / self.bytes_per_second
        return self.start_seconds + self.actors * served + shard_tokens / self.tokens_per_second


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """`seconds` of the whole run; the shares are of it (driver, requests, bandwidth) or of all actors' time in it.

    `useful` computing that was kept, `lost` computing that a failure threw away, `starting`, and `idle`, waiting for a
    shard, add up to 1; `tail` is what of `idle` comes after an actor's last shard. `sampled`: part of the run
    was added at its steady rate."""

    shards: int
    seconds: float
    useful: float
    lost: float
    starting: float
    idle: float
    tail: float
    driver: float
    requests: float
    bandwidth: float
    failures: int
    sampled: bool


class _Server:
    """First come, first served, one at a time: returns when work handed in now is done."""

    def __init__(self) -> None:
        self.free = self.busy = 0.0

    def serve(self, now: float, seconds: float) -> float:
        self.busy += seconds
        self.free = max(self.free, now) + seconds
        return self.free


@dataclass
class _Actor:
    """`life` counts its deaths, so that events of an earlier life are told apart."""

    life: int = 0
    ready: int | None = None  # a shard that has been read
    asked: int | None = None  # a shard on its way
    computing: int | None = None
    since: float = 0.0
    up: bool = False
    last_useful: float = 0.0


def simulate(cluster: Cluster, *, tokens: float, shard_tokens: float, seed: int = 0, sample: int = 60_000) -> Outcome:
    """Score `tokens` in shards of `shard_tokens` (the last one may be short).

    Raises:
        ValueError: no tokens, shards or actors; actors that fail too soon to score a shard.
    """
    if tokens <= 0 or shard_tokens <= 0 or cluster.actors < 1:
        raise ValueError(f"{tokens:g} tokens in shards of {shard_tokens:g} by {cluster.actors} actors: all must be > 0")
    needed = cluster.first_shard_seconds(min(tokens, shard_tokens))
    if not needed < cluster.mtbf_seconds:
        raise ValueError(
            f"mean time between an actor's failures of {cluster.mtbf_seconds:g} s: must be above the {needed:,.0f} s in"
            f" which it starts and scores a shard of {min(tokens, shard_tokens):,.0f} tokens"
        )
    shards = math.ceil(tokens / shard_tokens)
    simulated = min(shards, max(sample, 12 * cluster.actors))
    sizes = np.full(simulated, float(shard_tokens))
    if simulated == shards:
        sizes[-1] = tokens - (shards - 1) * shard_tokens
    run = _Simulation(cluster, sizes, seed)
    run.execute()
    return run.outcome(shards)


class _Simulation:
    def __init__(self, cluster: Cluster, sizes: np.ndarray, seed: int):
        self.cluster, self.sizes = cluster, sizes.tolist()
        self.rng = np.random.default_rng(seed)
        self.queue, self.waiting = deque(range(len(sizes))), deque[tuple[int, int]]()
        self.actors = [_Actor() for _ in range(cluster.actors)]
        self.events: list[tuple[float, int, str, int, int]] = []
        self.order = itertools.count()
        self.driver, self.request_server, self.wire = _Server(), _Server(), _Server()
        self.done, self.finish_times = 0, np.zeros(len(sizes))
        self.useful = self.lost = self.starting = self.end = 0.0
        self.failures = 0
        sigma = cluster.straggler_sigma
        self.mu, self.sigma = -0.5 * sigma * sigma, sigma

    def execute(self) -> None:
        for index in range(len(self.actors)):
            self._start(0.0, index)
            self._schedule_failure(0.0, "fail_actor", index, self.cluster.actor_mtbf_seconds)
        for node in range(math.ceil(len(self.actors) / self.cluster.node_actors)):
            self._schedule_failure(0.0, "fail_node", node, self.cluster.node_mtbf_seconds)
        while self.done < len(self.sizes):
            now, _, kind, index, life = heapq.heappop(self.events)
            if kind == "fail_actor":
                self._fail(now, index)
                self._schedule_failure(now, kind, index, self.cluster.actor_mtbf_seconds)
            elif kind == "fail_node":
                first = index * self.cluster.node_actors
                for member in range(first, min(first + self.cluster.node_actors, len(self.actors))):
                    self._fail(now, member)
                self._schedule_failure(now, kind, index, self.cluster.node_mtbf_seconds)
            elif self.actors[index].life == life:
                getattr(self, f"_{kind}")(now, index)

    def _push(self, when: float, kind: str, index: int) -> None:
        life = self.actors[index].life if not kind.startswith("fail") else 0
        heapq.heappush(self.events, (when, next(self.order), kind, index, life))

    def _schedule_failure(self, now: float, kind: str, index: int, mtbf: float) -> None:
        if math.isfinite(mtbf):
            self._push(now + self.rng.exponential(mtbf), kind, index)

    def _start(self, now: float, index: int) -> None:
        self.actors[index].since = now
        self._push(now + self.cluster.start_seconds, "started", index)

    def _started(self, now: float, index: int) -> None:
        actor = self.actors[index]
        self.starting += now - actor.since
        actor.up = True
        self._ask(now, index)

    def _ask(self, now: float, index: int) -> None:
        actor = self.actors[index]
        if not self.queue:
            self.waiting.append((index, actor.life))
            return
        actor.asked = self.queue.popleft()
        self._push(self.driver.serve(now, self.cluster.dispatch_seconds), "handed", index)

    def _handed(self, now: float, index: int) -> None:
        shard = self.actors[index].asked
        assert shard is not None
        self._push(self._transfer(now, self.sizes[shard] * self.cluster.read_bytes_per_token), "arrived", index)

    def _transfer(self, now: float, size: float) -> float:
        cluster = self.cluster
        requested = self.request_server.serve(now, 0.5 * cluster.requests_per_shard / cluster.requests_per_second)
        sent = self.wire.serve(requested, size / cluster.bytes_per_second)
        return max(sent, requested + size / cluster.actor_bytes_per_second)

    def _arrived(self, now: float, index: int) -> None:
        actor = self.actors[index]
        actor.ready, actor.asked = actor.asked, None
        if actor.computing is None:
            self._compute(now, index)

    def _compute(self, now: float, index: int) -> None:
        actor = self.actors[index]
        assert actor.ready is not None
        shard = actor.computing = actor.ready
        actor.ready, actor.since = None, now
        factor = math.exp(self.rng.normal(self.mu, self.sigma)) if self.sigma else 1.0
        self._push(now + factor * self.sizes[shard] / self.cluster.tokens_per_second, "computed", index)
        if self.cluster.prefetch:
            self._ask(now, index)

    def _computed(self, now: float, index: int) -> None:
        actor = self.actors[index]
        assert actor.computing is not None
        self.useful += now - actor.since
        written = self._transfer(now, self.sizes[actor.computing] * self.cluster.write_bytes_per_token)
        self.end = max(self.end, written)  # published in the background: only the end of the run waits for it
        self.finish_times[self.done] = now
        self.done += 1
        actor.computing, actor.last_useful = None, now
        if actor.ready is not None:
            self._compute(now, index)
        elif not self.cluster.prefetch:
            self._ask(now, index)

    def _fail(self, now: float, index: int) -> None:
        actor = self.actors[index]
        self.failures += 1
        if not actor.up:
            self.starting += now - actor.since
        elif actor.computing is not None:
            self.lost += now - actor.since
        actor.life += 1
        actor.up = False
        for shard in (actor.asked, actor.ready, actor.computing):
            if shard is not None:
                self.queue.appendleft(shard)
        actor.asked = actor.ready = actor.computing = None
        while self.queue and self.waiting:
            waiter, life = self.waiting.popleft()
            if self.actors[waiter].life == life:
                self._ask(now, waiter)
        self._start(now, index)

    def outcome(self, shards: int) -> Outcome:
        """Of all `shards`: those that were not simulated are added at the steady rate, and with the same shares."""
        simulated, actors = len(self.sizes), len(self.actors)
        tail = sum(self.end - actor.last_useful for actor in self.actors)
        starting = self.starting + sum(self.end - actor.since for actor in self.actors if not actor.up)
        first_starts = min(starting, actors * self.cluster.start_seconds)
        scale, seconds = shards / simulated, self.end
        if shards > simulated:
            first, last = simulated // 4, 3 * simulated // 4
            spacing = (self.finish_times[last] - self.finish_times[first]) / (last - first)
            seconds += float(spacing) * (shards - simulated)
        total = seconds * actors
        useful, lost = scale * self.useful / total, scale * self.lost / total
        started = (first_starts + scale * (starting - first_starts)) / total
        idle = max(0.0, 1.0 - useful - lost - started)
        shares = {"useful": useful, "lost": lost, "starting": started, "idle": idle}
        return Outcome(
            **shares,
            shards=shards,
            seconds=seconds,
            tail=min(idle, tail / total),
            driver=scale * self.driver.busy / seconds,
            requests=scale * self.request_server.busy / seconds,
            bandwidth=scale * self.wire.busy / seconds,
            failures=round(scale * self.failures),
            sampled=shards > simulated,
        )
