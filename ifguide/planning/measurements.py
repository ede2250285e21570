"""The packaged measurements, and the efficiency of a pass that they imply.

efficiency = tokens per second * FLOP per token / (units * peak FLOP per second). For a pass on a kind of device:

- this program measured in the wanted precision on this hardware: interpolated in the logarithm of the model's size;
- else so measured on others of the same kind of device, an extrapolation;
- else other programs' figures on the same kind of device and precision; else on the same kind of device, and those
  of the same precision on the other kind: their geometric mean, an extrapolation.

The range is from the least to the largest figure it rests on, and a `SPREAD` beyond either.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import numpy as np
import yaml

from ifguide.hardware import Hardware, hardware, machines

SPREAD = {False: 1.5, True: 2.0}  # of one program's runs on a shared machine; of an extrapolation
MOST = 0.9  # no pass comes nearer to its peak


@dataclass(frozen=True, kw_only=True)
class Rate:
    """One figure: `value` in `unit`; `kind` is measured, published or assumed."""

    name: str
    value: float
    unit: str
    kind: str
    source: str


@dataclass(frozen=True, kw_only=True)
class Throughput:
    """An efficiency and where it was seen; `size` is of the model's tracked weights."""

    id: str
    pass_: str
    program: str
    hardware: Hardware
    precision: str
    size: float
    efficiency: float
    kind: str
    source: str


@dataclass(frozen=True, kw_only=True)
class Efficiency:
    """Of a pass: what to expect, a range, the ids it rests on, and whether it was carried over from elsewhere."""

    expected: float
    low: float
    high: float
    basis: tuple[str, ...]
    extrapolated: bool


@functools.cache
def _tables() -> dict[str, Any]:
    text = resources.files("ifguide.planning").joinpath("measurements.yaml").read_text(encoding="utf-8")
    return yaml.safe_load(text)


@functools.cache
def rates() -> dict[str, Rate]:
    """All single figures by name."""
    return {name: Rate(name=name, **entry) for name, entry in _tables()["rates"].items()}


@functools.cache
def throughputs() -> tuple[Throughput, ...]:
    """All throughput measurements, as efficiencies."""
    measured = []
    for entry in _tables()["throughput"]:
        machine = hardware(entry["hardware"])
        efficiency = entry.get("efficiency")
        if efficiency is None:
            efficiency = entry["value"] * entry["flop"] / (entry["count"] * machine.peak(entry["precision"]))
        measured.append(
            Throughput(
                id=entry["id"],
                pass_=entry["pass"],
                program=entry["program"],
                hardware=machine,
                precision=entry["precision"],
                size=float(entry["size"]),
                efficiency=efficiency,
                kind=entry["kind"],
                source=entry["source"],
            )
        )
    return tuple(measured)


def sources() -> dict[str, tuple[str, str]]:
    """Every id that a basis can name -> (kind, source)."""
    named = {item.id: (item.kind, item.source) for item in throughputs()}
    named |= {name: (item.kind, item.source) for name, item in rates().items()}
    return named | {name: (machine.kind, machine.source) for name, machine in machines().items()}


def efficiency(pass_: str, machine: Hardware, precision: str, size: float) -> Efficiency:
    """Of `pass_` (score, factors, train, generate) for a model of `size` tracked weights. See the module docstring.

    Raises:
        ValueError: nothing was ever measured of this pass.
    """
    of_pass = [item for item in throughputs() if item.pass_ == pass_]
    if not of_pass:
        raise ValueError(f"no measurement of {pass_}; add one to ifguide/planning/measurements.yaml")
    alike = [item for item in of_pass if item.precision == precision and item.hardware.device == machine.device]
    own = [item for item in alike if item.program == "ifguide"]
    here = [item for item in own if item.hardware.name == machine.name]
    if own:
        points = sorted(here or own, key=lambda item: item.size)
        sizes, values = [math.log(item.size) for item in points], [math.log(item.efficiency) for item in points]
        expected = math.exp(float(np.interp(math.log(size), sizes, values)))
        within = points[0].size / 2 <= size <= 2 * points[-1].size
        return _ranged(expected, points, extrapolated=not (here and within))
    same_device = [item for item in of_pass if item.hardware.device == machine.device]
    basis = alike or [*same_device, *(item for item in of_pass if item.precision == precision)] or of_pass
    expected = math.exp(sum(math.log(item.efficiency) for item in basis) / len(basis))
    return _ranged(expected, basis, extrapolated=True)


def _ranged(expected: float, basis: Sequence[Throughput], *, extrapolated: bool) -> Efficiency:
    spread = SPREAD[extrapolated]
    values = [expected, *(item.efficiency for item in basis)] if extrapolated else [expected]
    return Efficiency(
        expected=min(MOST, expected),
        low=min(values) / spread,
        high=min(MOST, max(values) * spread),
        basis=tuple(item.id for item in basis),
        extrapolated=extrapolated,
    )
