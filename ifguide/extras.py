"""What is installed only where it is wanted: optional packages, and how to get the one that is missing."""

from __future__ import annotations

EXTRAS = {
    "deepspeed": "train",
    "detoxify": "evaluate",
    "profanity_check": "evaluate",
    "sklearn": "evaluate",
    "threadpoolctl": "evaluate",
    "jinja2": "evaluate",
    "matplotlib": "evaluate",
    "hatesonar": "hatesonar",
    "trl": "compare",
    "upath": "s3",
    "s3fs": "s3",
    "wandb": "wandb",
    "shtab": "completion",
    "peft": "lora",
    "lm_eval": "lm-eval",
}


def advice(error: ModuleNotFoundError) -> str | None:
    """What to install for the module that was not found; None where no extra has it."""
    extra = EXTRAS.get((error.name or "").split(".")[0])
    return extra and f"the package {error.name} is needed and not installed: pip install 'ifguide[{extra}]'"
