"""The bench of a training step at toy size, but for the compiled loop, which compiles for most of a minute."""

from __future__ import annotations

import json
import sys

import pytest

from bench import training_step


def test_it_ends_in_one_line_with_every_figure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    off = ["--set", "acceleration.compiled_layers=false", "--set", "acceleration.compiled_loss=false"]
    command = ["bench/training_step.py", "--small", "--threads", "1", "--sides", "mask", "plain", "before", "trainer"]
    monkeypatch.setattr(sys, "argv", [*command, *off])
    training_step.main()
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert all(figures[name] > 0 for name in ("trainer_time_ratio", "mask_time_ratio", "memory_ratio"))
    assert figures["compiled_loop_ratio"] is None
    assert figures["syncs_per_step"] == 0
    assert 0 < figures["launches_per_step"] < figures["launches_before"]


def test_the_model_is_small_only_when_it_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    for options, hidden in (([], 512), (["--small"], 32)):
        monkeypatch.setattr(sys, "argv", ["bench/training_step.py", *options])
        assert training_step.sizes_of(training_step._options()).fields["hidden_size"] == hidden
