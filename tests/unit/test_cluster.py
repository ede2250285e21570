"""The files in cluster/ name entry points, configs and a Ray version that exist."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
FILES = sorted(path for path in (ROOT / "cluster").iterdir() if path.is_file())


def ray_version() -> str:
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    return next(item.split("==")[1] for item in dependencies if item.startswith("ray["))


@pytest.mark.parametrize("path", [path for path in FILES if path.suffix == ".yaml"], ids=lambda path: path.name)
def test_yaml_parses_and_pins_the_projects_ray(path: Path) -> None:
    found: list[str] = []

    def walk(tree: Any) -> None:
        if isinstance(tree, dict):
            found.extend(str(value) for key, value in tree.items() if key == "rayVersion")
            tree = list(tree.values())
        for item in tree if isinstance(tree, list) else []:
            walk(item)

    walk(yaml.safe_load(path.read_text()))
    assert set(found) <= {ray_version()}
    assert found or not path.name.startswith("ray")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_job_and_config_named_exists(path: Path) -> None:
    for name in re.findall(r"\b(?:jobs|configs)/\w+\.(?:py|yaml)", path.read_text()):
        assert (ROOT / name).is_file(), name


def test_the_image_has_the_projects_ray() -> None:
    assert f"rayproject/ray:{ray_version()}-" in (ROOT / "cluster" / "Dockerfile").read_text()


def test_local_sh_is_valid_shell() -> None:
    subprocess.run(["bash", "-n", str(ROOT / "cluster" / "local.sh")], check=True)
