"""Whether this machine has the GPUs that a training in the driver's process asks for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ifguide.config import config_from_mapping
from ifguide.preflight import PreflightError, preflight, sections
from tests.stages.conftest import ARCHITECTURE


@pytest.mark.parametrize("address", [None, "ray://head:10001"])
@pytest.mark.parametrize(
    ("gpus", "there", "fault"),
    [
        (0, 0, None),
        (0.5, 1, None),
        (1, 1, None),
        (1, 0, "pretrain.resources.gpus = 1.0: engine: torch trains in this process, and this machine has 0; lower it"),
        (2, 1, "pretrain.resources.gpus = 2.0: engine: torch trains in this process, and this machine has 1; lower it"),
    ],
)
def test_a_training_in_this_process_needs_a_gpu_of_this_machine(
    address: str | None, gpus: float, there: int, fault: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever a cluster has."""
    monkeypatch.setattr(sections, "_gpus", lambda: there)
    pretrain: dict[str, Any] = {"engine": "torch", "resources": {"gpus": gpus}}
    tree = {"run_dir": str(tmp_path), "target": {"architecture": ARCHITECTURE}, "pretrain": pretrain}
    config = config_from_mapping(tree | {"cluster": {"address": address}})
    if fault is None:
        assert preflight(config, ["pretrain"]) == ()
        return
    with pytest.raises(PreflightError) as refused:
        preflight(config, ["pretrain"])
    (found,) = map(str, refused.value.faults)
    assert found.startswith(fault)
    (left,) = map(str, preflight(config, ["pretrain"], elsewhere=True))
    assert left == found
