"""The peaks of GPUs and of a CPU core, from `hardware.yaml`: what rates are measured against."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from importlib import resources

import yaml


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """One GPU, or one core of a CPU: dense peaks in FLOP/s; `memory` in bytes, 0 where it is the machine's.
    `cuda_name` is a pattern of what CUDA calls it."""

    name: str
    device: str
    float32: float
    bfloat16: float
    float64: float
    memory: float
    kind: str
    source: str
    cuda_name: str = ""

    def peak(self, precision: str) -> float:
        return float(getattr(self, precision))


@functools.cache
def machines() -> dict[str, Hardware]:
    """All of the table, by name."""
    text = resources.files("ifguide").joinpath("hardware.yaml").read_text(encoding="utf-8")
    return {name: Hardware(name=name, **entry) for name, entry in yaml.safe_load(text).items()}


def hardware(name: str) -> Hardware:
    """A GPU type, or `cpu` for one core.

    Raises:
        ValueError: unknown; names the known ones.
    """
    if name not in machines():
        raise ValueError(
            f"GPU type {name}: not known, only {', '.join(machines())}; add its data sheet's peaks to"
            " ifguide/hardware.yaml"
        )
    return machines()[name]


def hardware_of_device(cuda_name: str) -> Hardware | None:
    """The GPU type that CUDA calls so (`torch.cuda.get_device_name`); None where its peak is not known."""
    matching = (item for item in machines().values() if item.cuda_name and re.fullmatch(item.cuda_name, cuda_name))
    return next(matching, None)
