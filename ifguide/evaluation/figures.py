"""Every figure of an evaluation with its interval, from the files of the report's and the generations' folders.

`measure` gives the content of `report/metrics.json`:

    {"threshold", "bootstrap_samples", "confidence", "grouped_by": {"label": n, "classifier": n},
     "evaluators": [class, ...], "unlisted": {class: evaluator}, "domains": {set: {group: domain}},
     "models": {model: {"sets": {set: {"groups": {group: FIGURES}, "gaps": {domain: FIGURES}}},
                        "perplexity": F, "benign_perplexity": F, "annotated_nll": F, "margin": F, "type_margin": F,
                        "last_word_accuracy": F, "last_token_accuracy": F,
                        "lm_eval": {task: {metric: F}}}},
     "paired": {model: {"against": first model, the same with D in place of F}},
     "reference": null or {"model": name, "paired": {model: {"emt": {class: D}, "tp": {class: D}, "margin": D,
                                                             "type_margin": D}}}}

    FIGURES = {"prompts": n, "emt": {class: F}, "tp": {class: F}, "mean": {class: F}, "rep_4": F, "distinct_2": F, ...}
    F = {"value", "low", "high", "n"}
    D = {"difference", "low", "high", "p_value", "n"}, model less the first one, with {"ratio", "ratio_low",
        "ratio_high"}, model over the first one; a ratio with no "ratio_high" (null) has no upper bound

`reference` has the D of every further model against one more model, on all prompts of the first set and of annotated
documents: a comparison's against the run's own penalised one.

`evaluators` are the classes that figures are compared by: the primary class of `evaluate.classifier`, then that of each
of `evaluate.classifiers`, which has its name. Any other class is one more label of one of these classifiers, but with
`evaluate.word_list` those of `unlisted`, `<evaluator> without listed words`: the same figures with the score of every
continuation that holds a listed word taken as 0. So EMT is of the highest score among a prompt's other continuations, 0
where it has none, TP the share of prompts that draw the behaviour at least once without a listed word, and both are at
most those of all continuations. `listed` is the share of continuations that hold a listed word.

Groups of `evaluate.prompts` are `all`, `with <behaviour>` and `without <behaviour>` (the prompt itself shows it, by its
label, or by the classifier if it has none: `grouped_by` counts them), and with a word list `with a listed word` and
`without a listed word` (in the prompt itself); those of other sets their own, `domain/group` for
BOLD. `domains` says of which domain each of these is, `""` where it is of none. `gaps` are the largest group's figure
less the smallest's in a domain; those of no domain are the domain `groups`. `perplexity` is of all held-out documents,
`benign_perplexity` of those that the classifier does not flag: null where it flags none, for it is the same then. A
model that has unlearned the behaviour finds flagged text surprising, as it should. `annotated_nll`, `margin` and
`type_margin`, in nats a token, are those of `evaluation.annotated`. A figure that was not measured, or of models that
cannot be paired, is null. `measure_models` adds `lm_eval`, if there are benchmarks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ifguide import schemas
from ifguide.artifacts import verified_files
from ifguide.config import Evaluate
from ifguide.distributed.shards import StageError
from ifguide.evaluation import AnnotatedTokens, Bootstrap, Replicates, Resampled, annotated_figures
from ifguide.evaluation.bootstrap import gap
from ifguide.evaluation.metrics import BY_CLASS, THRESHOLD, Statistics, behaviour_statistics, prompt_statistics
from ifguide.evaluation.prompts import PROMPTS
from ifguide.evaluation.subjects import VERB, Evaluation, Prompts
from ifguide.storage import file_sizes
from ifguide.toxicity import WHOLE
from ifguide.words import WordList

METRICS = "metrics.json"
CONTINUATIONS, FLUENCY = "continuations", "fluency"
NO_DOMAIN = "groups"  # what the groups that are of no domain are called together
PERPLEXITIES = ("perplexity", "benign_perplexity")
MARGINS = ("margin", "type_margin")  # those of the figures of annotated text that are compared with a reference
ANNOTATED_TITLES = {
    "annotated_nll": "NLL of annotated tokens",
    "margin": "margin of annotated tokens",
    "type_margin": "margin, token types held equal",
}
FLUENCY_TITLES = {
    **{name: name.replace("_", " ") for name in PERPLEXITIES},
    **ANNOTATED_TITLES,
    "last_word_accuracy": "last-word accuracy",
    "last_token_accuracy": "last-token accuracy",
}  # figures that no continuation is needed for, and what they are called

Figures = dict[str, Replicates]  # a figure by class is named figure/class


@dataclass(frozen=True, kw_only=True)
class _Measured:
    """One model: set -> "groups" and "gaps" -> name -> figures; fluency, None where not measured; and by kind of text
    its tokens: of each held-out block, or the ids of the annotated documents."""

    sets: dict[str, dict[str, dict[str, Figures]]]
    fluency: dict[str, Replicates | None]
    tokens: dict[str, np.ndarray]


def measured_files(report: Path) -> list[Path]:
    """The Parquet files of continuations and fluency in a report's folder."""
    folders = (report / CONTINUATIONS, report / FLUENCY)
    return [folder / name for folder in folders for name in file_sizes(folder) if name.endswith(".parquet")]


def scored_file(report: Path, model: str, prompt_set: str, number: int) -> Path:
    """Where a shard's continuations lie with their scores; those of further sets in folders of their own."""
    folder = report / CONTINUATIONS
    return (folder if prompt_set == PROMPTS else folder / prompt_set) / f"{model}-{number:07d}.parquet"


def fluency_file(report: Path, model: str, kind: str) -> Path:
    """Where a model's NLL by block (`heldout`) or token (`annotated`), or last words by text (`cloze`), lie."""
    return report / FLUENCY / f"{model}-{kind}.parquet"


def measure(evaluation: Evaluation, prompts: Mapping[str, Any]) -> dict[str, Any]:
    """All figures of all models; see the module. `prompts`: which are `flagged`, and `grouped_by`.

    Raises:
        StageError: a continuation has no score.
    """
    flagged_P = np.array(prompts["flagged"], dtype=bool)
    bootstrap = Bootstrap(samples=evaluation.options.bootstrap_samples, seed=evaluation.seed)
    measured = {model: _measure_model(evaluation, model, flagged_P, bootstrap) for model in evaluation.models}
    (first, *others), reference = measured, evaluation.reference or ""
    evaluators = _evaluators(measured[first].sets[PROMPTS]["groups"][WHOLE], evaluation)
    return {
        "threshold": THRESHOLD,
        "bootstrap_samples": bootstrap.samples,
        "confidence": bootstrap.confidence,
        "grouped_by": prompts["grouped_by"],
        "evaluators": evaluators,
        "unlisted": {_unlisted(label): label for label in evaluators if evaluation.options.word_list},
        "domains": {name: _domains(rows) for name, rows in evaluation.sets.items() if name != PROMPTS},
        "models": {model: _shown(of_model, bootstrap) for model, of_model in measured.items()},
        "paired": {
            model: {"against": first, **_compared(measured[model], measured[first], bootstrap)} for model in others
        },
        "reference": _beside(measured, reference, bootstrap) if reference in others else None,
    }


def _evaluators(figures: Mapping[str, Any], evaluation: Evaluation) -> list[str]:
    """The classes that models are compared by, from figures by class, the primary one first."""
    primary = next(name.partition("/")[2] for name in figures if name.startswith("emt/"))
    return [primary, *evaluation.options.classifiers]


def _unlisted(label: str) -> str:
    return f"{label} without listed words"


def _measure_model(evaluation: Evaluation, model: str, flagged_P: np.ndarray, bootstrap: Bootstrap) -> _Measured:
    sets = {}
    for name, rows in evaluation.sets.items():
        items = _items(evaluation, model, name, rows)
        parts = {
            group: {figure: (num[mask], den[mask]) for figure, (num, den) in items.items()}
            for group, mask in _groups(name, rows, flagged_P, evaluation.options).items()
        }
        groups = {group: bootstrap.ratios(part) for group, part in parts.items()}
        sets[name] = {"groups": groups, "gaps": _gaps(parts, _domains(rows), bootstrap) if name != PROMPTS else {}}
    fluency, tokens = _fluency(evaluation.report, model, bootstrap)
    return _Measured(sets=sets, fluency=fluency, tokens=tokens)


def _shown(model: _Measured, bootstrap: Bootstrap) -> dict[str, Any]:
    """Every figure with its interval."""

    def with_intervals(figures: Figures) -> dict[str, Any]:
        shown = {name: bootstrap.figure(value).as_json() for name, value in figures.items()}
        return {"prompts": next(iter(figures.values())).n, **_tree(shown)}

    fluency = {name: bootstrap.figure(value).as_json() if value else None for name, value in model.fluency.items()}
    return {"sets": _show(model.sets, lambda figures, *_: with_intervals(figures)), **fluency}


def _compared(model: _Measured, base: _Measured, bootstrap: Bootstrap) -> dict[str, Any]:
    """Every figure less the other model's, with interval and p value."""

    def differences(figures: Figures, name: str, kind: str, group: str) -> dict[str, Any]:
        other = base.sets[name][kind][group]
        return _tree({figure: bootstrap.difference(value, other[figure]) for figure, value in figures.items()})

    fluency = {name: _text_difference(model, base, name, bootstrap) for name in model.fluency}
    return {"sets": _show(model.sets, differences), **fluency}


def _text_difference(model: _Measured, base: _Measured, name: str, bootstrap: Bootstrap) -> dict[str, Any] | None:
    """Of a figure of `FLUENCY_TITLES`; None where one of the two lacks it, or they cannot be paired."""
    value, other = model.fluency[name], base.fluency[name]
    kind = "heldout" if name in PERPLEXITIES else "annotated" if name in ANNOTATED_TITLES else ""
    # Blocks of two tokenizers are not the same text, nor do spans hold the same tokens.
    same_text = not kind or np.array_equal(model.tokens.get(kind, ()), base.tokens.get(kind, ()))
    return bootstrap.difference(value, other) if value and other and same_text else None


def _beside(measured: Mapping[str, _Measured], reference: str, bootstrap: Bootstrap) -> dict[str, Any]:
    """EMT and TP of every model but the first, less those of the reference, on all prompts of the first set; and the
    margins of annotated text."""
    whole = {model: found.sets[PROMPTS]["groups"][WHOLE] for model, found in measured.items()}
    base = whole[reference]
    return {
        "model": reference,
        "paired": {
            model: _tree(
                {
                    name: bootstrap.difference(value, base[name])
                    for name, value in figures.items()
                    if name.startswith(("emt/", "tp/"))
                }
            )
            | {name: _text_difference(measured[model], measured[reference], name, bootstrap) for name in MARGINS}
            for model, figures in list(whole.items())[1:]
            if model != reference
        },
    }


def _show(sets: Mapping[str, Any], show: Callable[[Figures, str, str, str], dict[str, Any]]) -> dict[str, Any]:
    return {
        name: {
            kind: {group: show(figures, name, kind, group) for group, figures in groups.items()}
            for kind, groups in kinds.items()
        }
        for name, kinds in sets.items()
    }


def headline(metrics: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What the manifest's summary says of each model besides the report's own figures."""
    summary: dict[str, dict[str, Any]] = {}
    for model, measured in metrics["models"].items():
        figures = measured["sets"][PROMPTS]["groups"][WHOLE]
        primary = next(iter(figures["emt"]))
        named = {"emt": figures["emt"][primary], "tp": figures["tp"][primary]}
        named |= {name: measured[name] for name in (*PERPLEXITIES, "last_word_accuracy") if measured[name]}
        summary[model] = {f"{name}_interval": [figure["low"], figure["high"]] for name, figure in named.items()}
        if measured["last_token_accuracy"]:
            summary[model]["last_token_accuracy"] = measured["last_token_accuracy"]["value"]
        summary[model] |= {name: figures[name]["value"] for name in ("rep_4", "distinct_2", "tokens")}
        paired = metrics["paired"].get(model)
        if paired:
            both = paired["sets"][PROMPTS]["groups"][WHOLE]
            summary[model] |= {f"{name}_p_value": both[name][primary]["p_value"] for name in ("emt", "tp")}
    return summary


def _groups(name: str, rows: Prompts, flagged_P: np.ndarray, options: Evaluate) -> dict[str, np.ndarray]:
    everything = {WHOLE: np.ones(len(rows), dtype=bool)}
    if name == PROMPTS:
        groups = {**everything, f"with {options.behaviour}": flagged_P, f"without {options.behaviour}": ~flagged_P}
        if options.word_list:
            words = WordList(options.word_list)
            listed_P = np.array([words.any_in(row.prompt) for row in rows])
            groups |= {"with a listed word": listed_P, "without a listed word": ~listed_P}
        return groups
    names = [row.group_name for row in rows]
    return everything | {group: np.array([own == group for own in names]) for group in _domains(rows)}


def _domains(rows: Prompts) -> dict[str, str]:
    """Group -> its domain, of the rows of a further set; groups in order of their names."""
    domains = {row.group_name: row.domain for row in rows}
    return {group: domains[group] for group in sorted(domains.keys() - {""})}


def _gaps(parts: Mapping[str, Resampled], domain_of: Mapping[str, str], bootstrap: Bootstrap) -> dict[str, Figures]:
    """domain -> the gap between its groups in each figure by class; domains of one group are left out.

    `domain_of`: of each group. Groups are of different prompts: each has a stream of draws of its own, which is every
    model's."""
    domains: dict[str, dict[str, Figures]] = {}
    for stream, (group, part) in enumerate(parts.items()):
        if group != WHOLE:
            by_class = {figure: items for figure, items in part.items() if figure.split("/")[0] in BY_CLASS}
            groups = domains.setdefault(domain_of[group] or NO_DOMAIN, {})
            groups[group] = bootstrap.ratios(by_class, stream=stream)
    return {
        domain: {
            figure: gap({name: figures[figure] for name, figures in groups.items()})
            for figure in next(iter(groups.values()))
        }
        for domain, groups in domains.items()
        if len(groups) > 1
    }


def _items(evaluation: Evaluation, model: str, name: str, rows: Prompts) -> Resampled:
    """Numerator and denominator of every figure, by prompt in the order of `rows`."""
    tokens, scores, listed_PK = _continuations(evaluation, model, name, rows)
    items: Statistics = {}
    for label, table_PK in scores.items():
        if np.isnan(table_PK).any():
            row = rows[int(np.isnan(table_PK).any(axis=1).argmax())].row
            raise StageError(f"{VERB}: {model}, prompt {row} of {name}: a continuation has no {label} score")
        items |= {f"{figure}/{label}": parts for figure, parts in behaviour_statistics(table_PK).items()}
    if listed_PK is None:
        return items | prompt_statistics(tokens)
    for label in _evaluators(items, evaluation):
        unlisted = behaviour_statistics(np.where(listed_PK, 0.0, scores[label]))
        items |= {f"{figure}/{_unlisted(label)}": parts for figure, parts in unlisted.items()}
    count_P = np.full(len(rows), float(evaluation.options.continuations))
    return items | prompt_statistics(tokens) | {"listed": (listed_PK.sum(axis=1).astype(np.float64), count_P)}


def _continuations(
    evaluation: Evaluation, model: str, name: str, rows: Prompts
) -> tuple[list[list[list[int]]], dict[str, np.ndarray], np.ndarray | None]:
    """Of each prompt's continuations the tokens, the scores by class, NaN where there is none, and whether they hold a
    word of the list (None without a list)."""
    continuations, words = evaluation.options.continuations, WordList(evaluation.options.word_list)
    place = {row.row: i for i, row in enumerate(rows)}
    tokens: list[list[list[int]]] = [[[]] * continuations for _ in rows]
    scores: dict[str, np.ndarray] = {}
    listed_PK = np.zeros((len(rows), continuations), dtype=bool)
    for number, path in enumerate(verified_files(evaluation.generations[model] / name)):
        generated = schemas.read_table(path, schemas.GENERATIONS)
        scored = schemas.read_table(scored_file(evaluation.report, model, name, number), schemas.CONTINUATIONS)
        if not scored.select(["prompt_row", "sample"]).equals(generated.select(["prompt_row", "sample"])):
            raise StageError(f"{VERB}: the scores of {path} are of other continuations; delete {evaluation.report}")
        at = np.array([place[row] for row in generated.column("prompt_row").to_pylist()])
        sample = generated.column("sample").to_numpy()
        for i, k, ids in zip(at.tolist(), sample.tolist(), generated.column("tokens").to_pylist(), strict=True):
            tokens[i][k] = ids
        listed_PK[at, sample] = [words.any_in(text) for text in generated.column("continuation").to_pylist()]
        for label, values in _classes(scored.column("scores")).items():
            table_PK = scores.setdefault(label, np.full((len(rows), continuations), np.nan))
            table_PK[at, sample] = values
    return tokens, scores, listed_PK if words.words else None


def _classes(column: pa.ChunkedArray) -> dict[str, np.ndarray]:
    """The scores of each class from a column of maps, which all have the same keys in the same order."""
    maps = column.combine_chunks()
    rows = len(maps)
    names = [name for name, _ in maps[0].as_py()] if rows else []
    keys = maps.keys.dictionary_encode()
    indices = keys.indices.to_numpy().reshape(rows, len(names)) if rows else np.empty((0, 0))
    if rows and (indices != indices[0]).any():
        raise StageError(f"{VERB}: continuations of one shard have scores of different classes")
    values = maps.items.to_numpy().reshape(rows, len(names))
    return {name: values[:, i] for i, name in enumerate(names)}


def _fluency(
    report: Path, model: str, bootstrap: Bootstrap
) -> tuple[dict[str, Replicates | None], dict[str, np.ndarray]]:
    """The figures of `FLUENCY_TITLES`, None where not measured; and `_Measured.tokens`."""
    figures: dict[str, Replicates | None] = dict.fromkeys(FLUENCY_TITLES)
    measured: dict[str, np.ndarray] = {}
    heldout, annotated, cloze = (fluency_file(report, model, kind) for kind in ("heldout", "annotated", "cloze"))
    if heldout.exists():
        table = schemas.read_table(heldout, schemas.HELDOUT)
        nll, tokens = (table.column(name).to_numpy().astype(np.float64) for name in ("nll", "tokens"))
        benign = ~table.column("flagged").to_numpy()
        kinds = {"perplexity": np.ones_like(benign)}
        if (tokens[benign] > 0).any() and not benign.all():
            kinds["benign_perplexity"] = benign
        for name, kind in kinds.items():
            figures[name] = bootstrap.ratios({"nll": (nll[kind], tokens[kind])})["nll"].map(_exp)
        measured["heldout"] = tokens
    if annotated.exists():
        read = AnnotatedTokens.of(schemas.read_table(annotated, schemas.ANNOTATED))
        figures |= annotated_figures(read, bootstrap)
        measured["annotated"] = read.ids_N
    if cloze.exists():
        table = schemas.read_table(cloze, schemas.CLOZE)
        usable = table.column("word_correct").is_valid().to_numpy().astype(np.float64)
        for name, label in (("word_correct", "last_word_accuracy"), ("token_correct", "last_token_accuracy")):
            correct = table.column(name).fill_null(False).to_numpy().astype(np.float64)
            figures[label] = bootstrap.ratios({label: (correct, usable)})[label]
    return figures, measured


def _exp(nll: Any) -> Any:
    with np.errstate(over="ignore"):
        return np.exp(nll)


def _tree(flat: Mapping[str, Any]) -> dict[str, Any]:
    """`emt/toxicity` -> {"emt": {"toxicity": ...}}."""
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        figure, slash, label = name.partition("/")
        if slash:
            tree.setdefault(figure, {})[label] = value
        else:
            tree[name] = value
    return tree
