"""Work on shards: what survives a worker's death, what is given up and why, and who pays for it."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import re
import signal
import threading
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from prometheus_client.parser import text_string_to_metric_families
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ifguide.artifacts import PLAN, file_entry, publish, write_json
from ifguide.config.resources import Resources
from ifguide.distributed import memory
from ifguide.distributed.ledger import LEDGER
from ifguide.distributed.metrics import RayMetrics
from ifguide.distributed.shards import Pool, ShardResults, StageError, run_shards
from ifguide.folders import FOLDERS
from ifguide.gauges import GAUGES, PREFIX, TAGS
from ifguide.status import run_status
from ifguide.telemetry import PROGRESS, ProgressFile


@dataclass(frozen=True)
class Piece:
    """A shard of the toy's work, which writes its key to `output`."""

    key: str
    output: Path | None = None


class Described(Piece):
    """One with words for what it is."""

    def __str__(self) -> str:
        return f"corpus.jsonl, bytes of {self.key}"


@dataclass(frozen=True, kw_only=True)
class ToySettings:
    """How the toy misbehaves."""

    log: Path
    start: str = ""
    poison: str = ""
    meet: int = 0
    starts: int = 0
    seconds: float = 0.0


class Toy:
    """Appends each shard it works on to `log`, and misbehaves as the settings say."""

    def __init__(self, settings: ToySettings):
        self.settings, start = settings, settings.start
        starts = self._note("start")
        if start == "raises" or (start == "raises on restart" and starts == 2):
            raise ValueError("the proxy is broken")
        if start == "dies" or (start == "dies twice" and starts <= 2):
            os.kill(os.getpid(), signal.SIGKILL)
        self.others = threading.Barrier(settings.meet) if settings.meet else None
        self.broken = False
        if settings.poison == "memory":  # before an attempt is watched, which is told of this machine's own but once
            memory.memory_left = lambda: (10**9, 64 * 10**9)

    def process(self, shard: Piece) -> dict[str, Any]:
        times, poison = self._note(shard.key), self.settings.poison
        if self.others:
            self.others.wait(timeout=300)
        while self._count("start") < self.settings.starts:
            time.sleep(0.05)
        time.sleep(self.settings.seconds)
        if shard.key == poison or (poison == f"{shard.key} once" and times == 1):
            os.kill(os.getpid(), signal.SIGKILL)
        if poison == "memory":
            attempts = self.settings.log.parent / LEDGER / f"{shard.key}.attempts"
            while "died of memory" not in attempts.read_text():
                time.sleep(0.05)
            os.kill(os.getpid(), signal.SIGKILL)
        if poison == "device" and times == 1 and shard.key == "s3":
            self.broken = True
        if self.broken:
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
        if shard.output:
            with publish(shard.output) as part:
                part.write_text(shard.key)
        if shard.key == "unlucky" and times < 3:
            raise RuntimeError("the network is down")
        return {"process": os.getpid()}

    def _note(self, word: str) -> int:
        with self.settings.log.open("a") as file:
            file.write(word + "\n")
        return self._count(word)

    def _count(self, word: str) -> int:
        return self.settings.log.read_text().splitlines().count(word)


def run(folder: Path, keys: list[str], pool: dict[str, Any] | None = None, **settings: Any) -> dict[str, Any]:
    options = {"size": 1, "resources": Resources(gpus=0), **(pool or {})}
    toy = ToySettings(log=folder / "log", **settings)
    return run_shards("toy", [Piece(key) for key in keys], Toy, toy, folder=folder, pool=Pool(**options))


def worked_on(folder: Path) -> list[str]:
    return [word for word in (folder / "log").read_text().splitlines() if word != "start"]


KEYS = [f"s{i}" for i in range(8)]


@pytest.mark.slow
def test_a_shard_that_kills_its_actor_each_time_is_given_up_alone(cluster: None, tmp_path: Path) -> None:
    write_json(tmp_path / "scores" / PLAN, {})
    folder = tmp_path / "scores"
    with pytest.raises(StageError, match=r"1 of 8 shards failed\n  s3: gave up after 3 attempts: its process died"):
        run(folder, KEYS, {"size": 2, "in_flight": 2}, poison="s3", seconds=0.05)
    work = worked_on(folder)
    assert work.count("s3") == 3
    # those beside it paid at most the one attempt that it was not alone in
    assert all(work.count(key) <= 2 for key in KEYS if key != "s3")
    assert sorted(path.stem for path in (folder / LEDGER).glob("*.json")) == [key for key in KEYS if key != "s3"]
    scores = next(i for i, line in enumerate(run_status(tmp_path, FOLDERS).lines()) if line.startswith("scores"))
    told = run_status(tmp_path, FOLDERS).lines()[scores : scores + 2]
    assert "in progress  7/8 shards (88%)" in told[0]
    assert "1 failed" in told[0]
    assert "failed s3: gave up after 3 attempts: its process died" in told[1]
    assert run(folder, KEYS)  # the same command again is a fresh start for it
    assert worked_on(folder).count("s3") == 4


def test_what_was_raised_is_the_reason_and_transient_errors_are_retried(cluster: None, tmp_path: Path) -> None:
    results = run(tmp_path, ["a", "unlucky", "b"])
    assert list(results) == ["a", "unlucky", "b"]
    assert worked_on(tmp_path).count("unlucky") == 3
    with pytest.raises(StageError, match=r"(?s)gave up after 2 attempts: .*RuntimeError: the network is down"):
        run(tmp_path / "again", ["a", "unlucky", "b"], {"resources": Resources(gpus=0, attempts=2)})
    entry = json.loads((tmp_path / LEDGER / "unlucky.json").read_text())
    assert entry["attempts"] == 3


def test_a_death_by_memory_is_one_and_says_of_what(cluster: None, tmp_path: Path) -> None:
    pool = Pool(size=1, resources=Resources(gpus=0, attempts=1))
    toy = ToySettings(log=tmp_path / "log", poison="memory")
    died = r"s1: corpus\.jsonl, bytes of s1: gave up after 1 attempts: its process died of memory, most likely: it held"
    with pytest.raises(StageError, match=died) as failed:
        run_shards("toy", [Described("s1")], Toy, toy, folder=tmp_path, pool=pool)
    assert "1.0 of its machine's 64.0 GB were left; give each process more (resources.memory" in str(failed.value)


def test_an_actor_whose_device_has_failed_takes_no_further_shard(cluster: None, tmp_path: Path) -> None:
    results = run(tmp_path, KEYS, {"resources": Resources(gpus=0, attempts=2)}, poison="device")
    assert list(results) == KEYS
    assert [worked_on(tmp_path).count(key) for key in KEYS] == [1, 1, 1, 2, 1, 1, 1, 1]
    assert len({result["process"] for result in results.values()}) == 2


def test_a_shard_whose_output_is_gone_or_damaged_is_done_again(
    cluster: None, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("ifguide"), "propagate", True)
    folder, elsewhere = tmp_path / "stage", tmp_path / "elsewhere"
    pieces = [Piece(key, (elsewhere if key == "s7" else folder) / f"{key}.out") for key in KEYS]

    def work() -> ShardResults:
        toy, pool = ToySettings(log=tmp_path / "log"), Pool(size=1, resources=Resources(gpus=0))
        return run_shards("toy", pieces, Toy, toy, folder=folder, pool=pool)

    first = work()
    assert first.files == {
        str(piece.output.relative_to(folder) if piece.key != "s7" else piece.output): file_entry(piece.output)
        for piece in pieces
        if piece.output
    }
    assert work() == first
    assert worked_on(tmp_path) == KEYS
    (folder / "s2.out").unlink()
    (folder / "s4.out").write_text("s5")  # as long as it was
    (elsewhere / "s7.out").write_text("S7")
    entry = folder / LEDGER / "s6.json"
    entry.write_text(entry.read_text().replace('"attempts": 1', '"attempts": 2'))
    again = work()
    assert list(again) == KEYS
    assert sorted(worked_on(tmp_path)) == sorted([*KEYS, "s2", "s4", "s6", "s7"])
    assert again.files == first.files
    assert [piece.output.read_text() for piece in pieces if piece.output] == KEYS
    for text in ("s2.out is gone", "s4.out has changed", "s7.out has changed", "s6.json is damaged"):
        assert text in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("start", "reason", "starts"),
    [("raises", "ValueError: the proxy is broken", 3), ("dies", "its process died 2 times while it started", 6)],
)
def test_constructors_that_never_work_end_the_stage_with_their_reason(
    start: str, reason: str, starts: int, cluster: None, tmp_path: Path
) -> None:
    with pytest.raises(StageError, match=f"no worker could be started: .*{reason}"):
        run(tmp_path, KEYS, {"resources": Resources(gpus=0, attempts=2)}, start=start)
    assert (tmp_path / "log").read_text().splitlines() == ["start"] * starts


@pytest.mark.slow
def test_constructors_that_die_now_and_then_are_survived(cluster: None, tmp_path: Path) -> None:
    assert list(run(tmp_path, KEYS, start="dies twice")) == KEYS


@pytest.mark.slow
def test_a_restart_whose_constructor_fails_hands_its_shards_to_new_actors(cluster: None, tmp_path: Path) -> None:
    assert list(run(tmp_path, KEYS, start="raises on restart", poison="s5 once")) == KEYS
    assert (tmp_path / "log").read_text().splitlines().count("start") == 3


def test_a_shard_is_read_while_another_computes(cluster: None, tmp_path: Path) -> None:
    results = run(tmp_path, KEYS, {"in_flight": 2}, meet=2)  # each waits until two are in work
    assert len({result["process"] for result in results.values()}) == 1


def test_the_pool_grows_to_its_largest_size(cluster: None, tmp_path: Path) -> None:
    keys = [f"s{i}" for i in range(40)]
    resources = Resources(gpus=0, memory=50_000_000)
    results = run(
        tmp_path, keys, {"size": 2, "min_size": 1, "in_flight": 2, "resources": resources}, seconds=0.2, starts=2
    )
    assert len({result["process"] for result in results.values()}) == 2


def test_the_progress_file_ends_at_the_total(cluster: None, tmp_path: Path) -> None:
    run(tmp_path, ["a", "unlucky", "b"])
    rows = [json.loads(line) for line in (tmp_path / PROGRESS).read_text().splitlines()]
    assert (rows[0]["done"], rows[0]["shards_total"]) == (0, 3)
    assert (rows[-1]["done"], rows[-1]["shards_done"], rows[-1]["retries"], rows[-1]["failed"]) == (3, 3, 2, 0)
    assert rows[-1]["eta_seconds"] == 0


def test_a_driver_that_fails_leaves_no_actor_behind(
    cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(self: Any, values: dict[str, Any]) -> None:
        if values["done"]:
            raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path))

    monkeypatch.setattr(ProgressFile, "__call__", full_disk)
    with pytest.raises(OSError, match="No space left") as caught:
        run(tmp_path, [f"s{i}" for i in range(40)], {"size": 2}, seconds=2.0)
    deadline = time.monotonic() + 300
    while ray.available_resources().get("CPU") != 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert ray.available_resources().get("CPU") == 2
    assert caught.tb  # whose frames are still alive here


def exported(until: str) -> str:
    """What Prometheus reads of this node, once it matches."""
    node = ray.nodes()[0]
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    deadline, text = time.monotonic() + 300, ""
    while not re.search(until, text) and time.monotonic() < deadline:
        time.sleep(0.5)
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=30) as response:
            text = response.read().decode()
    assert re.search(until, text), sorted(set(re.findall(r"ray_ifguide\w*", text)))
    return text


def test_ray_exports_the_progress_as_metrics(cluster: None, tmp_path: Path) -> None:
    run(tmp_path, ["a", "b"], seconds=1.0)
    text = exported(rf'ray_ifguide_shards_done\{{.*artifact="{tmp_path}".*\}} 2\.0')
    line = next(line for line in text.splitlines() if line.startswith("ray_ifguide_per_second_per_actor{"))
    assert 'stage="toy"' in line
    assert 'unit="shards"' in line


def test_the_names_that_ray_exports_are_those_of_the_table(cluster: None, tmp_path: Path) -> None:
    values = {gauge.name: i + 0.5 for i, gauge in enumerate(GAUGES)}
    with contextlib.closing(RayMetrics("pretrain", tmp_path)) as metrics:
        metrics({**values, "unit": "steps", "verb": "pretrain", "time": 1.0})
        last = GAUGES[-1]
        text = exported(rf'ray_ifguide_{last.name}\{{.*artifact="{tmp_path}".*\}} {values[last.name]}')
    families = {family.name: family for family in text_string_to_metric_families(text)}
    of_ours = {name for name in families if name.startswith(f"ray_{PREFIX}")}
    assert of_ours == {f"ray_{PREFIX}{gauge.name}" for gauge in GAUGES}
    for gauge in GAUGES:
        family = families[f"ray_{PREFIX}{gauge.name}"]
        (sample,) = (x for x in family.samples if x.labels.get("artifact") == str(tmp_path))
        assert (family.type, sample.value) == ("gauge", values[gauge.name])
        assert family.documentation == f"{gauge.help} ({gauge.unit})"
        assert {tag: sample.labels[tag] for tag in TAGS} == {
            "stage": "pretrain",
            "artifact": str(tmp_path),
            "unit": "steps",
        }


def test_shards_are_plotted_against_the_work_done(cluster: None, tmp_path: Path) -> None:
    run(tmp_path, ["a", "b"])
    plotted = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert {"done", "total", "per_second", "shards_done", "failed"} <= set(plotted.Tags()["scalars"])
    assert (plotted.Scalars("done")[-1].step, plotted.Scalars("done")[-1].value) == (2, 2.0)
