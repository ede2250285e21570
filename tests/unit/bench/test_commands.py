"""Every benchmark is a command: it imports, explains itself, and starts by its path and as a module."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[3] / "bench"
NAMES = sorted(path.stem for path in BENCH.glob("*.py") if path.stem != "__init__")


@pytest.mark.parametrize("name", NAMES)
def test_it_explains_itself(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", [f"bench/{name}.py", "--help"])
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(f"bench.{name}").main()
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith("usage: ")


@pytest.mark.parametrize("how", [("-m", "bench.demo"), (str(BENCH / "demo.py"),)])
def test_it_starts_by_its_path_and_as_a_module(how: tuple[str, ...], tmp_path: Path) -> None:
    run = subprocess.run([sys.executable, *how, "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "--seeds" in run.stdout


def test_none_of_them_changes_the_path_of_modules() -> None:
    assert not [path.name for path in BENCH.rglob("*.py") if "sys.path" in path.read_text(encoding="utf-8")]
