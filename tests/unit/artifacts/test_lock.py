"""ifguide.artifacts.lock: one driver works in a run directory, and one that is gone keeps nobody out."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import pytest

from ifguide.artifacts import HeldError, hold, lock, read_holder, write_json
from ifguide.artifacts.lock import LOCK, Holder
from ifguide.cli import main
from ifguide.config import VERBS
from ifguide.storage import file_sizes, location
from tests.s3_server import s3_server

CONFIG = "run_dir: {}\ntokenizer: t\npack_corpus: {{inputs: [a]}}\n"
HOLDING = """
import sys, time
from ifguide.artifacts import hold
from ifguide.storage import location

with hold(location(sys.argv[1]), "score_corpus"):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    for name, seconds in (("BEAT_SECONDS", 0.1), ("STALE_SECONDS", 0.6), ("SETTLE_SECONDS", 0.05)):
        monkeypatch.setattr(lock, name, seconds)


def another_driver(folder: Path | str) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    driver = subprocess.Popen(
        [sys.executable, "-c", HOLDING, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
    )
    assert driver.stdout is not None
    assert driver.stdout.readline() == b"held\n"
    return driver


def elsewhere(folder: Path, **changes) -> Holder:
    """The record of a driver on another machine."""
    holder = Holder(
        token="t", command="run", user="ada", host="far", machine="m", pid=1, started="9", since="2026-01-02T03:04:05Z"
    )
    holder = dataclasses.replace(holder, **changes)
    write_json(folder / LOCK, dataclasses.asdict(holder))
    return holder


@pytest.fixture
def config(tmp_path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG.format(tmp_path / "run"))
    return path


def assert_refused(arguments: list[str], folder: str, driver: subprocess.Popen, capsys) -> None:
    checked = arguments[0] not in ("demo", "import-mask")  # first of all; this config would not pass
    assert main([*arguments, *(["--no-preflight"] if checked else [])]) == 1
    said = capsys.readouterr().err
    for text in (f"{folder} is in use by `ifguide score_corpus` of", " on ", f"(process {driver.pid}, since 2"):
        assert text in said


def test_of_two_drivers_one_works_and_the_other_says_who_where_and_since_when(tmp_path, config, capsys):
    driver = another_driver(tmp_path / "run")
    for command in (*VERBS, "run", "compare", "analyse", "demo"):
        assert_refused([command, "--config", str(config)], f"{tmp_path}/run", driver, capsys)
    assert_refused(["import-mask", "--config", str(config), "mask.pt"], f"{tmp_path}/run", driver, capsys)
    driver.communicate(b"")
    assert driver.returncode == 0
    assert not (tmp_path / "run").exists()  # nothing was made, so nothing is left


def test_of_two_drivers_of_a_store_one_works_until_it_is_gone(tmp_path, config, capsys):
    pytest.importorskip("moto.server")
    pytest.importorskip("s3fs")
    with s3_server(tmp_path):
        driver = another_driver("s3://lake/run")
        config.write_text(CONFIG.format("s3://lake/run"))
        assert_refused(["score_corpus", "--config", str(config)], "s3://lake/run", driver, capsys)
        driver.kill()
        driver.wait()
        folder = location("s3://lake/run")
        with hold(folder, "run"):
            assert read_holder(folder).pid == os.getpid()
        assert read_holder(folder) is None
        elsewhere(folder)
        with hold(folder, "run"):
            assert read_holder(folder).host != "far"


def test_what_only_reads_needs_no_lock(tmp_path, config, capsys):
    run = tmp_path / "run"
    driver = another_driver(run)
    assert main(["status", str(run)]) == 0
    first, *stages = capsys.readouterr().out.splitlines()
    assert first.startswith("in use by `ifguide score_corpus` of")
    assert all(line.endswith("not begun") for line in stages)
    (run / "scores").mkdir()
    (run / "scores" / "plan.json").write_text("{}")
    for command in ("show", "inspect"):
        main([command, str(run)])
        assert "in use" not in capsys.readouterr().err
    assert main(["run", "--config", str(config), "--dry-run"]) in (0, 1)
    assert "in use" not in capsys.readouterr().err
    driver.kill()
    driver.wait()
    assert main(["status", str(run)]) == 0
    assert capsys.readouterr().out.startswith(f"left by {read_holder(run)}, which has ended\n")


def test_trainings_of_two_world_sizes_do_not_mix_files_in_one_part_folder(tmp_path, config, capsys):
    part = tmp_path / "run" / "model" / "penalised" / "checkpoints" / "step-00000004.part"
    part.mkdir(parents=True)
    (part / "zero_pp_rank_0_mp_rank_00_optim_states.pt").write_bytes(b"of two ranks")
    driver, before = another_driver(tmp_path / "run"), file_sizes(tmp_path / "run" / "model")
    for workers in (1, 4):
        override = ["--set", f"pretrain.workers={workers}"]
        assert_refused(["pretrain", "--config", str(config), *override], f"{tmp_path}/run", driver, capsys)
    assert file_sizes(tmp_path / "run" / "model") == before
    driver.communicate(b"")


def test_a_driver_that_was_killed_keeps_nobody_out(tmp_path, monkeypatch):
    for name in ("BEAT_SECONDS", "STALE_SECONDS"):
        monkeypatch.setattr(lock, name, 600)
    driver = another_driver(tmp_path)
    driver.kill()
    while lock._start_of(driver.pid) is not None:  # until the system has buried it; its parent has not asked yet
        time.sleep(0.01)
    started = time.monotonic()
    with hold(tmp_path, "run"):
        assert time.monotonic() - started < 60
        assert read_holder(tmp_path).pid == os.getpid()
    assert read_holder(tmp_path) is None
    driver.wait()


def test_a_later_process_of_the_same_number_is_another(tmp_path):
    write_json(tmp_path / LOCK, dataclasses.asdict(elsewhere(tmp_path, machine=lock._machine(), pid=os.getpid())))
    with hold(tmp_path, "run"):
        assert read_holder(tmp_path).started != "9"


@pytest.mark.parametrize("remote", [False, True])
def test_a_driver_elsewhere_is_believed_while_it_beats_and_replaced_when_it_stands_still(
    tmp_path, store, remote, monkeypatch
):
    folder, ended = store if remote else tmp_path, threading.Event()
    holder = elsewhere(folder)

    def beat() -> None:
        number = 0
        while not ended.wait(0.1):
            number += 1
            elsewhere(folder, beat=number)

    thread = threading.Thread(target=beat)
    thread.start()
    quick_one = lock.STALE_SECONDS
    monkeypatch.setattr(lock, "STALE_SECONDS", 600)
    with pytest.raises(
        HeldError, match=r"in use by `ifguide run` of ada on far \(process 1, since 2026-01-02T03:04:05Z"
    ):
        hold(folder, "run").__enter__()
    ended.set()
    thread.join()
    monkeypatch.setattr(lock, "STALE_SECONDS", quick_one)
    with hold(folder, "run"):
        before = read_holder(folder)
        assert before.token != holder.token
        while (now := read_holder(folder)) is None or now.beat == before.beat:
            time.sleep(0.01)
        assert (now.token, now.beat > before.beat) == (before.token, True)
    assert read_holder(folder) is None


@pytest.mark.parametrize("module", ["builtins", "botocore.exceptions"])
def test_a_holder_beats_on_after_its_store_was_away_for_a_moment(tmp_path, monkeypatch, module):
    """Whatever the store's client raises then."""
    error = OSError if module == "builtins" else type("ConnectTimeoutError", (Exception,), {"__module__": module})
    away = iter([True] * 3)

    def write(path: Path, content: dict) -> None:
        if next(away, False):
            raise error
        write_json(path, content)

    monkeypatch.setattr(lock, "write_json", write)
    with hold(tmp_path, "run"):
        beating = [thread for thread in threading.enumerate() if "_beat" in thread.name]
        while (now := read_holder(tmp_path)) is None or not now.beat:
            assert all(thread.is_alive() for thread in beating)
            time.sleep(0.01)
    assert len(beating) == 1
    assert next(away, None) is None


def test_a_record_that_is_not_whole_keeps_nobody_out(tmp_path):
    (tmp_path / LOCK).write_text('{"token"')
    with hold(tmp_path, "run"):
        assert read_holder(tmp_path).pid == os.getpid()


def test_a_holder_that_was_replaced_ends_and_leaves_the_others_record(tmp_path):
    def work() -> None:
        with hold(tmp_path, "run"):
            elsewhere(tmp_path)
            time.sleep(300)

    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        work()
    assert time.monotonic() - started < 100
    assert read_holder(tmp_path).host == "far"


def test_a_process_holds_a_folder_as_often_as_it_wants_until_the_last_ends(tmp_path):
    with hold(tmp_path, "compare"):
        with hold(tmp_path, "run"):
            pass
        assert json.loads((tmp_path / LOCK).read_text())["command"] == "compare"
    assert not (tmp_path / LOCK).exists()


@pytest.mark.parametrize("remote", [False, True])
def test_of_many_that_start_at_once_one_holds(tmp_path, store, remote, monkeypatch):
    path, at_once = (store if remote else tmp_path) / LOCK, threading.Barrier(8)
    elsewhere(path.parent)  # left by one that is gone: all of them take over
    outcomes: list[str] = []
    came: set[int] = set()  # the threads that have written their record, or were refused

    def sleep(seconds: float) -> None:
        """Which of them wrote last is settled once all have come, however long that takes."""
        time.sleep(seconds)
        if seconds == lock.SETTLE_SECONDS:
            came.add(threading.get_ident())
            while len(came) < 8:
                time.sleep(0.01)

    monkeypatch.setattr(lock, "time", types.SimpleNamespace(**{**vars(time), "sleep": sleep}))

    def acquire() -> None:
        at_once.wait()
        try:
            outcomes.append(lock._acquire(path, "run").token)
        except HeldError:
            outcomes.append("refused")
            came.add(threading.get_ident())

    threads = [threading.Thread(target=acquire) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes.count("refused") == 7
    assert [outcome for outcome in outcomes if outcome != "refused"] == [read_holder(path.parent).token]


def test_an_interrupt_gives_the_folder_back(tmp_path):
    driver = another_driver(tmp_path)
    driver.send_signal(signal.SIGINT)
    driver.wait()
    assert read_holder(tmp_path) is None
