"""A pool of actors on the Ray cluster, and one run of Ray Data over it."""

from __future__ import annotations

import logging
from collections.abc import Generator, Sequence
from dataclasses import dataclass

import ray.data

from ifguide.config.resources import Resources
from ifguide.distributed.ledger import Entry, Failure
from ifguide.distributed.session import cluster_cpus
from ifguide.distributed.worker import LedgerWorker, Parcel, Shard, WorkerSource

NEW_ACTORS_PER_DEATH = 2  # actors in a row that may fail to start before the stage does


@dataclass(frozen=True, kw_only=True)
class Pool:
    """A stage's workers: `min_size` (default: `size`) to `size` actors, each of `resources`.

    An actor holds `in_flight` shards at once: with 2 it reads the next and writes the last while it computes."""

    size: int
    resources: Resources
    min_size: int | None = None
    in_flight: int = 1

    @classmethod
    def filling_cluster(cls, resources: Resources) -> Pool:
        """As many actors as the cluster has CPUs for."""
        return cls(size=max(1, int(cluster_cpus() / resources.cpus)), resources=resources)


def work_off(shards: Sequence[Shard], source: WorkerSource, pool: Pool) -> Generator[Entry | Failure, None, None]:
    """Have a new pool process shards; yields what each came to, as they end.

    Closing the generator ends the actors.

    Raises:
        ray.exceptions.RayError: an actor could not be started, or not again.
    """
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_no_progress_timeout_s = -1  # a shard may take hours, and so may waiting for a machine
    context.max_consecutive_actor_init_deaths = NEW_ACTORS_PER_DEATH
    context.autoscaling_config.actor_pool_util_upscaling_threshold = 1.0  # another actor when all are busy
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    rows = [{"shard": Parcel(shard)} for shard in shards]
    size = min(pool.size, len(rows))
    # Ahead of a busy actor only where there is plenty: else a shard would wait there for an actor that starts next.
    in_flight = pool.in_flight if len(rows) > pool.in_flight * size else 1
    dataset = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        LedgerWorker,
        fn_constructor_kwargs={"source": source},
        compute=ray.data.ActorPoolStrategy(
            min_size=min(size, pool.min_size or size),
            max_size=size,
            max_tasks_in_flight_per_actor=in_flight,
            max_concurrent_calls_per_actor=in_flight,
            enable_true_multi_threading=True,
        ),
        num_cpus=pool.resources.cpus,
        num_gpus=pool.resources.gpus or None,
        memory=pool.resources.memory,
        batch_size=1,
    )
    for row in dataset.iter_rows():
        yield row["entry"].content
