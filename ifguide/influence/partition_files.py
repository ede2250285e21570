"""Files of factors that are fitted in parts: published by rename, read one module at a time, added in a fixed order.

A file holds one tensor per module. Nothing here knows what the tensors mean.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

Factors = dict[str, dict[str, Tensor]]  # factor name -> module name -> tensor


def sum_partitions(
    workdir: Path,
    path_function: Callable[..., Path],
    names: Sequence[str],
    partitions: Sequence[tuple[int, int]],
    only: str | None = None,
) -> Factors:
    """The sums over partitions (data, modules), in their order, of every module or of one.

    Raises:
        FileNotFoundError: names a partition's file that is missing.
    """
    totals: Factors = {name: {} for name in names}
    for partition in partitions:
        for name in names:
            with safe_open(require_file(path_function(workdir, name, partition)), framework="pt") as file:
                for module in sorted(file.keys()) if only is None else [only]:
                    value = file.get_tensor(module)
                    totals[name][module] = totals[name][module] + value if module in totals[name] else value
    return totals


def module_folder(workdir: Path, module_name: str) -> Path:
    """Where the factors of one module lie."""
    return workdir / "modules" / module_name


def module_factors(workdir: Path, name: str, module_names: Sequence[str]) -> dict[str, Tensor]:
    """One factor of several modules, of the files of each. FileNotFoundError names one that is missing."""
    paths = [require_file(module_folder(workdir, module) / f"{name}.safetensors") for module in module_names]
    return {module: load_file(path)[module] for module, path in zip(module_names, paths, strict=True)}


def publish_files(workdir: Path, save: Callable[..., None]) -> list[Path]:
    """Run `save(output_dir=...)` in a private folder beside the others', then rename each file into place; returns
    where they are."""
    workdir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=workdir, prefix=".part-") as folder:
        save(output_dir=Path(folder))
        return [path.replace(workdir / path.name) for path in sorted(Path(folder).iterdir())]


def require_file(path: Path) -> Path:
    """The path of a file that is there; FileNotFoundError otherwise."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: missing; the step before it has not completed in this folder")
    return path
