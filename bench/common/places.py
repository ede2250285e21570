"""Where benchmarks read and write by default, and on what they run."""

from __future__ import annotations

import os
import platform
from pathlib import Path

from ifguide.datasets import COMMAND, FOLDER

ROOT = Path(__file__).parents[2]
DATA = Path(os.environ.get("IFGUIDE_DATA") or ROOT / FOLDER)
ABSENT = f"`{COMMAND}` makes {FOLDER}; the environment variable IFGUIDE_DATA names a folder elsewhere"
CACHE = ROOT / "runs" / "bench"


def this_machine() -> str:
    """The processor and its cores, for a result of the CPU."""
    return f"{platform.machine()}, {os.cpu_count()} cores, no GPU"
