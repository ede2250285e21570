"""The models of a run and of its comparison."""

from __future__ import annotations

from pathlib import Path

from ifguide.artifacts import MANIFEST
from ifguide.run import Run
from ifguide.training.loop import EXPORT


def trained_models(run: Run) -> dict[str, Path]:
    """Name -> the folder of a finished model's weights, the run's own first."""
    folders = [*run.models.values(), *sorted((run.folder / "compare").glob("*/model/*"))]
    return {
        folder.parent.parent.name if "compare" in folder.parts else folder.name: folder / EXPORT
        for folder in folders
        if (folder / MANIFEST).exists()
    }
