"""What a model does after training: how often it shows the behaviour, and what that cost in fluency.

`generation` samples continuations, `metrics` turns classifier scores and tokens into figures, `fluency` measures
perplexity and last words, `annotated` how likely marked text is, `bootstrap` gives every figure an interval,
`classification` compares a classifier with human labels. These are pure given model outputs: no files, no Ray. Around
them, `subjects` says what one evaluation is of, `measuring` has its pieces done on a cluster by `worker`, and `figures`
makes `metrics.json` of their files.
"""

from ifguide.evaluation.annotated import AnnotatedTokens, annotated_figures, token_nll
from ifguide.evaluation.bootstrap import Bootstrap, Figure, Replicates, Resampled, benjamini_hochberg
from ifguide.evaluation.classification import classifier_agreement
from ifguide.evaluation.fluency import LastWordResult, PerplexityResult, last_word_accuracy, perplexity
from ifguide.evaluation.generation import Sampling, sample_continuations, sample_tokens, token_lengths
from ifguide.evaluation.metrics import MaskAgreement, behaviour_statistics, prompt_statistics, token_agreement

__all__ = [
    "AnnotatedTokens",
    "Bootstrap",
    "Figure",
    "LastWordResult",
    "MaskAgreement",
    "PerplexityResult",
    "Replicates",
    "Resampled",
    "Sampling",
    "annotated_figures",
    "behaviour_statistics",
    "benjamini_hochberg",
    "classifier_agreement",
    "last_word_accuracy",
    "perplexity",
    "prompt_statistics",
    "sample_continuations",
    "sample_tokens",
    "token_agreement",
    "token_lengths",
    "token_nll",
]
