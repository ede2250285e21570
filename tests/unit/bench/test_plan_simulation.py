"""The simulation of scoring over actors, shard sizes and corpora, as a command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench.common.simulation import Outcome
from bench.common.sweep import limit, recommended, sweep
from bench.plan_simulation import main
from ifguide.config import load_config
from ifguide.planning.command import make_job

PYTHIA = Path(__file__).parents[3] / "configs" / "pythia160m_owt.yaml"


@pytest.mark.parametrize("hours", ["0", "-1", "nan", "0.001"])
def test_failures_that_let_no_shard_be_scored_are_one_line(hours: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--config", str(PYTHIA), "--corpus-tokens", "1e9", "--actors", "64"]
    assert main([*command, "--mtbf-hours", hours]) == 1
    assert capsys.readouterr().err.startswith(f"plan_simulation: --mtbf-hours {hours}: must be above")


def test_shards_that_failures_let_no_actor_score_are_left_out_of_the_simulation() -> None:
    job = make_job(load_config(PYTHIA), corpus_tokens=1e9)
    points = sweep(job, corpora=[1e9], actors=[64], shard_tokens=(2.0**19, 2.0**27), mtbf_hours=0.03)
    assert [point.shard_tokens for point in points] == [2.0**19]
    assert "simulation: 64 actors fail too soon to score shards of more than 524,288 tokens" in job.notes


def _outcome(**shares: float) -> Outcome:
    quiet: dict[str, Any] = {"useful": 0.95, "lost": 0.0, "starting": 0.0, "idle": 0.05, "tail": 0.0, "driver": 0.1,
                             "requests": 0.1, "bandwidth": 0.1}  # fmt: skip
    return Outcome(shards=1, seconds=1.0, failures=0, sampled=False, **{**quiet, **shares})


@pytest.mark.parametrize(
    ("shares", "name"),
    [
        ({}, "compute"),
        ({"driver": 0.99}, "driver"),
        ({"bandwidth": 0.95}, "bandwidth"),
        ({"requests": 0.95}, "requests"),
        ({"idle": 0.4, "tail": 0.3}, "shard size"),
        ({"starting": 0.5}, "start"),
        ({"lost": 0.2}, "failures"),
    ],
)
def test_the_limit_is_what_is_busy_or_wasted_most(shares: dict[str, float], name: str) -> None:
    assert limit(_outcome(**shares)) == name


def test_small_shards_meet_the_driver_and_large_ones_leave_actors_idle() -> None:
    job = make_job(load_config(PYTHIA), corpus_tokens=1e11)
    sizes = (2.0**19, 2.0**23, 2.0**28)
    points = sweep(job, corpora=[1e11], actors=[2048], shard_tokens=sizes)
    assert [point.limit for point in points][::2] == ["driver", "shard size"]
    best = recommended(points)[1e11, 2048]
    assert best.shard_tokens == 2.0**23
    assert best.outcome.seconds == min(point.outcome.seconds for point in points)


def test_a_simulated_plan_covers_a_trillion_tokens_and_draws_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figure = tmp_path / "plan.png"
    command = ["--config", str(PYTHIA), "--corpus-tokens", "1e9", "--actors", "64", "--mtbf-hours", "24"]
    assert main([*command, "--plot", str(figure)]) == 0
    *table, last = capsys.readouterr().out.splitlines()
    result = json.loads(last)
    assert {point["corpus_tokens"] for point in result["points"]} == {1e9, 1e12}
    assert {item["corpus_tokens"] for item in result["recommended"]} == {1e9, 1e12}
    assert sum(line.endswith("<- recommended") for line in table) == 2
    assert any(line.startswith("measured: dispatch: ") for line in table)
    assert figure.read_bytes().startswith(b"\x89PNG")
