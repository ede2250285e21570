"""The models of a run and of its comparison."""

from __future__ import annotations

from pathlib import Path

from ifguide.artifacts import MANIFEST
from ifguide.run import Run
from ifguide.training.loop import EXPORT


def trained_models(run: Run) -> dict[str, Path]:
    """Name -> the folder of a finished model's weights, the run's own first."""
    compared = {folder.parent.parent.name: folder for folder in sorted((run.folder / "compare").glob("*/model/*"))}
    folders = {**run.models, **compared}
    return {name: folder / EXPORT for name, folder in folders.items() if (folder / MANIFEST).exists()}
