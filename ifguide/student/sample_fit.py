"""The fit of `fit_student`: the student of all parts of the sample, and what was tried."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ifguide.artifacts import write_json
from ifguide.influence.head_derivatives import HeadDerivatives
from ifguide.influence.memory import keep_memory
from ifguide.influence.smoothing import smoothing_layers
from ifguide.models import transformer_blocks
from ifguide.storage import local_copy
from ifguide.student.encoder import encoder_source
from ifguide.student.encoder_fit import EncoderSettings
from ifguide.student.parts import Fitted, fit_encoder_parts, fit_head_parts, fit_ngram_parts, fit_suffix_parts
from ifguide.student.sample_worker import SampleSettings, read_transforms
from ifguide.student.scorers import FACTS, STUDENT
from ifguide.telemetry import configure_logging


def fit_on_parts(settings: SampleSettings, sample: dict[str, Any]) -> dict[str, Any]:
    """Publish the student of all parts, and what was tried and chosen; returns the latter. `sample`: what is recorded
    of the sample.

    Raises:
        ValueError: the sample is too small; says what to set.
    """
    paths = [local_copy(settings.part(number)) for number in range(settings.partitions)]
    fitted = _fit(settings, paths)
    fitted.student.save(settings.folder / STUDENT)
    chosen = _finite(fitted.chosen)
    facts = {
        "kind": settings.kind,
        "sampling": asdict(settings.sampling),
        "sample": sample,
        "edge": fitted.edge,
        "chosen": chosen,
        "tried": [_finite(own) for own in fitted.tried],
    }
    write_json(settings.folder / FACTS, facts)
    return chosen


def _fit(settings: SampleSettings, paths: list[Path]) -> Fitted:
    if settings.kind == "ngram":
        return fit_ngram_parts(paths)
    if settings.kind == "suffix":
        return fit_suffix_parts(paths)
    if settings.kind == "encoder":
        return _fit_encoder(settings, paths)
    model = settings.scoring.model()
    layers = smoothing_layers(len(transformer_blocks(model)[1]))
    return fit_head_parts(paths, read_transforms(settings.folder), layers, HeadDerivatives(model), model.device)


def _fit_encoder(settings: SampleSettings, paths: list[Path]) -> Fitted:
    keep_memory()
    configure_logging()
    torch.set_num_threads(settings.scoring.decision.threads)
    block_size = settings.scoring.corpus.block_size
    training = EncoderSettings(
        options=settings.encoder,
        source=encoder_source(settings.encoder, settings.vocabulary, block_size),
        seed=settings.sampling.seed,
        device=settings.scoring.device,
        apart=settings.scoring.beginning.of_documents,
        low_precision=settings.scoring.decision.method.precision == "bfloat16",
    )
    return fit_encoder_parts(paths, training)


def _finite(tried: dict[str, Any]) -> dict[str, Any]:
    """As JSON has it: a correlation is not defined where a student gives every token the same score."""
    return {name: None if isinstance(own, float) and not math.isfinite(own) else own for name, own in tried.items()}
