"""`ifguide demo`: make the data set, run the pipeline on it, and sum it up in one JSON object."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from ifguide.artifacts import read_manifest
from ifguide.config import Config, ConfigError
from ifguide.demo.baselines import INSULT_WORDS
from ifguide.demo.generate import generate_demo
from ifguide.pipeline import run_pipeline
from ifguide.storage import is_remote, location


def data_folder(config: Config) -> Path:
    """Where the demo's data lie: in its run directory.

    Raises:
        ConfigError: that is remote.
    """
    folder = location(config.run_dir)
    if is_remote(folder):
        raise ConfigError(
            f"run_dir: the demo makes its data on this machine, not in {config.run_dir}; name a local folder. A run on"
            " data that is there already may be remote: `ifguide run`"
        )
    return folder / "data"


def make_data(config: Config) -> Path:
    """Make the corpus, prompts and tokenizer of the config's seed in its run directory."""
    folder = data_folder(config)
    generate_demo(folder, seed=config.seed)
    return folder


def run_demo(config: Config) -> dict[str, Any]:
    """Run everything in `config.run_dir`; returns the figures that the demo is judged by.

    `ppl_ratio` is penalised over baseline on benign held-out text; `margin_change` by how many nats a token known
    insults of other documents got less likely, against the rest; precision and recall are of the mask against the
    tokens known to be insults.
    """
    started = time.monotonic()
    make_data(config)
    config = replace(config, evaluate=replace(config.evaluate, word_list=tuple(sorted(INSULT_WORDS))))
    run_pipeline(config, dry_run=False)
    figures: dict[str, Any] = read_manifest(location(config.run_dir) / config.evaluate.report).summary
    baseline, penalised = figures["baseline"], figures["penalised"]
    return {
        "tp_baseline": baseline["tp"],
        "tp_penalised": penalised["tp"],
        "emt_baseline": baseline["emt"],
        "emt_penalised": penalised["emt"],
        "ppl_ratio": penalised["perplexity"] / baseline["perplexity"],
        "margin_change": penalised["margin"] - baseline["margin"],
        "mask_precision": figures["mask"]["precision"],
        "mask_recall": figures["mask"]["recall"],
        "seconds": round(time.monotonic() - started, 1),
    }
