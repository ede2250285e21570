"""Where benchmarks read and write by default, and on what they run."""

from __future__ import annotations

import os
import platform
from pathlib import Path

ROOT = Path(__file__).parents[2]
DATA = ROOT.parent / "shared" / "data"
CACHE = ROOT / "runs" / "bench"


def this_machine() -> str:
    """The processor and its cores, for a result of the CPU."""
    return f"{platform.machine()}, {os.cpu_count()} cores, no GPU"
