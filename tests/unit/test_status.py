"""ifguide.status: how far a run is, from files alone, also when its driver is gone in the middle of a line."""

import contextlib
import json
import os
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest

from ifguide import commands
from ifguide.artifacts import hold, open_artifact
from ifguide.cli import main
from ifguide.distributed.ledger import LEDGER, Attempts
from ifguide.folders import FOLDERS
from ifguide.run import Run
from ifguide.status import run_status
from ifguide.telemetry import METRICS, PROGRESS, Progress, ProgressFile
from ifguide.training.choices import Choices, Compiled


def begin(folder: Path):
    return open_artifact(folder, verb="score_corpus", options={}, inputs={}, config_yaml="")


def line_of(run_dir: Path, name: str) -> str:
    return next(line for line in run_status(run_dir, FOLDERS).lines() if line.startswith(name))


def test_the_folders_are_those_of_a_run(tmp_path):
    from ifguide.config import Config

    assert tuple(Run(config=Config(run_dir=str(tmp_path))).artifact_folders()) == FOLDERS


def test_complete_in_progress_and_not_begun_are_told_apart(tmp_path):
    begin(tmp_path / "corpus").finish([], rows={"blocks": 1234}, summary={})
    begin(tmp_path / "query")
    progress = Progress("score_corpus", 1000, "tokens", sinks=(ProgressFile(begin(tmp_path / "scores").folder),))
    progress.started -= 10
    progress.done = 400
    progress.publish(shards_done=4, shards_total=10, per_second_per_actor=20.0, retries=1, failed=0)
    assert line_of(tmp_path, "corpus").split(maxsplit=1)[1].startswith("complete     1,234 blocks")
    assert "in progress  begun 0s ago" in line_of(tmp_path, "query")
    assert "in progress  4/10 shards, 400/1,000 tokens (40%), 40 tokens/s, 20 tokens/s per actor, ETA 1" in line_of(
        tmp_path, "scores"
    )
    assert "1 retries; last news 0s ago" in line_of(tmp_path, "scores")
    assert line_of(tmp_path, "mask").endswith("not begun")


def test_failed_shards_are_named_with_their_reason_and_retried_ones_counted(tmp_path):
    folder = begin(tmp_path / "scores").folder
    ProgressFile(folder)({"verb": "v", "unit": "shards", "done": 0, "total": 3, "per_second": 0, "eta_seconds": None})
    lost, again = Attempts(folder / LEDGER, "shard-1"), Attempts(folder / LEDGER, "shard-2")
    lost.begin()
    lost.give_up("no space left")
    again.begin()
    again.begin()
    assert "1 failed" in line_of(tmp_path, "scores")
    assert "1 shards are being tried again" in line_of(tmp_path, "scores")
    assert any(line.strip() == "failed shard-1: no space left" for line in run_status(tmp_path, FOLDERS).lines())


@pytest.mark.parametrize(("newest", "unit"), [("counts", "counted"), ("tokens", "tokenised"), ("", "packed")])
def test_of_a_stage_of_several_passes_the_newest_one_is_shown(tmp_path, newest, unit):
    corpus = begin(tmp_path / "corpus").folder
    for name, passed in (("counts", "counted"), ("tokens", "tokenised"), ("", "packed")):
        folder = corpus / name
        folder.mkdir(exist_ok=True)
        values = {"verb": "v", "unit": passed, "done": 1, "total": 4, "per_second": 1.0, "eta_seconds": 3.0}
        (folder / PROGRESS).write_text(json.dumps({"time": time.time() - 60 * (name != newest), **values}) + "\n")
        lost = Attempts(folder / LEDGER, f"chunk-{passed}")
        lost.begin()
        lost.give_up("no space left")
    assert f"1/4 {unit} (25%)" in line_of(tmp_path, "corpus")
    (stage,) = [stage for stage in run_status(tmp_path, FOLDERS).stages if stage.name == "corpus"]
    assert stage.failures == (f"chunk-{unit}: no space left",)


def test_a_progress_line_cut_short_is_passed_over_and_old_news_are_called_old(tmp_path):
    folder = begin(tmp_path / "scores").folder
    values = {"verb": "v", "unit": "shards", "done": 1, "total": 4, "per_second": 1.0, "eta_seconds": 3.0}
    (folder / PROGRESS).write_text(json.dumps({"time": time.time() - 7300, **values}) + '\n{"time": 17')
    assert "1/4 shards (25%), 1 shards/s, ETA 3s; last news 2h01m ago" in line_of(tmp_path, "scores")


def test_a_training_says_step_loss_rate_and_eta(tmp_path):
    folder = begin(tmp_path / "model" / "penalised").folder
    row = {"step": 40, "loss": 6.5, "tokens_per_second": 3604.2, "mfu": None, "steps": 200, "eta_seconds": 75.0}
    (folder / METRICS).write_text(json.dumps({**row, "step": 20}) + "\n" + json.dumps(row) + '\n{"step": 6')
    expected = "in progress  step 40/200 (20%), loss 6.5000, 3,604 tokens/s, ETA 1m15s; last news 0s ago"
    assert line_of(tmp_path, "model/penalised").split(maxsplit=1)[1] == expected
    choices = Choices(layers=Compiled(True, "long"), loss=Compiled(False, "short"), attention="sdpa")
    choices.write(folder)
    said = "layers compiled (long), loss not compiled (short), attention by sdpa"
    assert line_of(tmp_path, "model/penalised").split(maxsplit=1)[1] == f"{expected}; {said}"
    (folder / METRICS).write_text('{"step"')
    assert "in progress  begun 0s ago" in line_of(tmp_path, "model/penalised")


def test_a_training_of_a_comparison_says_step_and_loss(tmp_path):
    progress = Progress("compare", 0, "steps", sinks=(ProgressFile(begin(tmp_path / "compare/x/model/dpo").folder),))
    progress.begin(40, already=4)
    progress.started -= 4
    progress.done = 12
    progress.publish(loss=0.6931)
    expected = "in progress  12/40 steps (30%), loss 0.6931, 2 steps/s, ETA 14s; last news 0s ago"
    assert line_of(tmp_path, "compare/x/model/dpo").split(maxsplit=1)[1] == expected


def test_a_comparison_and_further_artifacts_are_shown_once_they_are_begun(tmp_path):
    names = [stage.name for stage in run_status(tmp_path, FOLDERS).stages]
    assert names == [*FOLDERS]
    begin(tmp_path / "compare" / "random" / "model" / "penalised")
    begin(tmp_path / "compare" / "random" / "mask").finish([], rows={"blocks": 2}, summary={})
    begin(tmp_path / "target" / "corpus")
    names = [stage.name for stage in run_status(tmp_path, FOLDERS).stages]
    assert names == [*FOLDERS, "compare/random/mask", "compare/random/model/penalised", "target/corpus"]


def test_a_report_under_another_name_is_shown(tmp_path):
    begin(tmp_path / "report-words").finish([], rows={"models": 2}, summary={})
    (tmp_path / "notes").mkdir()
    names = [stage.name for stage in run_status(tmp_path, FOLDERS).stages]
    assert names == [*FOLDERS, "report-words"]
    assert "complete     2 models" in line_of(tmp_path, "report-words")


def test_json_says_what_the_lines_say(tmp_path, capsys):
    begin(tmp_path / "corpus").finish([], rows={"blocks": 3}, summary={})
    progress = Progress("score_corpus", 1000, "tokens", sinks=(ProgressFile(begin(tmp_path / "scores").folder),))
    progress.done = 400
    progress.publish()
    assert main(["status", str(tmp_path), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    stages = {stage["name"]: stage for stage in said["stages"]}
    assert (said["holder"], said["holder_has_ended"]) == (None, False)
    assert (stages["corpus"]["state"], stages["corpus"]["progress"]) == ("complete", {"blocks": 3})
    assert stages["scores"]["progress"]["done"] == 400
    assert stages["scores"]["progress"]["seconds_ago"] < 60
    assert stages["mask"] == {"name": "mask", "state": "not begun", "text": "", "progress": {}, "failures": []}


def test_it_is_watched_for_as_long_as_somebody_works(tmp_path, capsys, monkeypatch):
    begin(tmp_path / "corpus").finish([], rows={"blocks": 3}, summary={})
    held = contextlib.ExitStack()
    held.enter_context(hold(tmp_path, "run"))
    pauses: list[float] = []

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 2:
            held.close()

    monkeypatch.setattr(commands, "time", types.SimpleNamespace(sleep=pause))
    assert main(["status", str(tmp_path), "--watch", "0.1"]) == 0
    assert pauses == [0.1, 0.1]
    said = capsys.readouterr().out
    assert said.count("in use by `ifguide run`") == 2
    assert said.count("complete     3 blocks") == said.count("in use by") + 1


def test_a_directory_that_is_not_there_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        run_status(tmp_path / "nowhere", FOLDERS)


def test_status_does_not_load_ray(tmp_path):
    code = "import sys; from ifguide.cli import main; main(['status', sys.argv[1]]); assert 'ray' not in sys.modules"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, env=environment, stdout=subprocess.DEVNULL)
