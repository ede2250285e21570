"""The models of a run and of its comparison."""

from __future__ import annotations

from pathlib import Path

from ifguide.artifacts import MANIFEST
from ifguide.folders import EXPORT, MODEL
from ifguide.run import Run


def trained_models(run: Run) -> dict[str, Path]:
    """Name -> the folder of a finished model's weights, the run's own first."""
    compared = {folder.parent.parent.name: folder for folder in sorted(run.comparison.glob(f"*/{MODEL}/*"))}
    folders = {**run.models, **compared}
    return {name: folder / EXPORT for name, folder in folders.items() if (folder / MANIFEST).exists()}
