"""A plan as text: one line a stage, and what each rests on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

COLUMNS = (
    "stage",
    "workers",
    "FLOP",
    "floor",
    "expected",
    "range",
    "GPU-hours",
    "cost",
    "written",
    "memory",
    "rests on",
)


def as_text(result: dict[str, Any]) -> str:
    """What `ifguide plan` prints."""
    return "\n".join(_lines(result))


def _lines(result: dict[str, Any]) -> Iterator[str]:
    proxy, target = result["proxy"], result["target"]
    yield f"{result['config']}: {result['corpus_tokens']:.3g} tokens, {result['machine']}"
    for role, model in (("proxy", proxy), ("target", target)):
        yield f"{role}: {model['name']}, {model['parameters']:,} parameters ({model['known_from']})"
    if result["settings"]:
        yield "with " + " ".join(f"--set {setting}" for setting in result["settings"])
    rate = result["scoring_tokens_per_second_per_actor"]
    yield f"scoring: {rate['expected']:,.0f} tokens/s per actor ({rate['low']:,.0f} to {rate['high']:,.0f})"
    yield ""
    numbers = {name: index + 1 for index, name in enumerate(result["sources"])}
    yield from aligned([COLUMNS, *(_row(stage, numbers) for stage in result["stages"]), _total_row(result["total"])])
    yield "~ extrapolated: not measured with this program on this machine. cost is of the GPUs only."
    idle = result["total"]["gpu_hours_idle_if_kept"]
    if idle:
        yield f"GPUs kept while only CPUs work would add {idle:,.1f} GPU-hours."
    for stage in result["stages"]:
        for note in stage["notes"]:
            yield f"{stage['stage']}: {note}"
    yield from result["notes"]
    yield ""
    for name, entry in result["sources"].items():
        yield f"[{numbers[name]}] {entry['kind']}: {name}: {entry['source']}"


def _row(stage: dict[str, Any], numbers: dict[str, int]) -> tuple[str, ...]:
    hours = stage["hours"]
    return (
        stage["stage"],
        f"{stage['workers']} {'GPU' if stage['on_gpu'] else 'core'}",
        f"{stage['flop']:.2g}" if stage["flop"] else "-",
        duration(stage["floor_hours"]),
        ("~" if stage["extrapolated"] else "") + duration(hours["expected"]),
        f"{duration(hours['low'])} - {duration(hours['high'])}",
        f"{stage['gpu_hours']:,.2f}" if stage["on_gpu"] else "-",
        f"{stage['cost']:,.2f}" if stage["cost"] else "-",
        size(stage["storage_bytes"]),
        size(stage["memory_bytes_per_worker"]),
        ",".join(str(numbers[name]) for name in stage["basis"]),
    )


def _total_row(total: dict[str, Any]) -> tuple[str, ...]:
    hours = total["hours"]
    cost = "-" if total["cost"] is None else f"{total['cost']:,.2f}"
    return (
        "total",
        "",
        f"{total['flop']:.2g}",
        "",
        duration(hours["expected"]),
        f"{duration(hours['low'])} - {duration(hours['high'])}",
        f"{total['gpu_hours']:,.2f}",
        cost,
        size(total["storage_bytes"]),
        "",
        "",
    )


def aligned(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Lines of columns: the first on the left, the others on the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = [
            cell.ljust(width) if not i else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield "  ".join(cells).rstrip()


def duration(hours: float) -> str:
    """Three digits in the unit that suits."""
    seconds = 3600 * hours
    for unit, length in (("d", 86_400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.1f} {unit}"
    return f"{seconds:.1f} s" if seconds >= 1 else f"{seconds:.2g} s"


def size(count: float) -> str:
    """Bytes in the unit that suits."""
    for unit, length in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= length:
            return f"{count / length:,.1f} {unit}"
    return f"{count / 1e3:,.0f} kB"
