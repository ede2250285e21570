"""Signals end a process once, at the right time, with all that it has started, and with the right exit code."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest

from ifguide.config import ConfigError
from ifguide.interrupts import handled

HEAD = """
import subprocess, sys, time
from ifguide import interrupts
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
"""
ENDS = """
except KeyboardInterrupt as error:
    print(error.kept, flush=True)
    interrupts.end_children()
    sys.exit(interrupts.exit_code())
"""
WAITS = f"""
try:
    with interrupts.handled():
        print(child.pid, flush=True)
        time.sleep(60)
{ENDS}"""
SAVES = f"""
try:
    with interrupts.handled(), interrupts.deferring():
        print(child.pid, flush=True)
        while not interrupts.requested():
            time.sleep(0.01)
        time.sleep(0.5)
        raise interrupts.interruption("step 7 is saved")
{ENDS}"""
STICKS = SAVES.replace("time.sleep(0.5)", "print('asked', flush=True); time.sleep(60)")
FORGETS = f"""
try:
    with interrupts.handled():
        with interrupts.deferring():
            print(child.pid, flush=True)
            while not interrupts.requested():
                time.sleep(0.01)
        print("went on")
{ENDS}"""
HANGS = """
interrupts.SECONDS = 0.5
with interrupts.handled(), interrupts.deferring():
    print(child.pid, flush=True)
    time.sleep(60)
    time.sleep(60)
"""


def run(script: str, *signals: signal.Signals) -> tuple[int, str, str, float, int]:
    """(exit code, output, errors, seconds from the first signal to the end, process id of what it started).

    The first signal is sent when the script is ready for it, another one when it says that the first has come."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", HEAD + script], text=True, **pipes)  # type: ignore[call-overload]
    child = int(process.stdout.readline())
    started = time.monotonic()
    for i, number in enumerate(signals):
        assert i == 0 or process.stdout.readline() == "asked\n"
        process.send_signal(number)
    output, errors = process.communicate(timeout=200)
    return process.returncode, output, errors, time.monotonic() - started, child


def is_running(pid: int, *, moment: float = 30.0) -> bool:
    """Whether it still is after a `moment`: SIGKILL is sent before the parent ends, and takes effect soon after."""
    end = time.monotonic() + moment
    while _is_there(pid):
        if time.monotonic() > end:
            return True
        time.sleep(0.01)
    return False


def _is_there(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as status:
            return status.read().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_what_waits_at_once(number: signal.Signals, code: int) -> None:
    found, output, _, seconds, child = run(WAITS, number)
    assert (found, output) == (code, "what was finished is kept\n")
    assert seconds < 15
    assert not is_running(child)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_what_asked_to_be_told_saves_first(number: signal.Signals, code: int) -> None:
    found, output, _, seconds, child = run(SAVES, number)
    assert (found, output) == (code, "step 7 is saved\n")
    assert 0.5 < seconds < 15
    assert not is_running(child)


def test_what_was_told_and_did_not_end_is_ended_behind_it() -> None:
    found, output, *_ = run(FORGETS, signal.SIGTERM)
    assert (found, output) == (143, "what was finished is kept\n")


def test_what_does_not_end_in_time_is_killed_with_all_that_it_started() -> None:
    found, _, errors, seconds, child = run(HANGS, signal.SIGTERM)
    assert found == 143
    assert "ended before all was saved" in errors
    assert seconds < 15
    assert not is_running(child)


def test_a_second_signal_waits_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IFGUIDE_GRACE_SECONDS", "100")
    found, output, _, seconds, child = run(STICKS, signal.SIGINT, signal.SIGINT)
    assert (found, output) == (130, "")
    assert seconds < 15
    assert not is_running(child)


def test_the_time_to_save_in_can_be_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IFGUIDE_GRACE_SECONDS", "6")
    found, _, _, seconds, _ = run(HANGS, signal.SIGTERM)
    assert found == 143
    assert 5.5 < seconds < 15


@pytest.mark.parametrize("text", ["soon", "", "nan", "inf", "-1", "4.9"])
def test_a_time_to_save_in_that_is_none_is_said_at_the_start(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IFGUIDE_GRACE_SECONDS", text)
    with pytest.raises(ConfigError, match=r"IFGUIDE_GRACE_SECONDS = .*: give a number of seconds from 5 on"), handled():
        pass
