"""The figures of the causal tests and their table: from losses of retrainings alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.common.over_seeds import t_interval
from bench.common.token_sets import correlation_intervals, predictions, rank_correlation
from ifguide.display import markdown_table

Bools = NDArray[np.bool_]
Scores = dict[str, NDArray[np.float32]]
PLAIN, RANDOM = "plain", "random"
MATCHED, OTHERS = "matched", "others"  # of a score's types: any uses at random, and those that it leaves in
NULLS = (MATCHED, OTHERS)
UNSEEN = "unseen"


def datamodelling(scores: Scores, halves: Sequence[Bools], behaviour: Mapping[str, float], seed: int) -> dict[str, Any]:
    """Rank correlation of predicted and actual behaviour over the halves that were trained on."""
    done = [index for index in range(len(halves)) if f"half-{index:03d}" in behaviour]
    if len(done) < 3:
        return {"halves": len(done)}
    actual = np.array([behaviour[f"half-{index:03d}"] for index in done])
    trained = [halves[index] for index in done]
    predicted = {name: predictions(each, trained) for name, each in scores.items()}
    predicted["tokens"] = predictions(np.ones_like(halves[0], float), trained)
    intervals = correlation_intervals(predicted, actual, seed)
    figures: dict[str, Any] = {
        f"lds_{name}": round(rank_correlation(each, actual), 4) for name, each in predicted.items()
    }
    figures |= {f"lds_{name}_interval": interval for name, interval in intervals.items()}
    return figures | {"halves": len(done)}


def effects(
    names: Sequence[str],
    masks: Mapping[int, Mapping[str, Bools]],
    behaviour: Mapping[str, float],
    negative: Mapping[str, float],
) -> dict[str, Any]:
    """Change of D by leaving tokens out, over seeds; of random tokens of the same types (`NULLS`), and what is above
    that. And the change of the `negative` queries' loss alone: what it costs where the behaviour is not asked for."""

    def changes(name: str, of: Mapping[str, float]) -> dict[int, float]:
        return {
            seed: of[f"seed{seed}-{name}"] - of[f"seed{seed}-{PLAIN}"]
            for seed in masks
            if {f"seed{seed}-{PLAIN}", f"seed{seed}-{name}"} <= of.keys()
        }

    D = {name: -value for name, value in behaviour.items()}
    figures: dict[str, Any] = {}
    for name in (*names, RANDOM):
        own = changes(name, D)
        values_of = {name: own}
        for null in NULLS if name != RANDOM else ():
            drawn = changes(f"{name}-{null}", D)
            above = {seed: own[seed] - drawn[seed] for seed in own.keys() & drawn.keys()}
            values_of |= {f"{name}_{null}": drawn, f"{name}_above_{null}": above}
            if drawn:
                shared = [(masks[s][name] & masks[s][f"{name}-{null}"]).sum() / masks[s][name].sum() for s in masks]
                figures[f"{null}_shared_{name}"] = round(float(np.mean(shared)), 4)
        for key, values in values_of.items():
            if values:
                of_seeds = list(values.values())
                ends = t_interval(of_seeds)
                figures[f"qld_{key}"] = round(float(np.mean(of_seeds)), 4)
                figures[f"qld_{key}_interval"] = ends and [round(end, 4) for end in ends]
        if own:
            figures[f"negative_{name}"] = round(float(np.mean([*changes(name, negative).values()])), 4)
            figures[f"qld_{name}_seeds"] = [round(own[seed], 4) for seed in sorted(own)]
    return figures


def as_markdown(result: Mapping[str, Any]) -> str:
    """A line for each score: LDS, the change of D, those of random tokens of the same types, and what is above them. A
    second table is of the queries that no score has seen."""
    tables = [_table(result, result)]
    if UNSEEN in result:
        tables.append("Queries that no score has seen:\n\n" + _table(result[UNSEEN], result))
    return "\n\n".join(tables)


def _table(figures: Mapping[str, Any], whole: Mapping[str, Any]) -> str:

    def cell(key: str, form: str) -> str:
        if key not in figures:
            return ""
        interval = figures.get(f"{key}_interval")
        return f"{figures[key]:{form}}" + (f" [{interval[0]:{form}}, {interval[1]:{form}}]" if interval else "")

    names = [key.removeprefix("qld_").removesuffix("_seeds") for key in figures if key.endswith("_seeds")]
    names += [key.removeprefix("lds_") for key in figures if key.startswith("lds_") and isinstance(figures[key], float)]
    marked = whole.get("marked") or {}
    rows = [
        (
            name,
            cell(f"lds_{name}", ".3f"),
            cell(f"qld_{name}", "+.2f"),
            *(cell(f"qld_{name}_{kind}{null}", "+.2f") for null in NULLS for kind in ("", "above_")),
            cell(f"negative_{name}", "+.2f"),
            f"{marked[name]:.3f}" if name in marked else "",
        )
        for name in dict.fromkeys(names)
    ]
    titles = [
        "score",
        "LDS",
        "change of D",
        "same types at random",
        "above that",
        "other uses of them",
        "above that",
        "loss of negative ones",
        "share in marked spans",
    ]
    return markdown_table(titles, rows)
