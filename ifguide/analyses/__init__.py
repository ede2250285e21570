"""What a trained model holds inside, after training: logit lens, linear probes, adversarial suffixes.

The analyses of IF-Guide (arXiv 2506.01790): does a penalised model no longer represent the behaviour, or does it only
not say it? The analyses are pure given a model: no files, no Ray. `worker` does one of them on one model, `inputs` says
which there are, `figures` and `summary` make of their results what is shown.
"""

from ifguide.analyses.adversarial import Attack, Budget, attack, greedy_continuation, one_hot_gradient, target_losses
from ifguide.analyses.lens import LogitLens, overrepresented_tokens
from ifguide.analyses.probes import probe_layers
from ifguide.analyses.residuals import final_norm, mean_residuals

__all__ = [
    "Attack",
    "Budget",
    "LogitLens",
    "attack",
    "final_norm",
    "greedy_continuation",
    "mean_residuals",
    "one_hot_gradient",
    "overrepresented_tokens",
    "probe_layers",
    "target_losses",
]
