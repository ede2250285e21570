"""Simulated scoring over numbers of actors, shard sizes and corpora: what limits each, and which shard size to take."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.common.simulation import Cluster, Outcome, simulate
from ifguide.planning.estimate import scoring_rates
from ifguide.planning.job import Job
from ifguide.planning.measurements import rates

ACTORS = (64, 512, 4096)
SHARD_TOKENS = tuple(float(2**power) for power in (19, 21, 23, 25, 27))
SAMPLE = 20_000
BUSY = 0.9  # a server busier than this is the limit
WASTED = 0.1  # a share of the actors' time worth naming
CLOSE = 1.05  # a shard size this near to the best is as good


@dataclass(frozen=True, kw_only=True)
class Point:
    """One simulated run and `limit`, what keeps it from going faster."""

    tokens: float
    actors: int
    shard_tokens: float
    outcome: Outcome
    limit: str


def cluster_of(job: Job, actors: int, *, mtbf_hours: float | None = None) -> Cluster:
    """The simulated cluster. mtbf_hours: of a machine of eight actors; None takes the published figure per GPU."""
    named = {name: rate.value for name, rate in rates().items()}
    behaviours = 1 + len(job.config.score_corpus.queries)
    on_gpu = job.config.score_corpus.resources.gpus > 0
    return Cluster(
        actors=actors,
        tokens_per_second=scoring_rates(job)[0],
        start_seconds=named["actor_start" if on_gpu else "stage_start"],
        straggler_sigma=named["straggler_sigma"],
        actor_mtbf_seconds=3600 * named["gpu_mtbf"] if mtbf_hours is None else math.inf,
        node_mtbf_seconds=math.inf if mtbf_hours is None else 3600 * mtbf_hours,
        dispatch_seconds=named["dispatch"],
        requests_per_shard=named["requests_per_shard"],
        requests_per_second=named["s3_requests"],
        read_bytes_per_token=named["corpus_bytes"],
        write_bytes_per_token=named["score_bytes"] * behaviours,
        bytes_per_second=named["s3_bytes"],
        actor_bytes_per_second=named["s3_object_bytes"],
    )


def sweep(
    job: Job,
    *,
    corpora: Iterable[float],
    actors: Sequence[int] = ACTORS,
    shard_tokens: Sequence[float] = SHARD_TOKENS,
    mtbf_hours: float | None = None,
    seed: int = 0,
) -> list[Point]:
    """Every combination; half a second each at most. Shards that actors fail too soon to score are left out, with a
    note to the job.

    Raises:
        ValueError: actors fail too soon for any.
    """
    points = []
    for tokens in corpora:
        for count in actors:
            cluster = cluster_of(job, count, mtbf_hours=mtbf_hours)
            for size in _scorable(job, cluster, tokens, shard_tokens):
                outcome = simulate(cluster, tokens=tokens, shard_tokens=size, seed=seed, sample=SAMPLE)
                point = Point(tokens=tokens, actors=count, shard_tokens=size, outcome=outcome, limit=limit(outcome))
                points.append(point)
    return points


def _scorable(job: Job, cluster: Cluster, tokens: float, shard_tokens: Sequence[float]) -> list[float]:
    needed = {size: cluster.first_shard_seconds(min(tokens, size)) for size in shard_tokens}
    sizes = [size for size, seconds in needed.items() if seconds < cluster.mtbf_seconds]
    if not sizes:
        least = min(needed.values()) / 3600
        raise ValueError(
            f"--mtbf-hours {cluster.mtbf_seconds / 3600:g}: must be above the {least:.2g} hours in which one"
            f" of {cluster.actors:,} actors starts and scores its first shard"
        )
    note = f"simulation: {cluster.actors:,} actors fail too soon to score shards of more than {max(sizes):,.0f} tokens"
    if len(sizes) < len(needed) and note not in job.notes:
        job.notes.append(note)
    return sizes


def limit(outcome: Outcome) -> str:
    """driver, requests or bandwidth where one is busy all the time; else where the actors' time goes; else compute."""
    servers = {"driver": outcome.driver, "requests": outcome.requests, "bandwidth": outcome.bandwidth}
    name = max(servers, key=lambda key: servers[key])
    if servers[name] > BUSY:
        return name
    wasted = {
        "shard size": outcome.tail,
        "start": outcome.starting,
        "failures": outcome.lost,
        "waiting": outcome.idle - outcome.tail,
    }
    name = max(wasted, key=lambda key: wasted[key])
    return name if wasted[name] > WASTED else "compute"


def recommended(points: Iterable[Point]) -> dict[tuple[float, int], Point]:
    """(tokens, actors) -> the middle one of the shard sizes within `CLOSE` of the fastest: far from where the driver
    is the limit, and from where actors have nothing left to do."""
    groups: dict[tuple[float, int], list[Point]] = {}
    for point in points:
        groups.setdefault((point.tokens, point.actors), []).append(point)
    best = {}
    for key, group in groups.items():
        fastest = min(point.outcome.seconds for point in group)
        near = [point for point in group if point.outcome.seconds <= CLOSE * fastest]
        best[key] = sorted(near, key=lambda point: point.shard_tokens)[len(near) // 2]
    return best


def plot(points: Sequence[Point], path: Path) -> None:
    """Hours against shard size, a panel for each corpus, a line for each number of actors."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    corpora = sorted({point.tokens for point in points})
    figure, axes = pyplot.subplots(1, len(corpora), figsize=(5 * len(corpora), 4), squeeze=False, layout="constrained")
    for panel, tokens in zip(axes[0], corpora, strict=True):
        for actors in sorted({point.actors for point in points}):
            line = [point for point in points if (point.tokens, point.actors) == (tokens, actors)]
            sizes, hours = [p.shard_tokens for p in line], [p.outcome.seconds / 3600 for p in line]
            panel.loglog(sizes, hours, marker="o", label=f"{actors:,} actors")
        panel.set(title=f"{tokens:.3g} tokens", xlabel="tokens per shard", ylabel="hours")
        panel.grid(alpha=0.3)
        panel.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
