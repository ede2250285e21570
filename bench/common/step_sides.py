"""The trainers that `bench/training_step.py` sets beside one another: one architecture, batch and precision.

`TrainingLoop` is this project's own, as `pretrain` runs it, on blocks written for it; `Trainer` is transformers', which
runs in a thread that waits before each of its steps; `compiled_loop` is plain PyTorch.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ifguide.artifacts import file_entry, write_sealed
from ifguide.config import ModelSource, config_from_mapping
from ifguide.models import load_model
from ifguide.tokenizer import train_tokenizer
from ifguide.training.blocks import BLOCKS, DIGESTS, LENGTHS, MASKED, TOKENS
from ifguide.training.loop import TrainingLoop
from ifguide.training.settings import TrainingSettings

BLOCK_COUNT = 64
MASKED_SHARE = 0.02
RATE = 1e-5
CLIPPING = 1.0


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What all sides have in common; `fields` are the model's config fields."""

    fields: Mapping[str, Any]
    blocks: int
    block_size: int
    dtype: str
    device: str
    threads: int

    def tokens(self) -> np.ndarray:
        """(BLOCK_COUNT, block_size) int32, random."""
        rng = np.random.default_rng(0)
        return rng.integers(self.fields["vocab_size"], size=(BLOCK_COUNT, self.block_size), dtype=np.int32)


@dataclass
class Side:
    """`step` does one whole step and drops its gradients; `loop` is there where the side is ours."""

    step: Callable[[], None]
    parameters: int
    loop: TrainingLoop | None = None
    close: Callable[[], None] = lambda: None


def own_side(folder: Path, sizes: Sizes, options: Mapping[str, Any], *, masked: bool) -> Side:
    """This project's loop in `folder`, with these changes of the `pretrain` section."""
    loop = training_loop(folder, sizes, options, masked=masked)

    def step() -> None:
        loop._train_step()
        loop.engine.optimizer.zero_grad(set_to_none=True)  # type: ignore[attr-defined]

    return Side(step=step, parameters=_parameters(loop.engine.module), loop=loop)


def training_loop(folder: Path, sizes: Sizes, options: Mapping[str, Any], *, masked: bool) -> TrainingLoop:
    """A loop of the torch engine that is far from its end."""
    tokens_NT = sizes.tokens()
    arrays = {TOKENS: tokens_NT, LENGTHS: np.full(len(tokens_NT), sizes.block_size, dtype=np.int32)}
    if masked:
        arrays[MASKED] = np.random.default_rng(1).random(tokens_NT.shape) < MASKED_SHARE
    (folder / BLOCKS).mkdir(parents=True)
    for name, array in arrays.items():
        np.save(folder / BLOCKS / name, array)
    entries = {name: file_entry(folder / BLOCKS / name) for name in arrays}
    write_sealed(folder / BLOCKS / DIGESTS, entries)
    train_tokenizer(["one two three four"] * 8, vocab_size=300).save_pretrained(folder / "tokenizer")
    tree = {
        "run_dir": str(folder / "run"),
        "tokenizer": str(folder / "tokenizer"),
        "target": {"architecture": dict(sizes.fields)},
        "pack_corpus": {"block_size": sizes.block_size},
        "pretrain": {
            "engine": "torch",
            "dtype": sizes.dtype,
            "batch_blocks": sizes.blocks,
            "micro_batch_blocks": sizes.blocks,
            "learning_rate": RATE,
            "gradient_clipping": CLIPPING,
            "epochs": 1e4,
            "resources": {"cpus": sizes.threads, "gpus": int(sizes.device == "cuda")},
            **options,
        },
    }
    config = config_from_mapping(tree)
    settings = TrainingSettings(
        name=folder.name,
        folder=str(folder),
        corpus=str(folder / "corpus"),  # neither is read: the blocks are flat already
        mask=str(folder / "mask") if masked else None,
        tokenizer=str(folder / "tokenizer"),
        block_size=sizes.block_size,
        target=config.target,
        train=config.pretrain,
        seed=0,
    )
    return TrainingLoop(settings, rank=0, world_size=1)


def compiled_side(sizes: Sizes) -> Side:
    """A plain loop: the whole model compiled with its own loss, clipping, fused AdamW."""
    model, batch = _model(sizes), _batches(sizes)
    compiled = torch.compile(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, fused=True)

    def step() -> None:
        tokens = batch()
        with torch.autocast(sizes.device, torch.bfloat16, enabled=sizes.dtype == "bfloat16"):
            loss = compiled(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIPPING)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return Side(step=step, parameters=_parameters(model))


def trainer_side(folder: Path, sizes: Sizes) -> Side:
    """transformers' `Trainer` with its defaults, but for the sizes, where the model is, and reports to nobody."""
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

    model = _model(sizes)
    rows = [torch.from_numpy(row) for row in sizes.tokens().astype(np.int64)]
    go, arrived = threading.Event(), threading.Event()
    errors: list[BaseException] = []
    ending = False

    class Turns(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
            arrived.set()
            go.wait()
            go.clear()
            control.should_training_stop = ending
            return control

    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"),
        per_device_train_batch_size=sizes.blocks,
        max_steps=10**6,
        learning_rate=RATE,
        bf16=sizes.dtype == "bfloat16",
        use_cpu=sizes.device == "cpu",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    dataset: Any = [{"input_ids": row, "labels": row} for row in rows]
    trainer = Trainer(model=model, args=arguments, train_dataset=dataset, callbacks=[Turns()])
    trainer.remove_callback(PrinterCallback)

    def train() -> None:
        torch.set_num_threads(sizes.threads)
        try:
            trainer.train()
        except BaseException as error:
            errors.append(error)
        arrived.set()

    thread = threading.Thread(target=train, daemon=True)
    thread.start()
    arrived.wait()

    def step() -> None:
        arrived.clear()
        go.set()
        arrived.wait()
        if errors:
            raise errors[0]

    def close() -> None:
        nonlocal ending
        ending = True
        go.set()
        thread.join(60)

    return Side(step=step, parameters=_parameters(model), close=close)


def _model(sizes: Sizes) -> Any:
    return load_model(ModelSource(architecture=dict(sizes.fields)), seed=0, device=sizes.device).train()


def _batches(sizes: Sizes) -> Callable[[], torch.Tensor]:
    tokens, place = torch.from_numpy(sizes.tokens().astype(np.int64)), 0

    def batch() -> torch.Tensor:
        nonlocal place
        rows = tokens[[(place + i) % len(tokens) for i in range(sizes.blocks)]]
        place += sizes.blocks
        return rows.to(sizes.device)

    return batch


def _parameters(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
