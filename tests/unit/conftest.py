"""Fixtures of several unit tests."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest

from ifguide.storage import location


@pytest.fixture
def store() -> Iterator[Path]:
    """An empty folder of fsspec's file system in memory."""
    pytest.importorskip("upath")
    folder = location(f"memory://{secrets.token_hex(8)}")
    yield folder
    if folder.exists():
        folder.fs.rm(folder.path, recursive=True)  # type: ignore[attr-defined]
