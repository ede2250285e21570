"""`build_mask`: token scores -> ranking of documents and token mask, by Algorithm 1, exactly.

The passes of `ifguide.selection.distributed` as Ray tasks, one for each shard.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from ifguide.artifacts import Manifest
from ifguide.config import to_yaml
from ifguide.distributed.session import connect, require_resources
from ifguide.distributed.tasks import run_tasks
from ifguide.run import Run
from ifguide.selection.masks import VERB, make_mask
from ifguide.telemetry import log


def build_mask(run: Run, *, dry_run: bool = False) -> Manifest | None:
    """Make `ranking/` and `mask/`.

    Raises:
        MismatchError: scores are of another corpus. ConfigError: `behaviour` was not scored, one of `others` is no
            folder of scores, or the machine is too small for a task.
        ValueError: a score is NaN or infinite (names the block), or a shard of the scores has changed (names it).
    """
    options = run.config.build_mask
    if dry_run:
        log(
            VERB,
            f"would mask up to {100 * options.max_fraction:g}% of the tokens, those above the {options.quantile}"
            f" quantile and {options.window} neighbours, {options.unit} by {options.unit}"
            + (f", by mean ranks with {', '.join(options.others)}" if options.others else ""),
        )
        return None

    @functools.cache
    def join() -> None:
        connect(run.config.cluster)
        require_resources(run.config.cluster, VERB, options.resources)

    def on_the_cluster(function: Callable[..., Any], calls: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
        join()  # not before: a mask that is complete needs no cluster
        return run_tasks(options.resources)(function, calls)

    return make_mask(options, run.selection, config_yaml=to_yaml(run.config), run_tasks=on_the_cluster)
