"""The load bench: every case works at a small size, and growth is what twice the input takes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import load
from bench.load import CASES


@pytest.mark.parametrize("name", CASES)
def test_every_case_works_at_a_small_size(name: str, tmp_path: Path) -> None:
    measured = load.measure(name, CASES[name].small, tmp_path)
    assert measured["seconds"] > 0
    assert measured["peak_mb"] > measured["rise_mb"] >= 0
    assert not list(tmp_path.iterdir())


def test_growth_is_of_the_whole_over_its_half(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def quadratic(name: str, size: int, folder: Path) -> dict[str, float]:
        return {"seconds": 1.0, "cpu_seconds": size**2 / 1e4, "peak_mb": 500.0 + size / 1e3, "rise_mb": size / 1e3}

    monkeypatch.setattr(load, "_in_a_process", quadratic)
    monkeypatch.setattr("sys.argv", ["load.py", "--cases", "shards", "word_list", "--folder", str(tmp_path)])
    load.main()
    results = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(results) == ["shards", "word_list"]
    assert results["shards"]["growth"] == {"seconds": 4.0, "memory": 2.0}
    assert results["shards"]["size"] == CASES["shards"].size
    assert results["shards"]["peak_mb"] == 600.0
