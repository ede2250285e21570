"""A scoring run killed at any point gives the same bytes: drivers, actors and a whole node of a cluster of two."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import chaos
from bench.common import local_cluster
from tests import forked

pytestmark = pytest.mark.slow


def test_twenty_kills_change_no_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`chaos` raises unless both runs have the same scores and mask files, each of the same SHA-256."""
    monkeypatch.setattr(local_cluster, "subprocess", forked)
    result = chaos.chaos(tmp_path, kills=20, seed=0, documents=250)
    assert (result["actor_kills"], result["driver_kills"], result["node_kills"]) == (14, 3, 3)
    assert result["files_compared"] == 2 * result["shards"] * result["runs"]
    assert result["shards"] > 50
