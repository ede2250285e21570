"""What a training's steps run by, decided once: before its first step, on the machine that took it.

    model/penalised/choices.json    {"layers": {"on": false, "why": "..."}, "loss": {...}, "attention": "sdpa"}

A training that goes on from a checkpoint goes on by its choices: on a machine with another compiler, or none, its last
bits would be others from there on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ifguide.artifacts import read_sealed, write_sealed

CHOICES = "choices.json"


class Compiled(NamedTuple):
    """Whether a part of a step is compiled, and why."""

    on: bool
    why: str


@dataclass(frozen=True, kw_only=True)
class Choices:
    """Whether `layers` and `loss` are compiled, and the model's `attention` by its name in transformers."""

    layers: Compiled
    loss: Compiled
    attention: str

    def write(self, folder: Path) -> None:
        """Publish them in a training's folder."""
        write_sealed(folder / CHOICES, self.as_json())

    def as_json(self) -> dict[str, Any]:
        """As the file has them."""
        return {"layers": self.layers._asdict(), "loss": self.loss._asdict(), "attention": self.attention}

    def text(self) -> str:
        """One line for people."""
        parts = {"layers": self.layers, "loss": self.loss}
        said = [f"{name} {'' if part.on else 'not '}compiled ({part.why})" for name, part in parts.items()]
        return ", ".join([*said, f"attention by {self.attention}"])


def read_choices(folder: Path) -> Choices | None:
    """Those of a training that was begun; None where none were written.

    Raises:
        ValueError: the file is damaged; names it.
    """
    path = folder / CHOICES
    if not path.exists():
        return None
    try:
        saved: Mapping[str, Any] = read_sealed(path)
        layers, loss = (Compiled(bool(saved[part]["on"]), str(saved[part]["why"])) for part in ("layers", "loss"))
        return Choices(layers=layers, loss=loss, attention=str(saved["attention"]))
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} does not say how the steps were taken ({error}); delete it to choose anew") from error
