"""Scoring played event by event, beyond what `ifguide plan` says: how many actors, shards of which size, what limits.

    python bench/plan_simulation.py --config F [--corpus-tokens 1e9] [--actors 64 512 4096] [--mtbf-hours 24]
        [--gpu h100] [--plot plan.png] [--set a.b=c]

For the planned corpus and for 1T tokens, every number of actors and shard size from 0.5M to 134M tokens: one driver,
an object store, stragglers, failures and rework (`bench.common.simulation`), at the rates that the plan rests on
(`ifguide/planning/measurements.yaml`). `limit` is what keeps a run from going faster; the recommended shard size is the
middle one of those within 5% of the fastest. Seven seconds.

A table is printed, then what it rests on, then one JSON object: `points`, `recommended`, `notes`, `sources`.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.common.sweep import ACTORS, Point, plot, recommended, sweep
from ifguide.config import load_config
from ifguide.planning.command import make_job, rounded
from ifguide.planning.measurements import sources
from ifguide.planning.table import aligned, duration
from ifguide.telemetry import configure_logging

LARGEST_CORPUS = 1e12
RATES = (
    "gpu_mtbf", "actor_start", "straggler_sigma", "dispatch", "requests_per_shard", "s3_requests", "s3_bytes",
    "s3_object_bytes", "corpus_bytes", "score_bytes",
)  # fmt: skip
COLUMNS = (
    "tokens", "actors", "shard", "shards", "time", "useful", "lost", "start", "tail", "driver", "req", "bw", "limit"
)  # fmt: skip
SHARES = ("useful", "lost", "starting", "tail", "driver", "requests", "bandwidth")


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table and the JSON object; 1 and one line of what is wrong where it cannot be simulated."""
    options = _parser().parse_args(arguments)
    configure_logging()
    logging.getLogger("ifguide.models").setLevel(logging.WARNING)
    try:
        result = simulated(options)
    except (ValueError, OSError) as error:
        print(f"plan_simulation: {error}", file=sys.stderr)
        return 1
    print("\n".join(table(result)))
    print(json.dumps(result))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="YAML file; see configs/")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="a.b=c", help="override a key")
    parser.add_argument("--corpus-tokens", type=float, help="default: of the packed corpus, if there is one, else 1e9")
    parser.add_argument("--gpu", help="type (h100, a100, ...) or cpu; default as `ifguide plan`")
    parser.add_argument("--actors", type=int, nargs="+", default=list(ACTORS), help="default 64 512 4096")
    parser.add_argument("--mtbf-hours", type=float, help="mean time between failures of a machine of eight GPUs")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw what was simulated")
    return parser


def simulated(options: argparse.Namespace) -> dict[str, Any]:
    """What is printed as JSON. Times in hours, `starting`, `idle` and the like as shares of the actors' time.

    Raises:
        ValueError, OSError: config, GPU type or failures that cannot be simulated; says what to do.
    """
    mtbf_hours = options.mtbf_hours
    if mtbf_hours is not None and not mtbf_hours > 0:
        raise ValueError(f"--mtbf-hours {mtbf_hours:g}: must be above 0")
    config = load_config(options.config, options.overrides)
    job = make_job(config, corpus_tokens=options.corpus_tokens, gpu=options.gpu)
    corpora = sorted({job.tokens, LARGEST_CORPUS})
    points = sweep(job, corpora=corpora, actors=options.actors, mtbf_hours=mtbf_hours, seed=config.seed)
    if options.plot is not None:
        plot(points, options.plot)
    origins = sources()
    return rounded(
        {
            "config": str(options.config),
            "machine": job.machine.name,
            "points": [_as_json(point) for point in points],
            "recommended": [
                {"corpus_tokens": tokens, "actors": count, "shard_tokens": point.shard_tokens, "limit": point.limit}
                for (tokens, count), point in recommended(points).items()
            ],
            "notes": job.notes,
            "sources": {
                name: {"kind": origins[name][0], "source": origins[name][1]}
                for name in (RATES if mtbf_hours is None else RATES[1:])
            },
        }
    )


def _as_json(point: Point) -> dict[str, Any]:
    shares = {key: value for key, value in asdict(point.outcome).items() if key != "seconds"}
    return {
        "corpus_tokens": point.tokens,
        "actors": point.actors,
        "shard_tokens": point.shard_tokens,
        "hours": point.outcome.seconds / 3600,
        "limit": point.limit,
        **shares,
    }


def table(result: Mapping[str, Any]) -> Iterator[str]:
    """The lines for a person."""
    yield "scoring, simulated: shares of the actors' time, and how busy driver, requests and bandwidth are"
    best = {(item["corpus_tokens"], item["actors"], item["shard_tokens"]) for item in result["recommended"]}
    rows: list[tuple[str, ...]] = [COLUMNS]
    for point in result["points"]:
        chosen = (point["corpus_tokens"], point["actors"], point["shard_tokens"]) in best
        rows.append(
            (
                f"{point['corpus_tokens']:.3g}",
                f"{point['actors']:,}",
                f"{point['shard_tokens'] / 1e6:,.1f}M",
                f"{point['shards']:,}",
                duration(point["hours"]),
                *(f"{100 * point[name]:.0f}%" for name in SHARES),
                point["limit"] + (" <- recommended" if chosen else ""),
            )
        )
    yield from aligned(rows)
    yield from result["notes"]
    for name, entry in result["sources"].items():
        yield f"{entry['kind']}: {name}: {entry['source']}"


if __name__ == "__main__":
    raise SystemExit(main())
