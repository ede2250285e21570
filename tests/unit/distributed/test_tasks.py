"""How many tasks are begun at a time, and what is said of them. That they run on Ray, `tests/stages` shows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from ray.exceptions import NodeDiedError, OutOfMemoryError, RayError, RuntimeEnvSetupError, WorkerCrashedError

from ifguide import cli, interrupts, telemetry
from ifguide.config.resources import ONE_CPU, Resources
from ifguide.distributed import tasks


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The arguments of tasks in the order in which they were begun; each is done when it is waited for."""
    numbers: list[int] = []

    def start(function: Any, arguments: tuple[int], _: Any) -> Any:
        numbers.extend(arguments)
        return lambda: function(*arguments)

    monkeypatch.setattr(tasks, "_start", start)
    monkeypatch.setattr(tasks, "_result", lambda function, reference: reference())
    monkeypatch.setattr(tasks, "cluster_cpus", lambda: 2.0)
    monkeypatch.setattr(tasks.ray, "wait", lambda pending: (pending[-1:], pending[:-1]))
    return numbers


def scan(number: int) -> int:
    return number


class Deaths:
    """Ray with what a task of each number dies of, attempt by attempt; then it returns its number."""

    def __init__(self, **deaths: list[RayError]):
        self.deaths = {int(name.removeprefix("task_")): errors for name, errors in deaths.items()}
        self.begun: list[int] = []
        self.beside: list[int] = []  # of each attempt: tasks at work when it began
        self.options: dict[str, Any] = {}
        self.at_work = 0

    def remote(self, function: Any) -> Any:
        return self._Remote(self, function)

    def get(self, reference: Any) -> int:
        self.at_work -= 1
        return int(reference())

    class _Remote:
        def __init__(self, ray: Deaths, function: Any):
            self.ray, self.function = ray, function

        def options(self, **options: Any) -> Any:
            self.ray.options = options
            return self

        def remote(self, number: int) -> Any:
            ray = self.ray
            ray.begun.append(number)
            ray.beside.append(ray.at_work)
            ray.at_work += 1

            def end() -> int:
                if errors := ray.deaths.get(number):
                    raise errors.pop(0)
                return int(self.function(number))

            return end


@pytest.fixture
def deaths(monkeypatch: pytest.MonkeyPatch) -> Any:
    def of(**deaths: list[RayError]) -> Deaths:
        ray = Deaths(**deaths)
        monkeypatch.setattr(tasks, "cluster_cpus", lambda: 2.0)
        monkeypatch.setattr(tasks.ray, "remote", ray.remote)
        monkeypatch.setattr(tasks.ray, "get", ray.get)
        monkeypatch.setattr(tasks.ray, "wait", lambda pending, timeout=None: (pending[:1], pending[1:]))
        return ray

    return of


LOW = "Task was killed due to the node running low on memory.\nMemory on the node was 30GB / 31GB"


def test_a_task_that_its_machine_cannot_hold_is_given_up_after_its_attempts(
    deaths: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray would try it for ever, as it does with whatever its memory monitor ends."""
    lines: list[str] = []
    monkeypatch.setattr(tasks, "log", lambda name, text, **_: lines.append(f"{name}: {text}"))
    ray = deaths(task_7=[OutOfMemoryError(LOW) for _ in range(9)])
    given_up = (
        r"^scan: gave up after 2 attempts: Task was killed due to the node running low on memory; give it a machine"
        r" with more memory, .*the same command goes on"
    )
    with pytest.raises(tasks.StageError, match=given_up):
        tasks.run_task(scan, 7, resources=Resources(gpus=0, attempts=2))
    assert ray.begun == [7, 7]
    assert ray.options["max_retries"] == 0
    assert lines == ["scan: lost, attempt 2 of 2 follows: Task was killed due to the node running low on memory."]


def test_each_task_has_attempts_of_its_own_and_one_that_lacked_memory_runs_alone(deaths: Any) -> None:
    ray = deaths(
        task_1=[OutOfMemoryError(LOW), OutOfMemoryError(LOW)],
        task_2=[WorkerCrashedError(), NodeDiedError("The node is gone.")],
        task_4=[WorkerCrashedError()],
    )
    results = list(tasks.run_tasks(ONE_CPU)(scan, ((number,) for number in range(12))))
    assert sorted(results) == list(range(12))
    assert [ray.begun.count(number) for number in (0, 1, 2, 4)] == [1, 3, 3, 2]
    again = [beside for number, beside in zip(ray.begun, ray.beside, strict=True) if number == 1][1:]
    assert again == [0, 0]
    assert max(ray.beside) == 7


def test_a_task_is_not_tried_again_where_that_cannot_help(deaths: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ray = deaths(task_3=[RuntimeEnvSetupError("no such package")])
    with pytest.raises(tasks.StageError, match=r"^scan: Failed to set up runtime environment; "):
        list(tasks.run_tasks(ONE_CPU)(scan, [(3,)]))
    assert ray.begun == [3]
    ray = deaths(task_3=[WorkerCrashedError()])
    monkeypatch.setattr(interrupts, "requested", lambda: True)  # what ends the processes also loses their tasks
    with pytest.raises(tasks.StageError):
        tasks.run_task(scan, 3, resources=ONE_CPU)
    assert ray.begun == [3]


def test_a_task_whose_process_died_ends_a_command_in_one_line(
    deaths: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    deaths(task_3=[WorkerCrashedError() for _ in range(9)])
    monkeypatch.setattr("ifguide.commands.show", lambda options: tasks.run_task(scan, 3, resources=ONE_CPU))
    assert cli.main(["show", "runs/mine"]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("ifguide show: scan: gave up after 3 attempts: The worker died unexpectedly ")


def test_no_more_than_a_few_tasks_wait_and_every_result_comes_once(begun: list[int]) -> None:
    results: Iterator[int] = tasks.run_tasks(ONE_CPU)(scan, ((number,) for number in range(30)))
    first = next(results)
    assert begun == list(range(8))
    assert sorted([first, *results]) == begun == list(range(30))


def test_a_pass_of_many_tasks_says_how_far_it_is_and_a_short_one_nothing(
    begun: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    now, lines = [0.0], list[str]()
    monkeypatch.setattr(telemetry.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(telemetry, "log", lambda verb, text, **_: lines.append(f"{verb}: {text}"))
    run = tasks.run_tasks(ONE_CPU)
    assert len(list(run(scan, [(1,), (2,)]))) == 2
    assert lines == []
    for _ in run(scan, [(number,) for number in range(20)]):
        now[0] += 0.75
    assert [line.partition(",")[0] for line in lines] == ["scan: 8/20 tasks (40%)", "scan: 15/20 tasks (75%)"]
    assert "ETA" in lines[0]
    assert len(begun) == 22
