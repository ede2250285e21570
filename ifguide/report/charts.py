"""The charts of the report page, as inline SVG that takes the page's colours and is equal for equal data."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas

from ifguide.display import visible
from ifguide.evaluation.figures import NO_DOMAIN
from ifguide.report.contents import ReportData, ScoreHistogram, TrainingCurve
from ifguide.report.figures import Figure, Group, ModelRow, PromptSet

INK = "#010203"  # stands for the page's text colour, so that a chart reads on light and on dark
PALETTE = ("#8791a3", "#2f7de1", "#e0871b", "#1fa37c", "#a068d8", "#d1567f", "#2aa5b8", "#a3862b", "#6d78d6", "#b06a4c")
BOX_RED = "#df3b3b"
MARKERS = "soD^vPX*<>"  # ten, beside nine colours that repeat: ninety pairs
NAMED_BESIDE = 3  # models of a trade-off plot
WIDTH = 4.6  # inches; on a phone it is shown at about this size, so that text stays legible
RC: dict[Any, Any] = {
    **{"svg.hashsalt": "ifguide", "svg.fonttype": "none", "font.size": 8},
    **{"axes.linewidth": 0.6, "lines.linewidth": 1.4},
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
}


def colours_of(names: Iterable[str]) -> dict[str, str]:
    """A colour for each name, in order. Grey is the first's alone; the others repeat."""
    first, *rest = PALETTE
    return {name: rest[(index - 1) % len(rest)] if index else first for index, name in enumerate(dict.fromkeys(names))}


def charts_of(data: ReportData, colours: dict[str, str]) -> dict[str, Any]:
    """Inline SVG by section: `tradeoff`, `beside`, `behaviour`, `classes`, `training`: lists; `scores`: one or None for
    each behaviour; `groups`: a list for each further prompt set that has groups."""
    with matplotlib.rc_context(RC):
        return {
            "tradeoff": [
                _svg(tradeoff(data.models, colours, [name]), f"Expected maximum against held-out perplexity, by {name}")
                for name in evaluators_of(data.models)
                if any(model.perplexity for model in data.models)
            ],
            "beside": [
                _svg(beside(data.models, colours, name), f"Expected maximum over the reference's, by {name}")
                for name in evaluators_of(data.models)
                if any(model.beside for model in data.models)
            ],
            "behaviour": [_group_bars(data.models, metric, colours) for metric in ("emt", "tp")],
            "classes": _class_bars(data.models, colours),
            "groups": {
                prompt_set.name: _domain_bars(data.models, prompt_set, colours)
                for prompt_set in data.models[0].sets[1:]
                if len(prompt_set.groups) > 1
            },
            "training": _training(data.curves, colours),
            "scores": [
                _histogram(behaviour.histogram, behaviour.name) if behaviour.histogram else None
                for behaviour in data.behaviours
            ],
        }


# ---- figures with intervals ----------------------------------------------------------------------------


def evaluators_of(models: Iterable[ModelRow]) -> list[str]:
    """The names of the classes that classifiers judge the models by, in order."""
    return list(dict.fromkeys(label.name for model in models for label in model.whole.evaluators))


def tradeoff(models: Sequence[ModelRow], colours: dict[str, str], evaluators: Sequence[str]) -> Canvas:
    """The expected maximum (EMT) of all prompts against held-out perplexity, that of benign documents where some of the
    documents are flagged; down and to the left is better. A panel for each of the `evaluators`, one below the other.

    A few models are named beside their points; of more, whose names would cover each other, there is a legend."""
    beside = len(models) <= NAMED_BESIDE
    several = len(evaluators_of(models)) > 1
    canvas = Canvas(figsize=(5.2 if beside else 6.6, 3.4 * len(evaluators)), layout="constrained", facecolor="none")
    for panel, name in enumerate(evaluators, start=1):
        title = f"Down and to the left is better{f', by {visible(name)}' if several else ''}"
        axes = _panel(canvas, title, place=(len(evaluators), 1, panel))
        _points(axes, models, colours, name, beside=beside)
    if not beside:
        shown = [axes.get_legend_handles_labels() for axes in canvas.axes]
        named = {label: handle for handles, labels in shown for handle, label in zip(handles, labels, strict=True)}
        legend = canvas.legend(named.values(), named, loc="outside right center", fontsize=7, frameon=False)
        for text in legend.get_texts():
            text.set_parse_math(False)
    return canvas


def _points(axes: Axes, models: Sequence[ModelRow], colours: dict[str, str], evaluator: str, *, beside: bool) -> None:
    benign = any(model.benign_perplexity for model in models)
    axes.set_xlabel("perplexity of benign held-out documents" if benign else "held-out perplexity")
    axes.spines["left"].set_visible(True)
    axes.set_ylabel("EMT, all prompts")
    for index, model in enumerate(models):
        x = model.benign_perplexity if benign else model.perplexity
        if x is not None and not model.comparable(models[0], x):
            continue  # of other tokens than the first one's
        y = next((label.emt for label in model.whole.evaluators if label.name == evaluator), None)
        if x is None or x.value is None or y is None or y.value is None or not math.isfinite(x.value):
            continue
        axes.errorbar(
            [x.value], [y.value], xerr=_ends(x), yerr=_ends(y), fmt=MARKERS[index % len(MARKERS)],
            color=colours[model.name], ms=5, capsize=2, elinewidth=1, label=visible(model.name),
        )  # fmt: skip
        if beside:
            axes.annotate(
                visible(model.name), (x.value, y.value), (5, 4), textcoords="offset points", fontsize=7.5,
                parse_math=False,
            )  # fmt: skip
    axes.margins(x=0.12, y=0.12)


def beside(models: Sequence[ModelRow], colours: dict[str, str], evaluator: str) -> Canvas:
    """EMT over that of the reference, a line for each model with its interval; left of 1 it is less."""
    compared = [model for model in models if evaluator in model.beside]
    canvas, axes = _axes(f"By {visible(evaluator)}", height=0.75 + 0.2 * len(compared), grid="x")
    for place, model in enumerate(compared):
        change = model.beside[evaluator]["emt"]
        if change.ratio is None or change.ratio_low is None:
            continue
        high = math.inf if change.ratio_high is None else change.ratio_high
        ends = _ends(Figure(value=change.ratio, low=change.ratio_low, high=high))
        axes.errorbar([change.ratio], [place], xerr=ends, fmt="o", color=colours[model.name], ms=4.5, elinewidth=1.2)
    axes.axvline(1, color=INK, lw=0.8, alpha=0.6)
    axes.set_yticks(range(len(compared)), [_cut(visible(model.name)) for model in compared], parse_math=False)
    axes.set_ylim(len(compared) - 0.4, -0.6)
    axes.set_xlabel(f"EMT over that of {visible(compared[0].reference or '')}", parse_math=False)
    axes.spines["bottom"].set_visible(False)
    return canvas


def _group_bars(models: Sequence[ModelRow], metric: str, colours: dict[str, str]) -> Markup:
    names = group_names(models)
    rows = [{group.name: getattr(group, metric) for group in model.groups} for model in models]
    label = f"Bars of {metric.upper()} by prompt group; the table above has the figures"
    return _svg(_bars(metric.upper(), names, models, rows, colours), label)


def _class_bars(models: Sequence[ModelRow], colours: dict[str, str]) -> list[Markup]:
    names = list(dict.fromkeys(label.name for model in models for label in model.whole.classes))
    if len(names) < 2:
        return []
    rows = [{label.name: label.tp for label in model.whole.classes} for model in models]
    return [_svg(_bars("TP by class, all prompts", names, models, rows, colours), "Bars of TP by classifier class")]


def _domain_bars(models: Sequence[ModelRow], prompt_set: PromptSet, colours: dict[str, str]) -> list[Markup]:
    """One chart for each domain of the set: EMT by group."""
    rows = [
        {group.name: group.emt for own in model.sets if own.name == prompt_set.name for group in own.groups}
        for model in models
    ]
    charts = []
    for domain, groups in _domains(prompt_set).items():
        labels = {group.name: group.name.removeprefix(f"{group.domain}/" if group.domain else "") for group in groups}
        canvas = _bars(f"EMT, {visible(domain)}", list(labels), models, rows, colours, labels)
        charts.append(_svg(canvas, f"Bars of EMT by group of {prompt_set.name}, {domain}"))
    return charts


def _bars(
    title: str,
    names: Sequence[str],
    models: Sequence[ModelRow],
    rows: Sequence[dict[str, Figure]],
    colours: dict[str, str],
    labels: dict[str, str] | None = None,
) -> Canvas:
    """Horizontal bars in [0, 1] with intervals: names from the top, within each the models from the top."""
    thickness = 0.8 / len(models)
    row_height = max(0.24, 0.13 * len(models) + 0.06)
    canvas, axes = _axes(title, height=0.55 + row_height * len(names), grid="x")
    for index, (model, row) in enumerate(zip(models, rows, strict=True)):
        for place, name in enumerate(names):
            figure = row.get(name)
            if figure is None or figure.value is None:
                continue
            y = place + (index - (len(models) - 1) / 2) * thickness
            axes.barh(y, figure.value, thickness * 0.86, color=colours[model.name])
            if figure.low is not None and figure.high is not None:
                axes.plot([figure.low, figure.high], [y, y], color=INK, lw=0.8, alpha=0.75, solid_capstyle="butt")
            end = max(figure.value, figure.high or 0)
            axes.annotate(
                f"{figure.value:.2f}", (end, y), (2.5, 0), textcoords="offset points", va="center", fontsize=6.5
            )
    shown = [visible((labels or {}).get(name, name)) for name in names]
    axes.set_yticks(range(len(names)), [_cut(name) for name in shown], parse_math=False)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlim(0, max(1.0, axes.get_xlim()[1]))
    axes.spines["left"].set_visible(True)
    axes.spines["bottom"].set_visible(False)
    return canvas


def _domains(prompt_set: PromptSet) -> dict[str, list[Group]]:
    """domain -> its groups; groups that are of none are those of `NO_DOMAIN`."""
    domains: dict[str, list[Group]] = {}
    for group in prompt_set.groups[1:]:
        domains.setdefault(group.domain or NO_DOMAIN, []).append(group)
    return domains


def group_names(models: Iterable[ModelRow]) -> list[str]:
    """The groups of the models' first prompt set, in order."""
    return list(dict.fromkeys(group.name for model in models for group in model.groups))


# ---- training and scores -------------------------------------------------------------------------------


def _training(curves: Sequence[TrainingCurve], colours: dict[str, str]) -> list[Markup]:
    panels = {"benign_loss": "Benign loss", "masked_loss": "Masked loss", "learning_rate": "Learning rate"}
    shown = {name: drawn for name in panels if (drawn := [curve for curve in curves if getattr(curve, name)])}
    charts = []
    for name, drawn in shown.items():
        canvas, axes = _axes(panels[name], "step", width=WIDTH if len(shown) < 3 else 3.6, height=2.5)
        for index, curve in enumerate(drawn):
            values = np.array(getattr(curve, name), dtype=float)  # None becomes NaN: a gap in the line
            width = 2.8 if index == 0 and len(drawn) > 1 else 1.4  # the first shows behind others that follow it
            marker = "o" if len(values) == 1 else None
            axes.plot(curve.steps, values, color=colours[curve.model], lw=width, marker=marker, zorder=3 + index)
        axes.ticklabel_format(axis="y", style="sci", scilimits=(-3, 4))
        charts.append(_svg(canvas, f"{panels[name]} of each model by training step"))
    return charts


def _histogram(histogram: ScoreHistogram, behaviour: str) -> Markup:
    canvas, axes = _axes("Tokens per bin, log scale", histogram.measure)
    axes.stairs(histogram.counts, histogram.bin_edges, fill=True, color=PALETTE[0], alpha=0.6)
    if histogram.annotated_counts is not None:
        axes.stairs(histogram.annotated_counts, histogram.bin_edges, color=PALETTE[1], linewidth=1.4)
    highest = histogram.bin_edges[-1]
    reached = histogram.tau <= highest
    if reached:
        axes.axvline(histogram.tau, color=BOX_RED, linewidth=1.2, linestyle=(0, (4, 2)))
    place, note = (histogram.tau, f"τ = {histogram.tau:.3g}") if reached else (highest, "no token is above τ")
    axes.text(place, 1.02, note, transform=axes.get_xaxis_transform(), color=BOX_RED, ha="left" if reached else "right")
    axes.ticklabel_format(axis="x", style="sci", scilimits=(-2, 4))
    axes.set_yscale("log")
    axes.set_ylim(bottom=0.7)
    axes.minorticks_off()
    tau = f"tau at {histogram.tau:.3g}" if reached else "no token above tau"
    return _svg(canvas, f"Histogram of token scores for {behaviour} on a log scale, with {tau}")


# ---- the canvas ----------------------------------------------------------------------------------------


def _axes(
    title: str, xlabel: str = "", width: float = WIDTH, height: float = 2.6, grid: str = "y"
) -> tuple[Canvas, Axes]:
    canvas = Canvas(figsize=(width, height), layout="constrained", facecolor="none")
    axes = _panel(canvas, title, grid=grid)
    axes.set_xlabel(xlabel)
    return canvas, axes


def _panel(canvas: Canvas, title: str, place: tuple[int, int, int] = (1, 1, 1), grid: str = "y") -> Axes:
    axes = canvas.add_subplot(*place, facecolor="none")
    axes.set_title(title, loc="left", fontsize=9, fontweight="bold", pad=10, parse_math=False)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.grid(axis="x" if grid == "x" else "y", color=INK, alpha=0.12, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, pad=4)
    return axes


def _ends(figure: Figure) -> list[list[float]] | None:
    """The lengths of the whiskers below and above the value."""
    if figure.value is None or figure.low is None or figure.high is None or math.isinf(figure.high):
        return None
    return [[max(0.0, figure.value - figure.low)], [max(0.0, figure.high - figure.value)]]


def _cut(name: str, most: int = 34) -> str:
    return name if len(name) <= most else f"{name[: most - 1]}…"


def _svg(canvas: Canvas, label: str) -> Markup:
    """The canvas as an `<svg>` to put inside HTML: no prolog, no metadata, ids of its own, the page's colours."""
    buffer = io.StringIO()
    canvas.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    view_box = re.search(r'viewBox="[^"]*"', svg)
    assert view_box is not None
    opening = Markup('<svg role="img" aria-label="{}" ').format(visible(label)) + Markup(f"{view_box.group()}>")
    svg = opening + Markup(svg[svg.index(">") + 1 :])
    # One page holds several figures: ids that repeat would make a clip path of one apply to another.
    prefix = re.sub(r"\W+", "-", label.lower())
    return Markup(re.sub(r'(\bid="|href="#|url\(#)', lambda found: f"{found.group()}{prefix}-", svg))
