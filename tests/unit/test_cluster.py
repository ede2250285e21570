"""The files in cluster/ name entry points, configs and a Ray version that exist."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
FILES = sorted(path for path in (ROOT / "cluster").iterdir() if path.is_file())


def ray_version() -> str:
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return next(pin.split("==")[1] for pin in pins if pin.startswith("ray=="))


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


def test_the_image_has_the_projects_ray_and_what_object_stores_need() -> None:
    dockerfile = (ROOT / "cluster" / "Dockerfile").read_text()
    assert f"rayproject/ray:{ray_version()}-" in dockerfile
    assert '--constraint constraints.txt ".[train,evaluate,compare,s3]"' in dockerfile
    for copied in re.findall(r"^COPY (?:--\S+ )*(.+) \S+$", dockerfile, re.MULTILINE):
        assert all((ROOT / name).exists() for name in copied.split()), copied


def test_a_job_whose_working_directory_is_sent_along_is_told_where_its_run_directory_is() -> None:
    """Relative paths would lie in Ray's own folder on each node, under another name after any edit."""
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *FILES):
        for line in path.read_text().splitlines():
            if re.search(r"ray job submit .*--working-dir .*jobs/", line):
                assert re.search(r"--set run_dir=(/|\w+://|D\b)", line), f"{path.name}: {line}"


def test_local_sh_is_valid_shell() -> None:
    subprocess.run(["bash", "-n", str(ROOT / "cluster" / "local.sh")], check=True)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_nothing_is_writable_by_everybody(path: Path) -> None:
    modes = re.findall(r"(?:chmod|-m|--mode)[ =](?:-R )?([0-7]{3,4}|[ugoa]*\+[rwxst]+)", path.read_text())
    assert not [mode for mode in modes if mode[-1:] in "2367" or re.match(r"[ug]*[oa].*w|\+.*w", mode)]
