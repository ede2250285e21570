"""Does a model still know toxic text when it reads it?"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ifguide.analyses.probes import probe_layers
from ifguide.analyses.residuals import mean_residuals
from ifguide.config import Config, ModelSource
from ifguide.evaluation import Bootstrap
from ifguide.models import load_model
from ifguide.tokenizer import load_tokenizer
from ifguide.toxicity import labelled_texts

MAX_TOKENS = 128  # of a text
MOST_TEXTS = 1000
FOLDS = 5


def recognition(config: Config, path: str | Path) -> list[float] | None:
    """AUROC of a linear probe with its interval, on the labelled texts of `evaluate.check_data`; None where the config
    names none. The probe reads the mean hidden state of the layer that an inner cross-validation chooses. `path`: the
    model's folder, or .gguf file."""
    if not config.evaluate.check_data:
        return None
    texts = labelled_texts(config.evaluate.check_data, "evaluate.check_data")
    chosen = np.random.default_rng(config.seed).permutation(len(texts))[:MOST_TEXTS]
    tokenizer = load_tokenizer(str(path))
    encoded = [(tokenizer(texts[i].text, add_special_tokens=False)["input_ids"][:MAX_TOKENS], i) for i in chosen]
    encoded = [(ids, i) for ids, i in encoded if ids]
    model = load_model(ModelSource(source=str(path)))
    states_LND = mean_residuals(model, [ids for ids, _ in encoded], batch_size=32).numpy()
    labels_N = np.array([texts[i].label for _, i in encoded])
    bootstrap = Bootstrap(samples=config.evaluate.bootstrap_samples, seed=config.seed)
    figure = probe_layers(states_LND, labels_N, folds=FOLDS, seed=config.seed, bootstrap=bootstrap)["chosen"]["auroc"]
    return [round(float(figure[end]), 4) for end in ("value", "low", "high")]
