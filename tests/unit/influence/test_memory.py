"""What is free for scoring, and how actors share it."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ifguide.config import ScoreCorpus
from ifguide.config.resources import Resources
from ifguide.influence import decision
from ifguide.influence.memory import available_bytes
from tests.tiny import tiny_model

MEMINFO = (
    "MemTotal:       65536000 kB\nMemFree:          512000 kB\nMemAvailable:   32768000 kB\nCached:  32000000 kB\n"
)


def test_the_page_cache_is_free_memory(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text(MEMINFO)
    assert available_bytes(torch.device("cpu"), tmp_path / "meminfo") == 32_768_000 * 1024
    assert available_bytes(torch.device("cpu"), tmp_path / "none") > 0  # another system than Linux


@pytest.mark.parametrize(("actors", "cpus", "share"), [(1, 1.0, 1), (3, 1.0, 1 / 3), (64, 2.0, 1 / 4), (64, 16.0, 1)])
def test_the_actors_of_a_machine_share_its_memory(
    monkeypatch: pytest.MonkeyPatch, actors: int, cpus: float, share: float
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    config = ScoreCorpus(max_actors=actors, resources=Resources(cpus=cpus, gpus=0.0))
    assert decision._share_of_device(config, tiny_model("llama").device) == share
    on_gpu = replace(config, resources=Resources(cpus=cpus, gpus=0.25))
    assert decision._share_of_device(on_gpu, torch.device("cuda")) == 0.25
