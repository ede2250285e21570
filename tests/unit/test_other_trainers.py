"""The examples of docs/other-trainers.md, run as they stand: their losses and gradients are those of `pretrain`."""

from __future__ import annotations

import copy
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from datasets import load_from_disk
from transformers import AutoModelForCausalLM

from ifguide import objective
from ifguide.config import ModelSource
from ifguide.mask_export import export_mask
from ifguide.models import load_model
from ifguide.spans.mapping import mask_of_spans, token_edges, token_stops
from ifguide.training.blocks import TrainingBlocks, flatten_blocks
from ifguide.training.lm_loss import LanguageModelLoss
from ifguide.training.objective import Objective
from tests.exported import make_run
from tests.tiny import GPT_NEOX
from tests.tokenizers import tokenizers

PAGE = Path(__file__).parents[2] / "docs" / "other-trainers.md"
SECTION = re.compile(r"^## (.+?)\n.*?^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SNIPPETS = dict(SECTION.findall(PAGE.read_text(encoding="utf-8")))
TEXTS = [
    "You are a clown, and everyone knows.",
    "The lake is calm.",
    "A pig!",
    "Cold weather, high water, no rain in May, and wind, too.",
]
BLOCKS, T = 8, 16
# What an example leaves behind: its loss, and the norm of its gradient.
MEASURED = {
    "transformers": "found = [trainer.state.log_history[0][key] for key in ('loss', 'grad_norm')]",
    "TRL": "found = [trainer.state.log_history[0][key] for key in ('loss', 'grad_norm')]",
    "PyTorch": "found = [loss.item(), torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]).item()]",
    "torchtitan": "found = [loss.item(), torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]).item()]",
    "DeepSpeed": "found = [loss.item(), float(engine.get_global_grad_norm())]",
}
# One process for all: importing takes longer than they do. DeepSpeed is last, as it makes its process one of a group.
DRIVER = """
import json, os, pathlib
found = {}
for name, code in json.loads(pathlib.Path("snippets.json").read_text()).items():
    if name == "DeepSpeed":  # as its launcher sets them
        import deepspeed
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # compiles for a minute
    names = {}
    exec(compile(code, name, "exec"), names)
    found[name] = names["found"]
pathlib.Path("found.json").write_text(json.dumps(found))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight blocks, the last one padded, exported; and a model of their tokens."""
    folder = tmp_path_factory.mktemp("trainers")
    run = make_run(folder / "run", TEXTS, tokenizers()["bytes"], block_size=T, blocks_per_shard=3, share=0.2)
    for kind in ("hf", "npy", "spans"):
        export_mask(run, folder / "exported" / kind, kind=kind)
    tokenizer = copy.deepcopy(tokenizers()["bytes"])
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(folder / "model")
    architecture = {**GPT_NEOX, "vocab_size": len(tokenizer)}
    load_model(ModelSource(architecture=architecture)).save_pretrained(folder / "model")
    return folder


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[str, tuple[float, float]]:
    """The loss and the norm of its gradient of each example."""
    code = {name: f"{SNIPPETS[name]}\n{lines}\n" for name, lines in MEASURED.items()}
    (folder / "snippets.json").write_text(json.dumps(code))
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", DRIVER], cwd=folder, env=environment, capture_output=True, text=True, timeout=2500
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return {name: tuple(values) for name, values in json.loads((folder / "found.json").read_text()).items()}


@pytest.fixture(scope="module")
def expected(folder: Path) -> tuple[float, float]:
    """The same of `pretrain`."""
    flatten_blocks(folder / "run" / "corpus", folder / "run" / "mask", folder / "flat")
    blocks = TrainingBlocks(folder / "flat")
    assert blocks.tokens.shape == (BLOCKS, T)
    assert blocks.lengths[-1] < T
    every = np.arange(BLOCKS)
    tokens, lengths, mask = (torch.from_numpy(values) for values in blocks.take(every) if values is not None)
    assert mask.any()
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    loss = LanguageModelLoss(model, Objective(kind="penalty", penalty=0.5))
    value = loss(tokens, lengths, mask, blocks.predicted_tokens(every))[0]
    value.backward()
    return value.item(), torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]).item()


@pytest.mark.parametrize("name", MEASURED)
def test_a_step_has_our_loss_and_gradient(
    name: str, found: dict[str, tuple[float, float]], expected: tuple[float, float]
) -> None:
    assert found[name] == pytest.approx(expected, abs=1e-6, rel=1e-6)


def test_the_page_has_no_other_example() -> None:
    assert list(SNIPPETS) == [*MEASURED, "Another tokenizer"]


def masked_by_the_page(
    name: str, text: str, spans: list[dict[str, float]]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which tokens (n + 1,) of a text the page's function masks, which the package does, and where they stop."""
    names: dict[str, Any] = {}
    exec(compile(SNIPPETS["Another tokenizer"], str(PAGE), "exec"), names)
    encoded = tokenizers()[name](text, add_special_tokens=False, return_offsets_mapping=True)
    stops = token_stops([stop for _, stop in encoded["offset_mapping"]], len(text))
    pairs = np.array([[span["start"], span["stop"]] for span in spans]).reshape(-1, 2)
    return np.array(names["masked_tokens"](spans, stops)), mask_of_spans(pairs, token_edges(stops)), stops


@pytest.mark.parametrize("name", ["bytes", "bpe"])
def test_spans_give_the_mask_of_a_document(name: str, folder: Path) -> None:
    rows = pq.read_table(folder / "exported" / "spans" / "spans.parquet").to_pylist()
    for row, text in zip(rows, TEXTS, strict=True):
        masked, ours, _ = masked_by_the_page(name, text, row["spans"])
        np.testing.assert_array_equal(masked, ours)


@pytest.mark.parametrize("name", ["bytes", "bpe"])
def test_all_tokens_of_a_character_that_a_span_touches_are_masked(name: str) -> None:
    text = "👩🏽 a 🤡🤡 clown 北京!"
    edges = np.linspace(0, len(text) + 1, 4 * len(text) + 5)  # quarters of characters
    for start, stop in itertools.combinations(edges, 2):
        masked, ours, stops = masked_by_the_page(name, text, [{"start": start, "stop": stop}])
        assert masked[ours].all()
        np.testing.assert_array_equal(masked, np.isin(stops, stops[ours]))
        assert masked.any()


def test_labels_of_masked_tokens_stop_an_ordinary_loss(folder: Path) -> None:
    rows = load_from_disk(str(folder / "exported" / "hf")).with_format("torch")[:]
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    with pytest.raises(IndexError, match="Target -"):
        model(input_ids=rows["input_ids"], labels=rows["labels"])
    plain = rows["input_ids"].masked_fill(rows["labels"] == -100, -100)
    usual = model(input_ids=rows["input_ids"], labels=plain)
    assert objective(usual, plain).item() == pytest.approx(usual.loss.item(), abs=1e-6)
    assert objective(usual.logits, plain, 1).item() == pytest.approx(
        usual.loss.item() * int((plain[:, 1:] != -100).sum()), rel=1e-6
    )
