"""The figures of all analyses with their intervals, from the results of the pieces.

`collect` gives the content of `analyses/analyses.json`:

    {"models": {model: {"lens": {"tokens": [...], "layers": [F by depth]},
                        "probes": {"texts": n, "layers": [{"accuracy": F, "auroc": F} by depth],
                                   "chosen": {"accuracy": F, "auroc": F, "depths": [depth by fold]}},
                        "gcg": {"exact": F, "flagged": F, "flagged_before": F, "loss": F, "first_loss": F,
                                "attacks": [one mapping a target]}}},
     "paired": {model: {"against": first model, "lens": D at the last depth, "gcg/<figure>": D}}}

with F a value and its interval of a bootstrap over prompts, texts or targets, D the difference to the first model
(`evaluation.bootstrap`): null where the tokens that the figure is of are not the first model's, as in models of two
tokenizers.

An attack succeeds as `exact` when greedy decoding after the prompt and the suffix gives the target token by token, as
`flagged` when `evaluate.classifier` flags the text greedily decoded after them (`evaluate.max_new_tokens`);
`flagged_before` is that of the prompt without a suffix.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ifguide.evaluation import Bootstrap, Replicates

GCG_FIGURES = ("exact", "flagged", "flagged_before", "loss", "first_loss")
BY_TOKENS = ("lens", "gcg/exact", "gcg/loss", "gcg/first_loss")  # of two models with the same tokens alone

Results = Mapping[str, Mapping[str, Any]]  # <method>-<number>-<model> -> a piece's result


@dataclass(kw_only=True)
class _Analysed:
    """One model: what is shown, the replicates that are paired, and by method the tokens that the figures are of."""

    shown: dict[str, Any] = field(default_factory=dict)
    replicates: dict[str, Replicates] = field(default_factory=dict)
    tokens: dict[str, Any] = field(default_factory=dict)


def collect(results: Results, models: Sequence[str], bootstrap: Bootstrap) -> dict[str, Any]:
    """The content of `analyses.json` from the pieces by key; see the module."""
    by_model: dict[str, dict[str, Mapping[str, Any]]] = {model: {} for model in models}
    for key, result in results.items():
        method, number, model = key.split("-", 2)  # a model's name may hold dashes
        by_model[model][f"{method}-{number}"] = result
    analysed = {model: _analysed(pieces, bootstrap) for model, pieces in by_model.items()}
    first = models[0]
    paired = {
        model: {"against": first, **_differences(analysed[model], analysed[first], bootstrap)} for model in models[1:]
    }
    return {"models": {model: item.shown for model, item in analysed.items()}, "paired": paired}


def _analysed(pieces: Mapping[str, Mapping[str, Any]], bootstrap: Bootstrap) -> _Analysed:
    analysed = _Analysed()
    if "lens-0000" in pieces:
        lens = pieces["lens-0000"]
        mass_NL = np.array(lens["mass"])
        depths = list(_replicates({f"{depth}": mass_N for depth, mass_N in enumerate(mass_NL.T)}, bootstrap).values())
        analysed.tokens["lens"] = (lens["tokens"], lens["token_ids"])
        analysed.replicates["lens"] = depths[-1]
        layers = [bootstrap.figure(depth).as_json() for depth in depths]
        analysed.shown["lens"] = {"tokens": lens["tokens"], "layers": layers}
    if "probes-0000" in pieces:
        analysed.shown["probes"] = pieces["probes-0000"]
    attacks = [result for key, result in pieces.items() if key.startswith("gcg-")]
    if attacks:
        values = {name: np.array([float(result[name]) for result in attacks]) for name in GCG_FIGURES}
        outcomes = _replicates(values, bootstrap)
        analysed.tokens["gcg"] = [result["target_ids"] for result in attacks]
        analysed.replicates |= {f"gcg/{name}": replicates for name, replicates in outcomes.items()}
        figures = {name: bootstrap.figure(replicates).as_json() for name, replicates in outcomes.items()}
        analysed.shown["gcg"] = {**figures, "attacks": attacks}
    return analysed


def _differences(model: _Analysed, first: _Analysed, bootstrap: Bootstrap) -> dict[str, dict[str, Any] | None]:
    differences: dict[str, dict[str, Any] | None] = {}
    for name, replicates in model.replicates.items():
        method = name.partition("/")[0]
        same = name not in BY_TOKENS or model.tokens[method] == first.tokens[method]
        differences[name] = bootstrap.difference(replicates, first.replicates[name]) if same else None
    return differences


def _replicates(values: Mapping[str, np.ndarray], bootstrap: Bootstrap) -> dict[str, Replicates]:
    return bootstrap.ratios({name: (values_N, np.ones(len(values_N))) for name, values_N in values.items()})
