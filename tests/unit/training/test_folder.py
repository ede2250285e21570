"""Where a training works: with an object store, machines that share no disk hand checkpoints over through it."""

from __future__ import annotations

import errno
import json
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ifguide import storage
from ifguide.storage import file_sizes, subfolders
from ifguide.training import folder as training_folder
from ifguide.training.checkpoints import STATE, Checkpoint, describe_checkpoint, last_checkpoint, published_checkpoints
from ifguide.training.folder import METRICS, STOP, TrainingFolder

pytest.importorskip("upath")
THREAD = threading.local()


@pytest.fixture
def on_machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Runs `work(place, rank)` as two ranks, each with a disk of its own."""
    monkeypatch.setattr(storage, "machine_folder", lambda: THREAD.machine)
    one_reads = threading.Lock()  # a file in memory is one object with one position, for all who read it

    def download(folder: Path, target: Path) -> None:
        with one_reads:
            storage.download_folder(folder, target)

    monkeypatch.setattr(training_folder, "download_folder", download)

    def run(folder: Path, work: Callable[[TrainingFolder, int], None]) -> None:
        barrier, errors = threading.Barrier(2, timeout=300), []

        def rank(number: int) -> None:
            THREAD.machine = tmp_path / f"machine{number}"
            THREAD.machine.mkdir(exist_ok=True)
            try:
                place = TrainingFolder(
                    folder, rank=number, local_rank=0, world_size=2, barrier=lambda: barrier.wait() and None
                )
                work(place, number)
            except BaseException as error:
                errors.append(error)
                barrier.abort()

        threads = [threading.Thread(target=rank, args=(number,)) for number in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]

    return run


def save(place: TrainingFolder, rank: int, step: int, **more: Any) -> None:
    """Every rank's own file of a step, published."""
    with place.writing_checkpoint(step) as part:
        (part / STATE).mkdir(exist_ok=True)
        (part / STATE / f"rank{rank}").write_text(f"{rank} at {step}")
        made = Checkpoint(folder=part, step=step, engine="deepspeed", world_size=2, **more)
        place.publish_checkpoint(part, describe_checkpoint(made))


def test_a_checkpoint_holds_what_every_machine_wrote_and_is_fetched_whole(
    store: Path, on_machines: Callable[..., None]
) -> None:
    def train(place: TrainingFolder, rank: int) -> None:
        save(place, rank, 4)
        (found,) = published_checkpoints(store)
        fetched = place.fetch_for_all(found)
        assert fetched is not None
        assert not list(place.local.glob("checkpoints/*.part"))
        assert fetched.folder.is_relative_to(THREAD.machine)
        assert [(fetched.state / f"rank{other}").read_text() for other in (0, 1)] == ["0 at 4", "1 at 4"]
        place.close()
        assert not place.local.exists()

    on_machines(store, train)
    assert set(file_sizes(store / "checkpoints")) == {
        "step-00000004/checkpoint.json",
        "step-00000004/state/rank0",
        "step-00000004/state/rank1",
    }


def test_all_ranks_of_a_machine_list_the_files_before_any_leaves_its_digests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slow rank would else see files of another come and go."""
    listed: list[list[str]] = []

    def slowly(folder: Path) -> dict[str, int]:
        time.sleep(0.2 * THREAD.rank)
        listed.append(sorted(file_sizes(folder)))
        return file_sizes(folder)

    monkeypatch.setattr(training_folder, "file_sizes", slowly)
    barrier = threading.Barrier(2, timeout=300)

    def rank(number: int) -> None:
        THREAD.rank = number
        options = {"rank": number, "local_rank": number, "world_size": 2}
        save(TrainingFolder(tmp_path, **options, barrier=lambda: barrier.wait() and None), number, 4)

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert listed[:2] == [["state/rank0", "state/rank1"]] * 2
    (found,) = published_checkpoints(tmp_path)
    assert sorted(found.files) == listed[0]


def test_what_was_uploaded_and_never_described_is_passed_over_and_replaced(
    store: Path, on_machines: Callable[..., None]
) -> None:
    (store / "checkpoints" / "step-00000004" / STATE / "rank7").write_text("of eight ranks that were killed")
    assert last_checkpoint(store) is None
    on_machines(store, lambda place, rank: save(place, rank, 4))
    found = last_checkpoint(store)
    assert found is not None
    assert sorted(file_sizes(found.state)) == ["rank0", "rank1"]
    (found.state / "rank1").write_text("cut")
    assert last_checkpoint(store) is None


def test_the_last_and_the_best_stay_in_the_store(store: Path, on_machines: Callable[..., None]) -> None:
    def train(place: TrainingFolder, rank: int) -> None:
        for step, heldout in ((2, 1.0), (4, 3.0), (6, 2.0)):
            save(place, rank, step, heldout=heldout)
        place.remove_checkpoints(keep_last=1, keep_best=1)

    on_machines(store, train)
    assert [path.name for path in subfolders(store / "checkpoints")] == ["step-00000002", "step-00000006"]


def test_metrics_go_on_from_those_of_an_earlier_attempt_and_a_killed_one_leaves_nothing(
    store: Path, on_machines: Callable[..., None]
) -> None:
    def first(place: TrainingFolder, rank: int) -> None:
        if rank == 0:
            (place.local / METRICS).write_text("one\n")
            place.share_metrics(now=False)
            (place.local / METRICS).write_text("one\ntwo\n")
            place.share_metrics(now=False)  # too soon
        (place.local / "leftover").write_text("of the killed attempt")

    def second(place: TrainingFolder, rank: int) -> None:
        assert [path.name for path in place.local.iterdir()] == [METRICS]
        with (place.local / METRICS).open("a") as file:
            file.write("three\n")
        if rank == 0:
            place.share_metrics(now=True)
        part = place.local / "hf.part"
        part.mkdir()
        (part / "model").write_text(f"of {rank}")
        if rank == 0:
            place.publish_folder(part, "hf")

    on_machines(store, first)
    assert (store / METRICS).read_text() == "one\n"
    on_machines(store, second)
    assert (store / METRICS).read_text() == "one\nthree\n"
    assert (store / "hf" / "model").read_text() == "of 0"


def test_a_local_folder_is_worked_in_itself(tmp_path: Path) -> None:
    place = TrainingFolder(tmp_path, rank=0, local_rank=0, world_size=1, barrier=lambda: None)
    assert place.local == tmp_path
    assert place.leads
    other = TrainingFolder(tmp_path, rank=8, local_rank=0, world_size=16, barrier=lambda: None)
    assert not other.leads  # nodes share the folder
    save(place, 0, 4)
    found = last_checkpoint(tmp_path)
    assert found is not None
    assert place.fetch_for_all(found) is found
    assert (found.state / "rank0").exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on a disk of 600 kB."""
    folder = tmp_path / "small"
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(folder)], capture_output=True)
    if made.returncode:
        pytest.skip("file systems cannot be mounted here")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)  # torch keeps its file open


WRITES: dict[str, Callable[[Path], object]] = {
    "by torch": lambda path: torch.save(torch.zeros(500_000), path),
    "by itself": lambda path: path.write_bytes(bytes(1_000_000)),
}


def fill(place: TrainingFolder, step: int, write: Callable[[Path], object]) -> None:
    """Have a step's checkpoint written."""
    with place.writing_checkpoint(step) as part:
        (part / STATE).mkdir()
        write(part / STATE / "large")


@pytest.mark.parametrize("write", WRITES)
def test_a_full_disk_is_said_with_its_room_and_keeps_the_checkpoint_before(write: str, small_disk: Path) -> None:
    place = TrainingFolder(small_disk, rank=0, local_rank=0, world_size=1, barrier=lambda: None)
    save(place, 0, 4)
    with pytest.raises(OSError, match=r"no room for a checkpoint: 0\.6 MB .* 0\.0 MB are free") as caught:
        fill(place, 8, WRITES[write])
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename == str(small_disk / "checkpoints" / "step-00000008.part")
    assert [path.name for path in (small_disk / "checkpoints").iterdir()] == ["step-00000004"]
    assert last_checkpoint(small_disk).step == 4


def interrupt(path: Path) -> None:
    path.write_text("written")
    raise KeyboardInterrupt


def test_what_another_error_leaves_of_a_checkpoint_is_removed_too(tmp_path: Path) -> None:
    place = TrainingFolder(tmp_path, rank=0, local_rank=0, world_size=1, barrier=lambda: None)
    with pytest.raises(KeyboardInterrupt):
        fill(place, 8, interrupt)
    assert not list((tmp_path / "checkpoints").iterdir())


def test_ranks_that_share_a_folder_share_the_work_of_its_digests(tmp_path: Path) -> None:
    part = tmp_path / "part"
    (part / STATE).mkdir(parents=True)
    for number in range(5):
        (part / STATE / f"file{number}").write_text(f"{number}")
    for rank in range(2):
        TrainingFolder(tmp_path, rank=rank, local_rank=rank, world_size=2, barrier=lambda: None)._digest(part)
    shares = [set(json.loads((part / f"digests-{rank}.json").read_text())) for rank in range(2)]
    assert [len(share) for share in shares] == [3, 2]
    assert shares[0] | shares[1] == {f"{STATE}/file{number}" for number in range(5)}


def test_a_training_is_asked_to_stop_by_what_stands_in_a_file_that_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new one may be seen a minute late where storage is mounted."""
    monkeypatch.setattr(training_folder, "LOOK_SECONDS", 0.0)
    place = TrainingFolder(tmp_path, rank=0, local_rank=0, world_size=1, barrier=lambda: None)
    asked = []
    for write in (lambda stop: None, lambda stop: stop.write_text(""), lambda stop: stop.write_text("stop")):
        write(tmp_path / STOP)
        time.sleep(0.01)
        asked.append(place.asked_to_stop())
    assert asked == [False, False, True]
