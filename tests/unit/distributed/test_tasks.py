"""How many tasks are begun at a time, and what is said of them. That they run on Ray, `tests/stages` shows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from ifguide import telemetry
from ifguide.config.resources import ONE_CPU
from ifguide.distributed import tasks


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The arguments of tasks in the order in which they were begun; each is done when it is waited for."""
    numbers: list[int] = []

    def start(function: Any, arguments: tuple[int], _: Any) -> Any:
        numbers.extend(arguments)
        return lambda: function(*arguments)

    monkeypatch.setattr(tasks, "_start", start)
    monkeypatch.setattr(tasks, "_result", lambda reference: reference())
    monkeypatch.setattr(tasks, "cluster_cpus", lambda: 2.0)
    monkeypatch.setattr(tasks.ray, "wait", lambda pending: (pending[-1:], pending[:-1]))
    return numbers


def scan(number: int) -> int:
    return number


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
