"""The configs that are installed with the program: found by name where no file of that path is there."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parents[1] / "configs"


def packaged_configs() -> list[str]:
    """Their names."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def packaged_config(path: str | Path) -> Path | None:
    """The packaged config of `NAME`, `NAME.yaml` or `configs/NAME.yaml`, if there is one, whatever lies here."""
    path = Path(path)
    if path.parent not in (Path(), Path("configs")) or path.suffix not in ("", ".yaml"):
        return None
    packaged = FOLDER / f"{path.name.removesuffix('.yaml')}.yaml"
    return packaged if packaged.is_file() else None


def find_config(path: Path) -> Path:
    """A config file as it is; else, of `NAME`, `NAME.yaml` or `configs/NAME.yaml`, the packaged one.

    Raises:
        FileNotFoundError: there is neither.
    """
    if path.is_file():
        return path
    if (packaged := packaged_config(path)) is not None:
        return packaged
    raise FileNotFoundError(f"config file {path} does not exist; packaged are {', '.join(packaged_configs())}")
