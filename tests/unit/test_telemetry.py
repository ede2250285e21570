"""ifguide.telemetry: honest rates, few lines, and metrics that survive a resumed run."""

import io
import json
import logging
import sys
import time

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer.record_writer import RecordWriter

from ifguide import telemetry
from ifguide.telemetry import MetricsLog, Progress, TensorBoard, configure_logging, format_seconds, read_metrics


@pytest.fixture
def shown(monkeypatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr(telemetry, "log", lambda verb, text, **_: lines.append(f"{verb}: {text}"))
    return lines


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(telemetry.time, "monotonic", lambda: now[0])
    return now


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (59.9, "59s"), (60, "1m00s"), (75, "1m15s"), (3599, "59m59s"), (3660, "1h01m"), (1e6, "277h46m")],
)
def test_seconds_are_written_for_people(seconds, text):
    assert format_seconds(seconds) == text


def test_unknown_time_is_a_question_mark():
    assert format_seconds(float("inf")) == "?"
    assert "ETA ?" in Progress("v", 10, "shards").line(5.0)


def test_rate_and_eta_leave_out_the_work_of_an_earlier_run(shown):
    progress = Progress("v", 1000, "tokens", already=600)
    assert shown == ["v: resuming: 600 of 1,000 tokens already done"]
    progress.advance(100)
    assert progress.line(10.0) == "700/1,000 tokens (70%), 10 tokens/s, ETA 30s"


def test_slow_units_are_shown_by_the_seconds_each_takes():
    progress = Progress("v", 4, "shards", every_seconds=1e9)
    progress.advance(2)
    assert progress.line(120.0) == "2/4 shards (50%), 60 s each, ETA 2m00s"


def test_lines_are_throttled_but_the_end_is_always_shown(shown, clock):
    progress = Progress("v", 10, "shards", every_seconds=5)
    for _ in range(9):
        clock[0] += 1
        progress.advance(1)
    assert [line.split()[1] for line in shown] == ["5/10"]
    progress.advance(1, retries=2)
    assert shown[1].startswith("v: 10/10 shards (100%)")
    assert shown[1].endswith("ETA 0s, 2 retries")


def test_the_end_of_short_work_may_pass_without_a_line(shown, clock):
    progress = Progress("v", 2, "tasks", says_end=False)
    progress.advance(2)
    assert shown == []
    clock[0] += 5
    progress.advance(0)
    assert len(shown) == 1


def test_no_work_at_all_is_complete():
    assert "0/0 shards (100%)" in Progress("v", 0, "shards").line(1.0)


def test_work_that_is_known_only_when_it_begins_is_begun_then(shown, clock):
    seen = []
    progress = Progress("v", 0, "steps", sinks=(seen.append,))
    clock[0] += 50
    progress.begin(20, already=12)
    clock[0] += 4
    progress.advance(4, loss=0.5)
    clock[0] += 4
    progress.advance(4, loss=0.25)
    assert shown == [
        "v: resuming: 12 of 20 steps already done",
        "v: 20/20 steps (100%), loss 0.2500, 1 steps/s, ETA 0s",
    ]
    assert [(values["done"], values["total"], values.get("loss")) for values in seen] == [
        (12, 20, None),
        (20, 20, 0.25),
    ]


def test_a_piece_that_takes_long_is_said_to_be_at_work(shown):
    progress = Progress("v", 2, "parts")
    with progress.never_silent(every_seconds=0.02):
        deadline = time.monotonic() + 300
        while len(shown) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
    said = len(shown)
    assert said >= 2
    assert all(line.startswith("v: 0/2 parts, at work for ") for line in shown)
    time.sleep(0.1)
    assert len(shown) == said


def test_progress_is_plotted_by_the_names_of_the_table_against_the_work_done(tmp_path):
    sink = TensorBoard(tmp_path)
    progress = Progress("v", 8, "steps", sinks=(sink,))
    for _ in range(2):
        progress.done += 4
        progress.publish(loss=0.5, other=1.0)
    sink.close()
    plotted = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert set(plotted.Tags()["scalars"]) == {"done", "total", "per_second", "eta_seconds", "loss"}
    assert [(event.step, event.value) for event in plotted.Scalars("done")] == [(4, 4.0), (8, 8.0)]


def test_a_plot_that_the_disk_refuses_is_an_error_that_names_the_file(tmp_path):
    sink = TensorBoard(tmp_path)
    with open("/dev/full", "wb", buffering=0) as full:
        sink.records = RecordWriter(full)
        with pytest.raises(OSError, match=r"writing failed: No space left on device: '.*events\.out"):
            sink.write(1, {"loss": 1.0})
    sink.close()


def test_what_is_plotted_for_a_remote_folder_is_uploaded(store, tmp_path, monkeypatch):
    monkeypatch.setenv("IFGUIDE_CACHE", str(tmp_path))
    sink = TensorBoard(store)
    sink({"done": 2, "total": 4})
    sink.close()
    (events,) = (store / "tensorboard").iterdir()
    assert events.stat().st_size > 0
    assert not list(tmp_path.rglob("events.*"))


def test_logging_is_set_up_once_and_lines_carry_the_verb(monkeypatch):
    logger = logging.getLogger(telemetry.ROOT)
    monkeypatch.setattr(logger, "handlers", [])
    monkeypatch.setattr(logger, "propagate", True)
    monkeypatch.setattr(logger, "level", logging.NOTSET)
    configure_logging()
    configure_logging(logging.WARNING)
    assert len(logger.handlers) == 1
    assert logger.level == logging.WARNING
    monkeypatch.setattr(sys, "stderr", io.StringIO())  # replaced later, as a notebook does
    telemetry.log("evaluate", "quiet")
    telemetry.log("evaluate", "100% loud", level=logging.WARNING)
    (line,) = sys.stderr.getvalue().splitlines()
    assert line.endswith("evaluate     | 100% loud")


def test_of_a_step_written_twice_the_last_counts_and_steps_are_ordered(tmp_path):
    path = tmp_path / "deep" / "metrics.jsonl"
    for steps, loss in (((0, 10, 20), 1.0), ((10, 20, 30), 2.0)):  # killed after 20, resumed from 10
        metrics = MetricsLog(path)
        for step in steps:
            metrics.write(step, {"loss": loss, "masked": None})
        metrics.close()
    rows = read_metrics(path)
    assert [(row["step"], row["loss"]) for row in rows] == [(0, 1.0), (10, 2.0), (20, 2.0), (30, 2.0)]
    assert all(row["masked"] is None for row in rows)


def test_each_row_is_on_disk_when_written_and_numbers_are_plotted(tmp_path):
    path = tmp_path / "metrics.jsonl"
    metrics = MetricsLog(path)
    metrics.write(3, {"loss": 0.5, "masked": None})
    assert json.loads(path.read_text()) == {"step": 3, "loss": 0.5, "masked": None}
    metrics.close()
    plotted = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert plotted.Tags()["scalars"] == ["loss"]
    assert [(event.step, event.value) for event in plotted.Scalars("loss")] == [(3, 0.5)]


def test_no_metrics_yet_is_no_rows(tmp_path):
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_wandb_is_asked_for_by_name_and_a_resumed_run_goes_on_in_it(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="W&B is optional")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    path = tmp_path / "model" / "penalised" / "metrics.jsonl"
    ids = []
    for step in (1, 2):
        log = MetricsLog(path, wandb={"project": "p", "entity": None, "name": "n"}, config={"seed": step})
        assert wandb.run is log.wandb
        log.write(step, {"loss_benign": 1.5, "loss_masked": None})
        ids.append(log.wandb.id)
        log.close()
        assert [*path.parent.rglob(f"run-{ids[-1]}.wandb")]
        assert wandb.run is None
    assert ids[0] == ids[1]


def test_wandb_that_is_not_installed_is_an_error_that_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"pretrain\.wandb: .*pip install wandb"):
        MetricsLog(tmp_path / "metrics.jsonl", wandb={"project": "p"})


def test_a_line_that_a_crash_tore_is_passed_over_and_cut_off_before_more_is_written(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 3.0}\n{"step": 2, "lo')
    assert read_metrics(path) == [{"step": 1, "loss": 3.0}]
    log = MetricsLog(path)
    log.write(2, {"loss": 2.0})
    log.close()
    assert read_metrics(path) == [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}]


@pytest.mark.parametrize("damage", [b"null", b"[1]", b"{}", b'{"step": null}', b'{"step": 1, "lo', b"\xff\xfe"])
def test_a_damaged_row_is_named_by_file_and_line(tmp_path, damage):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "loss": 3.0}\n' + damage + b"\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2: not the row of a step"):
        read_metrics(path)
