"""What a model does after training: how often it shows the behaviour, and what that cost in fluency.

`generation` samples continuations, `metrics` turns classifier scores and tokens into figures, `fluency` measures
perplexity and last words, `bootstrap` gives every figure an interval, `classification` compares a classifier with
human labels. All of it is pure given model outputs: no files, no Ray.
"""

from ifguide.evaluation.bootstrap import Bootstrap, Figure, Replicates, Resampled
from ifguide.evaluation.classification import classifier_agreement
from ifguide.evaluation.fluency import LastWordResult, PerplexityResult, last_word_accuracy, perplexity
from ifguide.evaluation.generation import Sampling, sample_continuations, sample_tokens, token_lengths
from ifguide.evaluation.metrics import (
    Agreement,
    expected_max,
    probability_any,
    prompt_statistics,
    token_agreement,
)

__all__ = [
    "Agreement",
    "Bootstrap",
    "Figure",
    "LastWordResult",
    "PerplexityResult",
    "Replicates",
    "Resampled",
    "Sampling",
    "classifier_agreement",
    "expected_max",
    "last_word_accuracy",
    "perplexity",
    "probability_any",
    "prompt_statistics",
    "sample_continuations",
    "sample_tokens",
    "token_agreement",
    "token_lengths",
]
