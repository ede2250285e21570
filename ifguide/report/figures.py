"""The measured figures of models as the report shows them: plain dataclasses, read from `report/metrics.json`.

`evaluation.figures` describes that file and makes it; every figure has its interval there already, and every
model but the first its paired difference from the first one. Nothing is computed here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ifguide.evaluation.figures import FLUENCY_TITLES, MARGINS
from ifguide.evaluation.metrics import BY_CLASS


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A value with the ends of its interval; None where they are undefined."""

    value: float | None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, kw_only=True)
class Difference(Interval):
    """A model's figure less another's on the same items, with interval and two-sided bootstrap p value; and the `ratio`
    of the two, None where the other's is 0. An infinite end of its interval is None."""

    p_value: float | None
    ratio: float | None = None
    ratio_low: float | None = None
    ratio_high: float | None = None


@dataclass(frozen=True, kw_only=True)
class Figure(Interval):
    """A model's figure. `difference` is None for the first model, and where the two cannot be paired."""

    difference: Difference | None = None


@dataclass(frozen=True, kw_only=True)
class ClassFigures:
    """A classifier class on one group of prompts: expected maximum, share of prompts (TP), mean score.

    `kind`: models are compared by an `evaluator`, the class that its classifier judges by, and by what it says where
    continuations with a listed word do not count (`unlisted`); not by any other `label` of a classifier."""

    name: str
    emt: Figure
    tp: Figure
    mean: Figure
    kind: Literal["evaluator", "unlisted", "label"] = "label"


@dataclass(frozen=True, kw_only=True)
class Group:
    """One group of prompts, or the gap between the groups of a domain (largest figure less smallest).

    `classes[0]` is the primary one. `text`: figures of the continuations' tokens, such as `rep_4` and `distinct_2`;
    a gap has none. `domain`: that of a group which has one; its name begins with it."""

    name: str
    prompts: int
    classes: tuple[ClassFigures, ...]
    text: dict[str, Figure] = field(default_factory=dict)
    domain: str = ""

    @property
    def evaluators(self) -> tuple[ClassFigures, ...]:
        """What each classifier judges by, the primary class first."""
        return tuple(label for label in self.classes if label.kind == "evaluator" or label is self.classes[0])

    @property
    def compared(self) -> tuple[ClassFigures, ...]:
        """The classes that models are compared by: the evaluators, and these without listed words."""
        return self.evaluators + tuple(label for label in self.classes if label.kind == "unlisted")

    @property
    def emt(self) -> Figure:
        return self.classes[0].emt

    @property
    def tp(self) -> Figure:
        return self.classes[0].tp


@dataclass(frozen=True, kw_only=True)
class PromptSet:
    """A set of prompts; `groups[0]` is all of them, `gaps` are named by domain."""

    name: str
    groups: tuple[Group, ...]
    gaps: tuple[Group, ...] = ()


def masked_loss(objective: str, penalty: float) -> str:
    """What masked tokens carried, in a word and a number; without a penalty they are ignored, whatever the kind."""
    return "ignore" if objective == "ignore" or penalty == 0 else f"{objective} {penalty:g}"


@dataclass(frozen=True, kw_only=True)
class Made:
    """How a model came about: `by` in words, and of the training it has its weights from the share of tokens masked
    and what they carried.

    `decodes` names the model whose weights a decoding method leaves as they are."""

    by: str = "given"
    masked_share: float | None = None
    objective: str | None = None
    penalty: float | None = None
    decodes: str | None = None

    @property
    def masked_loss(self) -> str | None:
        """Kind and weight of the masked tokens' loss; None where nothing was masked."""
        return None if self.objective is None or self.penalty is None else masked_loss(self.objective, self.penalty)


@dataclass(frozen=True, kw_only=True)
class ModelRow:
    """A model's figures; `sets[0]` is the set that the summary speaks of. Accuracies are in [0, 1].

    Where `made` says that it decodes another's weights, the fluency figures are those of that model. `beside`: class ->
    `emt` and `tp` -> the difference from one more model, `reference`, on all prompts of the first set.
    `margins_beside`: that of `margin` and `type_margin`."""

    name: str
    sets: tuple[PromptSet, ...]
    perplexity: Figure | None = None
    benign_perplexity: Figure | None = None
    annotated_nll: Figure | None = None
    margin: Figure | None = None
    type_margin: Figure | None = None
    last_word_accuracy: Figure | None = None
    last_token_accuracy: Figure | None = None
    benchmarks: dict[str, Figure] = field(default_factory=dict)  # of lm-evaluation-harness: "task, metric"
    made: Made = Made()
    reference: str | None = None
    beside: dict[str, dict[str, Difference]] = field(default_factory=dict)
    margins_beside: dict[str, Difference] = field(default_factory=dict)

    @property
    def groups(self) -> tuple[Group, ...]:
        return self.sets[0].groups

    @property
    def whole(self) -> Group:
        """All prompts of the first set."""
        return self.groups[0]

    def comparable(self, base: ModelRow, figure: Figure) -> bool:
        """Whether a fluency figure can be set against the base's: it is paired with that, or is the base's own."""
        return figure.difference is not None or base.name in (self.name, self.made.decodes)

    @property
    def fluency(self) -> dict[str, Figure | None]:
        """The figures of `FLUENCY_TITLES` by what they are called, None where not measured."""
        return {title: getattr(self, name) for name, title in FLUENCY_TITLES.items()}


def model_rows(metrics: Mapping[str, Any], made: Mapping[str, Made] | None = None) -> tuple[ModelRow, ...]:
    """One row for each model of `metrics`, in its order, each with how it was made where that is known."""
    rows: list[ModelRow] = []
    kinds_of = dict.fromkeys(metrics["evaluators"], "evaluator") | dict.fromkeys(metrics["unlisted"], "unlisted")
    reference = metrics["reference"] or {"model": None, "paired": {}}
    for name, measured in metrics["models"].items():
        paired = metrics["paired"].get(name, {})
        how = (made or {}).get(name, Made())
        source = how.decodes or name
        fluency = {
            key: _figure(metrics["models"][source][key], metrics["paired"].get(source, {}).get(key))
            for key in FLUENCY_TITLES
            if metrics["models"][source].get(key)  # a figure that an older report has not
        }
        benchmarks = {
            f"{task}, {metric}": _figure(figure, None)
            for task, figures in metrics["models"][source].get("lm_eval", {}).items()
            for metric, figure in figures.items()
        }
        sets = (
            PromptSet(
                name=set_name,
                groups=_groups(
                    kinds["groups"],
                    _below(paired, "sets", set_name, "groups"),
                    kinds_of,
                    metrics["domains"].get(set_name, {}),
                ),
                gaps=_groups(kinds["gaps"], _below(paired, "sets", set_name, "gaps"), kinds_of),
            )
            for set_name, kinds in measured["sets"].items()
        )
        beside = _below(reference, "paired", name)
        rows.append(
            ModelRow(
                name=name,
                sets=tuple(sets),
                **fluency,
                benchmarks=benchmarks,
                made=how,
                reference=reference["model"] if beside else None,
                beside={
                    label: {kind: _difference(beside[kind][label]) for kind in ("emt", "tp")}
                    for label in _below(beside, "emt")
                    if label in kinds_of
                },
                margins_beside={name: _difference(beside[name]) for name in MARGINS if beside.get(name)},
            )
        )
    return tuple(rows)


def _groups(
    groups: Mapping[str, Any], paired: Mapping[str, Any], kinds: Mapping[str, Any], domains: Mapping[str, str] = {}
) -> tuple[Group, ...]:
    return tuple(
        _group(name, figures, paired.get(name, {}), kinds, domains.get(name, "")) for name, figures in groups.items()
    )


def _group(
    name: str, figures: Mapping[str, Any], paired: Mapping[str, Any], kinds: Mapping[str, Any], domain: str
) -> Group:
    classes = (
        ClassFigures(
            name=label,
            kind=kinds.get(label, "label"),
            **{kind: _figure(figures[kind][label], _below(paired, kind).get(label)) for kind in BY_CLASS},
        )
        for label in figures["emt"]
    )
    text = {key: _figure(value, paired.get(key)) for key, value in figures.items() if key not in ("prompts", *BY_CLASS)}
    return Group(name=name, prompts=figures["prompts"], classes=tuple(classes), text=text, domain=domain)


def _figure(figure: Mapping[str, Any], paired: Mapping[str, Any] | None) -> Figure:
    difference = _difference(paired) if paired else None
    return Figure(value=figure["value"], low=figure["low"], high=figure["high"], difference=difference)


def _difference(paired: Mapping[str, Any]) -> Difference:
    ends = {name: paired[name] for name in ("low", "high", "p_value", "ratio", "ratio_low", "ratio_high")}
    return Difference(value=paired["difference"], **ends)


def _below(tree: Mapping[str, Any], *names: str) -> Mapping[str, Any]:
    for name in names:
        tree = tree.get(name, {})
    return tree
