"""IF-Guide as a distributed Ray job, and its parts as functions for one process.

The functions below need neither Ray nor a run directory; docs/python.md shows them. They are imported when they are
first asked for, so that importing the package takes no time.
"""

from importlib import import_module
from typing import Any

_PUBLIC = {
    "LanguageModelLoss": "ifguide.training.lm_loss",
    "ModuleFactors": "ifguide.influence.query",
    "Objective": "ifguide.training.objective",
    "PackedTexts": "ifguide.texts",
    "TokenScorer": "ifguide.influence.scorer",
    "build_direction": "ifguide.influence.query",
    "fit_factors": "ifguide.influence.factors",
    "linearise": "ifguide.models",
    "load_factors": "ifguide.influence.query",
    "objective": "ifguide.training.signed_loss",
    "pack_texts": "ifguide.texts",
    "score_tokens": "ifguide.texts",
    "select_tokens": "ifguide.selection.whole",
    "signed_loss": "ifguide.training.signed_loss",
    "tracked_modules": "ifguide.models",
    "train_tokenizer": "ifguide.tokenizer",
}

__all__ = list(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
