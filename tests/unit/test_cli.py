"""The command line and the job scripts are the same program."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from ifguide import cli, commands
from ifguide.cli import main
from ifguide.config import VERBS
from ifguide.config.packaged import packaged_configs

JOBS = Path(__file__).parents[2] / "jobs"


def test_every_verb_has_a_job_script_a_stage_and_a_config_section() -> None:
    assert {path.stem for path in JOBS.glob("*.py")} == {*VERBS, "run", "compare", "analyse"}
    for verb in (*VERBS, "compare", "analyse"):
        assert f'main(["{verb}"' in (JOBS / f"{verb}.py").read_text()
        assert (JOBS.parent / "ifguide" / "stages" / f"{verb}.py").is_file()


def test_an_unknown_command_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["scor_corpus"])
    assert "score_corpus" in capsys.readouterr().err


def test_a_missing_config_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--config", "nowhere.yaml"]) == 1
    packaged = ", ".join(packaged_configs())
    line = f"ifguide run: config file nowhere.yaml does not exist; packaged are {packaged}\n"
    assert capsys.readouterr().err == line


def test_what_an_object_store_refuses_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    refused = type("NoCredentialsError", (Exception,), {"__module__": "botocore.exceptions"})

    def load(path: Path, overrides: list[str]) -> None:
        raise refused("Unable to locate credentials")

    monkeypatch.setattr(commands, "load_config", load)
    assert main(["run", "--config", "configs/tiny.yaml"]) == 1
    assert capsys.readouterr().err == "ifguide run: Unable to locate credentials\n"


def test_show_of_a_folder_without_artifacts_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", str(tmp_path)]) == 1
    assert "holds no artifacts" in capsys.readouterr().err


def test_demo_dry_run_shows_the_resolved_config(capsys: pytest.CaptureFixture[str]) -> None:
    config = JOBS.parent / "configs" / "demo.yaml"
    assert main(["demo", "--config", str(config), "--set", "run_dir=elsewhere", "--dry-run"]) == 0
    assert "elsewhere/data/corpus.jsonl" in capsys.readouterr().out


def test_the_version_is_that_of_the_package(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def shown() -> str:
        with pytest.raises(SystemExit) as ended:
            main(["--version"])
        assert ended.value.code == 0
        return capsys.readouterr().out

    assert shown() == f"ifguide {version('ifguide')}\n"
    monkeypatch.setattr(cli, "version", lambda name: version(f"no-{name}"))
    assert shown() == "ifguide not installed\n"


def test_a_reader_that_leaves_early_is_no_error() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "ifguide.cli", "config", "build_query"]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")
