"""The configs that are installed with the program: found by name where no file of that path is there."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parents[1] / "configs"


def packaged_configs() -> list[str]:
    """Their names."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def find_config(path: Path) -> Path:
    """A config file as it is; else, of `NAME`, `NAME.yaml` or `configs/NAME.yaml`, the packaged one.

    Raises:
        FileNotFoundError: there is neither.
    """
    if path.is_file():
        return path
    if path.parent in (Path(), Path("configs")) and path.suffix in ("", ".yaml"):
        packaged = FOLDER / f"{path.name.removesuffix('.yaml')}.yaml"
        if packaged.is_file():
            return packaged
    raise FileNotFoundError(f"config file {path} does not exist; packaged are {', '.join(packaged_configs())}")
