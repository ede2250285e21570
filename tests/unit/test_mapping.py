"""Weights and directions are mapped from their files, so that the actors of a node hold one copy of them."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ifguide.config import ModelSource
from ifguide.models import linearise, load_model

ARCHITECTURE = {
    "model_type": "llama", "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2,
    "num_attention_heads": 4, "vocab_size": 1024,
}  # fmt: skip
HOLD = """
import sys
from pathlib import Path
from tests.unit.test_mapping import load
held = load(Path(sys.argv[1]))
print("ready", flush=True)
sys.stdin.read()
"""


def load(folder: Path) -> tuple:
    """Model and V as an actor loads them, every page of them touched."""
    model = linearise(load_model(ModelSource(source=str(folder))))
    directions = load_file(folder / "direction.safetensors")
    assert all(bool(tensor.isfinite().all()) for tensor in [*model.parameters(), *directions.values()])
    return model, directions


def shared_kilobytes(folder: Path) -> dict[str, int]:
    """Per file of `folder` mapped into this process, what of it another process has mapped too."""
    shared: dict[str, int] = {}
    for area in re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text()):
        name = area.partition("\n")[0].split()[-1]
        if name.startswith(str(folder)):
            amount = sum(map(int, re.findall(r"Shared_(?:Clean|Dirty):\s+(\d+)", area)))
            shared[Path(name).name] = shared.get(Path(name).name, 0) + amount
    return shared


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux's /proc to see mappings")
def test_two_processes_share_the_pages_of_model_and_direction(tmp_path: Path) -> None:
    load_model(ModelSource(architecture=ARCHITECTURE)).save_pretrained(tmp_path)
    save_file({"layer": torch.randn(512, 512)}, tmp_path / "direction.safetensors")
    held = load(tmp_path)
    root = Path(__file__).parents[2]
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == "ready\n"
        shared = shared_kilobytes(tmp_path)
    finally:
        other.kill()
        other.wait()
    for name in ("model.safetensors", "direction.safetensors"):
        assert shared[name] * 1024 > 0.9 * (tmp_path / name).stat().st_size, shared
    del held
