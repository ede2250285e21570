"""The planned memory of weights, gradients and optimizer against the tensors that DeepSpeed holds, on a CPU."""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from ifguide.config import Pretrain
from ifguide.planning.training_memory import BUCKET, training_memory
from ifguide.shapes import shape_of_fields
from tests import forked

ROOT = Path(__file__).parents[2]
FIELDS = {
    "model_type": "llama", "vocab_size": 500, "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 16,
}  # fmt: skip


@pytest.mark.parametrize(
    ("stage", "dtype"), [(0, "bfloat16"), (1, "bfloat16"), (3, "bfloat16"), (0, "float32"), (1, "float32")]
)
def test_deepspeed_holds_what_is_planned(stage: int, dtype: str, tmp_path: Path) -> None:
    """After the second backward pass, when the optimizer's moments are there and the gradients still are."""
    module = "tests.stages.test_training_memory"
    command = [sys.executable, "-m", module, str(stage), dtype, str(tmp_path / "held.json")]
    done = forked.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr[-2000:]
    held = json.loads((tmp_path / "held.json").read_text())
    planned = training_memory(config_of(stage, dtype), shape_of_fields("tiny", "test", FIELDS), 16)
    expected = planned.weights + planned.gradients + planned.optimizer
    if stage == 3:
        expected += (2 if dtype == "bfloat16" else 4) * BUCKET  # the only stage that keeps its bucket between passes
        assert planned.buffers == (2 if dtype == "bfloat16" else 4) * BUCKET
    assert held == pytest.approx(expected, abs=20_000)  # inputs, masks, rotary tables


def config_of(stage: int, dtype: Any) -> Pretrain:
    return Pretrain(zero_stage=stage, dtype=dtype, batch_blocks=2, micro_batch_blocks=2, workers=1)


def measure(stage: int, dtype: str, path: Path) -> None:
    """Bytes of all tensors that are alive after the second backward pass, each storage once."""
    os.environ |= {"DS_ACCELERATOR": "cpu", "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    import deepspeed
    import torch

    from ifguide.config import ModelSource
    from ifguide.models import load_model
    from ifguide.training.schedule import deepspeed_config, parameter_groups

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    store = path.with_name("store")
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
    model = load_model(ModelSource(architecture=FIELDS))
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.0), lr=1e-3)
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=deepspeed_config(config_of(stage, dtype))
    )
    tokens = torch.zeros(2, 16, dtype=torch.long)
    engine.backward(engine(input_ids=tokens, labels=tokens).loss)
    engine.step()
    engine.backward(engine(input_ids=tokens, labels=tokens).loss)
    gc.collect()
    alive = [item for item in gc.get_objects() if isinstance(item, torch.Tensor)]
    alive += [tensor.grad for tensor in alive if tensor.is_leaf and tensor.grad is not None]
    held = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in alive}
    path.write_text(json.dumps(sum(held.values())))


if __name__ == "__main__":
    measure(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
