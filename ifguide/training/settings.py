"""What a training is told: the same on every rank, and all that it may touch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ifguide.config import ModelSource, Pretrain


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """One training. It travels to every worker, so folders are named as the config names them.

    `corpus` is packed in tokens of `tokenizer`, in blocks of `block_size`; `mask` is of its tokens (None: no mask). The
    model is made in `folder`, from `target` unless `train.init_from` says what to start from. The log calls it `name`.
    `trained_tokenizer`: it was trained for this run, so the vocabulary of a `target` that is named is its own. Relative
    names in the config are of `working_directory`. `logged` is what W&B shows of the whole config.
    """

    name: str
    folder: str
    corpus: str
    mask: str | None
    tokenizer: str
    block_size: int
    target: ModelSource
    train: Pretrain
    seed: int
    trained_tokenizer: bool = False
    working_directory: str = "."
    logged: Mapping[str, Any] = field(default_factory=dict)
