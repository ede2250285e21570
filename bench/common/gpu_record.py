"""What `bench/gpu.py --record` writes: a dated section of bench/LOG.md, and rows of measurements."""

from __future__ import annotations

import json
import subprocess
from datetime import date
from pathlib import Path
from typing import Any

from bench.common.places import ROOT
from ifguide.hardware import hardware_of_device
from ifguide.shapes import published_shapes, shape_of_fields

LOG = ROOT / "bench" / "LOG.md"
MEASUREMENTS = ROOT / "ifguide" / "planning" / "measurements.yaml"
FIRST = "\n## "  # before the newest entry
RATES = "# rates: "  # of the measurements: what follows the throughputs
BLOCK = 2048
SHAPES = {"160m": "EleutherAI/pythia-160m", "1b": "EleutherAI/pythia-1b"}


def record(result: dict[str, Any], *, today: date, log: Path = LOG, measurements: Path = MEASUREMENTS) -> None:
    """Add the section and the rows; rows of an earlier record of the same day and device are replaced."""
    text = log.read_text(encoding="utf-8")
    before, heading, after = text.partition(FIRST)
    log.write_text(f"{before}\n{section(result, today)}{heading}{after}", encoding="utf-8")
    lines = measurements.read_text(encoding="utf-8").splitlines(keepends=True)
    new = rows(result, today)
    names = [row.partition(",")[0] for row in new]
    kept = [line for line in lines if not any(line.startswith(name) for name in names)]
    place = next(i for i, line in enumerate(kept) if line.startswith(RATES))
    measurements.write_text("".join([*kept[:place], *new, *kept[place:]]), encoding="utf-8")


def section(result: dict[str, Any], today: date) -> str:
    """The entry of the log."""
    machine = result["steps"].get("machine", {})
    versions = ", ".join(f"{name} {version}" for name, version in machine.get("versions", {}).items() if version)
    figures = {name: value for name, value in result.items() if name not in ("steps", "failed", "left", "small")}
    lines = [
        "## The whole on a GPU" if not result["small"] else "## The whole at toy size, on a CPU",
        "",
        f"- **Date** {today}. **Commit** {_commit()}.",
        f"  **Machine** {machine.get('device')}, {machine.get('cores')} cores; {versions}.",
        "- **Command** `python bench/gpu.py --record`",
        f"- **Result** `{json.dumps(figures)}`",
        f"- **Decision** None yet. Failed: {result['failed'] or 'nothing'}. Left: {result['left'] or 'nothing'}.",
        "",
        "Details:",
        "",
    ]
    details = [f"- {name}: `{json.dumps(each)}`" for name, each in result["steps"].items() if name != "machine"]
    return "\n".join([*lines, *details, ""])


def rows(result: dict[str, Any], today: date) -> list[str]:
    """A line of measurements for each training shape, of a device whose data sheet is known."""
    name = result["steps"].get("machine", {}).get("device", "")
    device = hardware_of_device(name)
    if device is None:
        return []
    made = []
    for shape, hub in SHAPES.items():
        step = result["steps"].get(f"training_{shape}")
        if not step or step.get("tokens_per_second") is None:
            continue
        described = shape_of_fields("target", hub, dict(published_shapes()[hub]["fields"]))
        made.append(
            f"  - {{id: train-{shape}-{device.name}-{today}, pass: train, program: ifguide, hardware: {device.name},"
            f" count: 1, precision: bfloat16, kind: measured, model: {hub}, size: {described.tracked},"
            f" block: {BLOCK}, flop: {described.training_flop(BLOCK):.4g},"
            f" value: {step['tokens_per_second']:.0f},"
            f' source: "bench/LOG.md, The whole on a GPU, {today} (bench/gpu.py)"}}\n'
        )
    return made


def _commit() -> str:
    answer = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    return answer.stdout.strip() or "unknown"
