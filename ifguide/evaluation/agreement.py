"""`ifguide evaluate --check-classifier`: how the configured classifiers agree with labels that people gave."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ifguide.config import ConfigError, Evaluate, redact
from ifguide.evaluation import Bootstrap, classifier_agreement
from ifguide.evaluation.metrics import THRESHOLD
from ifguide.evaluation.subjects import VERB
from ifguide.telemetry import log
from ifguide.toxicity import LabelClassifier, LabelledText, labelled_texts, make_classifier


def check_classifiers(options: Evaluate, seed: int) -> list[dict[str, Any]]:
    """One mapping for each of `evaluate.classifier` and `evaluate.classifiers`, in this process.

    `classifier`, `class` (its primary one), `n`, `positives`, `threshold`, and accuracy, average_precision, auroc, f1
    with intervals, over all texts of `evaluate.check_data`.

    Raises:
        ConfigError: no labelled texts are named, or rows outside of them. ValueError: bad rows, labels of one kind
            alone, or rows without the scores that `labels` reads.
    """
    if not options.check_data:
        raise ConfigError("evaluate.check_data: name JSONL or Parquet files of texts with labels (text, toxic)")
    texts = labelled_texts(options.check_data, "evaluate.check_data")
    labels = np.array([text.label for text in texts])
    bootstrap = Bootstrap(samples=options.bootstrap_samples, seed=seed)
    gpus = options.resources.gpus if torch.cuda.is_available() else 0  # this process may have none
    checked = []
    for key, source in {"": options.classifier, **options.classifiers}.items():
        where = f"evaluate.classifiers.{key}" if key else "evaluate.classifier"
        classifier = make_classifier(source, gpus=gpus, dotted_key=where)
        primary = classifier.classes[0]
        if isinstance(classifier, LabelClassifier):
            scores = _carried(texts, primary)
        else:
            scores = classifier.score([text.text for text in texts])[primary]
        agreement = classifier_agreement(scores, labels, threshold=THRESHOLD, bootstrap=bootstrap)
        checked.append({"classifier": redact(classifier.name), "name": key or None, "class": primary, **agreement})
        shown = ", ".join(
            f"{name} {agreement[name]['value']:.3f} [{agreement[name]['low']:.3f}, {agreement[name]['high']:.3f}]"
            for name in ("accuracy", "average_precision", "auroc", "f1")
        )
        named = f"{key} ({classifier.name})" if key else classifier.name
        log(VERB, f"{named} on {len(texts):,} labelled texts: {shown}")
    return checked


def _carried(texts: list[LabelledText], label: str) -> np.ndarray:
    missing = [place for place, text in enumerate(texts) if label not in text.scores]
    if missing:
        raise ValueError(
            f"evaluate.check_data: {len(missing)} of {len(texts)} texts carry no {label!r} score, the first is text"
            f" {missing[0]}; classifier 'labels' needs one in each"
        )
    return np.array([text.scores[label] for text in texts])
