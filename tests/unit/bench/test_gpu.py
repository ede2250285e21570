"""The one command for a GPU: what is done is not run again, a failure stops no other step, what it records is read."""

from __future__ import annotations

import json
import sys
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import yaml

from bench import gpu
from bench.common import gpu_record, gpu_steps
from bench.common.gpu_steps import STEPS, Session
from ifguide.planning import measurements
from tests import forked

TODAY = date(2026, 1, 2)


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The steps that run, which do nothing here but write their names; `scoring_1b` fails."""
    names: list[str] = []

    def step(name: str) -> Any:
        def run(session: Session) -> dict[str, Any]:
            names.append(name)
            if name == "scoring_1b":
                raise RuntimeError("out of memory")
            return {"mfu": 0.5, "tokens_per_second": 1e5} if name.startswith("training") else {"seconds": 1.0}

        return run

    monkeypatch.setattr(gpu, "STEPS", {name: step(name) for name in STEPS})
    return names


def test_it_goes_on_where_it_was_and_a_failure_stops_no_other_step(tmp_path: Path, ran: list[str]) -> None:
    session = Session(folder=tmp_path, small=True)
    result = gpu.run(session, None, minutes=1)
    assert ran == list(STEPS)
    assert result["failed"] == {"scoring_1b": "RuntimeError: out of memory"}
    assert (result["left"], result["mfu_160m"]) == ([], 0.5)
    ran.clear()
    gpu.run(session, None, minutes=1)
    assert ran == ["scoring_1b"]
    ran.clear()
    gpu.run(session, ["machine"], minutes=1)
    assert ran == ["machine"]


def test_what_needs_the_pipeline_waits_for_it_and_no_step_is_begun_when_time_is_up(
    tmp_path: Path, ran: list[str]
) -> None:
    session = Session(folder=tmp_path, small=True)
    assert gpu.run(session, ["resuming"], minutes=1)["failed"] == {"resuming": "needs pipeline"}
    assert gpu.run(session, None, minutes=0)["left"] == list(STEPS)
    assert ran == []


def test_a_record_is_a_section_and_rows_that_the_planner_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = {
        "mfu_160m": 0.4,
        "failed": {},
        "left": ["comparison"],
        "small": False,
        "steps": {
            "machine": {"device": "NVIDIA H200", "cores": 16, "versions": {"torch": "2.13.0", "trl": None}},
            "training_160m": {"mfu": 0.4, "tokens_per_second": 412345.6},
        },
    }
    log, rows = tmp_path / "LOG.md", tmp_path / "measurements.yaml"
    log.write_text(gpu_record.LOG.read_text())
    rows.write_text(gpu_record.MEASUREMENTS.read_text())
    for _ in range(2):
        gpu_record.record(result, today=TODAY, log=log, measurements=rows)
    text = log.read_text()
    assert text.index("## The whole on a GPU") < text.index("## Real text with known labels")
    assert "**Date** 2026-01-02" in text
    assert "NVIDIA H200, 16 cores" in text
    assert text.replace("\n\n\n", "") == text
    made = [line for line in rows.read_text().splitlines() if "2026-01-02" in line]
    assert len(made) == 1
    monkeypatch.setattr(measurements, "_tables", lambda: yaml.safe_load(rows.read_text()))
    measurements.throughputs.cache_clear()
    (row,) = [each for each in measurements.throughputs() if "2026" in each.id]
    measurements.throughputs.cache_clear()
    assert (row.hardware.name, row.pass_, row.precision, row.kind) == ("h200", "train", "bfloat16", "measured")
    assert 0.3 < row.efficiency < 0.5


@pytest.mark.slow
def test_every_step_runs_at_toy_size_on_a_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_steps, "subprocess", forked)
    monkeypatch.setattr(sys, "argv", ["bench/gpu.py", "--small", "--folder", str(tmp_path)])
    gpu.main()
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (result["failed"], result["left"]) == ({}, [])
    assert result["equal_bytes"] is True
    assert result["syncs_per_step"] == 0
    resumed = result["steps"]["resuming"]
    assert 0 < resumed["resumed_from"] < resumed["steps"]
    assert resumed["loss_resumed"] == resumed["loss_whole"]
