"""The command line and the job scripts are the same program."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml

from ifguide import cli, commands
from ifguide.cli import main
from ifguide.config import VERBS
from ifguide.config.packaged import packaged_configs
from ifguide.storage import machine_folder

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


def test_how_a_config_is_named_is_said_where_none_is(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["run", "mine.yaml"])
    assert "required: --config, as in `ifguide run --config mine.yaml`" in capsys.readouterr().err


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


def test_a_place_that_cannot_be_opened_is_said_with_its_reason(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["show", "nowhere://container/run"])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert "argument run_dir: nowhere://container/run: " in said
    assert "install ifguide[s3], or the fsspec package of nowhere://" in said


def test_show_of_a_folder_without_artifacts_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", str(tmp_path)]) == 1
    assert "holds no artifacts" in capsys.readouterr().err


def test_a_dry_run_of_checked_classifiers_says_what_it_would_compare(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("ifguide.evaluation.agreement.check_classifiers", lambda *_: pytest.fail("it compares them"))
    (tmp_path / "a.jsonl").write_text('{"text": "a", "toxic": true}\n{"text": "b", "toxic": false}\n')
    section = {"check_data": [f"{tmp_path}/a.jsonl"], "classifier": "alt-profanity-check"}
    section |= {"classifiers": {"further": "labels"}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"evaluate": section}))
    command = ["evaluate", "--check-classifier", "--dry-run", "--config", str(tmp_path / "config.yaml")]
    assert main(command) == 0
    said = capsys.readouterr()
    assert not said.out
    assert f"would compare alt-profanity-check, further with the labels of {tmp_path}/a.jsonl" in said.err


@pytest.mark.parametrize(
    ("verb", "given", "said"),
    [
        ("build_mask", ["build_mask.max_fraction=0.00002"], "up to 0.002% of the tokens"),
        (
            "fit_student",
            ["score_corpus.scorer=student", "fit_student.sample_fraction=0.000002"],
            "would score 0.0002% of",
        ),
    ],
)
def test_a_dry_run_tells_a_share_as_it_was_given(
    verb: str, given: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = [word for value in (f"run_dir={tmp_path}/run", *given) for word in ("--set", value)]
    assert main([verb, "--config", str(JOBS.parent / "configs" / "demo.yaml"), *overrides, "--dry-run"]) == 0
    assert said in capsys.readouterr().err


def test_demo_dry_run_shows_the_resolved_config(capsys: pytest.CaptureFixture[str]) -> None:
    config = JOBS.parent / "configs" / "demo.yaml"
    assert main(["demo", "--config", str(config), "--set", "run_dir=elsewhere", "--dry-run"]) == 0
    assert "elsewhere/data/corpus.jsonl" in capsys.readouterr().out


@pytest.mark.parametrize("more", [[], ["--data-only"], ["--dry-run"]])
def test_the_demo_refuses_a_run_directory_that_it_cannot_make_its_data_in(
    more: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("upath")
    monkeypatch.chdir(tmp_path)
    assert main(["demo", "--set", "run_dir=memory://runs/demo", *more]) == 1
    assert "run_dir: the demo makes its data on this machine, not in memory://" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments",
    [["fetch-data", "--out"], ["init", "--data", "a.jsonl", "--out"], ["export-scores", "runs/mine"]],
    ids=lambda arguments: arguments[0],
)
def test_what_is_made_on_this_machine_has_a_local_path(
    arguments: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main([*arguments, "s3://bucket/made"])
    assert "s3://bucket/made: it is made on this machine; name a local path" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_demos_data_lie_in_its_run_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    made: list[Path] = []
    monkeypatch.setattr("ifguide.demo.pipeline.generate_demo", lambda folder, seed: made.append(folder))
    assert main(["demo", "--set", "run_dir=~/runs/demo", "--data-only"]) == 0
    assert made == [tmp_path / "home" / "runs" / "demo" / "data"]


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


def test_copies_of_remote_files_are_listed_and_cleared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("IFGUIDE_CACHE", str(tmp_path / "cache"))
    copy = machine_folder() / "0a1b" / "corpus.jsonl"
    copy.parent.mkdir()
    copy.write_bytes(bytes(1_500_000))
    another = tmp_path / "cache" / "of-another-program" / "file"
    another.parent.mkdir()
    another.write_text("kept")
    entry, total = f"{copy.parent}: corpus.jsonl (1.5 MB)\n", f"{machine_folder()}: 1 in all, 1.5 MB\n"
    for words, shown in (([], entry), (["clear", "--dry-run"], f"would remove {entry}")):
        assert main(["cache", *words]) == 0
        assert capsys.readouterr().out == shown + total
        assert copy.exists()
    assert main(["cache", "clear"]) == 0
    assert capsys.readouterr().out == f"removed {entry}" + total
    assert not any(machine_folder().iterdir())
    assert another.read_text() == "kept"


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_completes_commands_flags_and_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "bash"]) == 0
    script = tmp_path / "completion"
    script.write_text(capsys.readouterr().out)
    (tmp_path / "mine.yaml").write_text("seed: 0\n")

    def completed(*words: str) -> list[str]:
        ask = f"COMP_WORDS=({' '.join(words)} ''); COMP_CWORD={len(words)}"
        lines = (f"source {script}", ask, "_shtab_ifguide", 'printf "%s\\n" "${COMPREPLY[@]}"')
        command = ["bash", "--norc", "-c", "; ".join(lines)]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout.split()

    assert {*VERBS, "run", "status", "cache"} <= set(completed("ifguide"))
    assert "clear" in completed("ifguide", "cache")
    assert "mine.yaml" in completed("ifguide", "run", "--config")


def test_a_section_cut_short_is_found_by_its_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--config", "tiny", "--set", "score.precision=float32"]) == 1
    assert "score.precision: unknown key; did you mean score_corpus.precision?" in capsys.readouterr().err
