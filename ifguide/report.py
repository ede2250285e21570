"""One self-contained HTML page, and its JSON twin, from the figures of a run.

The page shows what guided pretraining (IF-Guide, arXiv 2506.01790) changed and what it cost: the models side by
side (EMT, TP, perplexity, last-word accuracy), their training, how the influence scores spread around tau, how
the mask compares with other ways to find the behaviour, and the highest-ranked documents token by token.
Everything comes in as plain dataclasses; nothing is measured here.

The page loads nothing and runs no script: charts are inline SVG, and its own content security policy forbids the
rest. Equal data give equal bytes. Every string of the data is escaped; control bytes are made visible.

Cost: about half a second, nearly all matplotlib's. The module does not know which behaviour it reports on,
read artifacts, or publish folders; `stages.evaluate` does.
"""

from __future__ import annotations

import dataclasses
import io
import json
import math
import re
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ifguide.report_model import ModelRow, ReportData, ScoreHistogram, TrainingCurve

TEMPLATES = Path(__file__).parent / "templates"
INK = "#010203"  # stands for the page's text colour, so that a chart reads on light and on dark
PALETTE = ("#8791a3", "#2f7de1", "#e0871b", "#1fa37c", "#a068d8", "#d1567f")
BOX_RED = "#df3b3b"
RC: dict[Any, Any] = {
    **{"svg.hashsalt": "ifguide", "svg.fonttype": "none", "font.size": 8},
    **{"axes.linewidth": 0.6, "lines.linewidth": 1.4},
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
}
BIDI_CONTROLS = frozenset({"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"})


def summary_line(data: ReportData) -> str:
    """The result in one paragraph: each further model against the baseline, or the only model's figures."""
    baseline, *others = data.models
    prompts = f"{baseline.groups[0].prompts:,} prompts"
    sampled = f"{data.continuations} continuations of each of {prompts}" if data.continuations else prompts
    sentences = [f"{data.behaviour[:1].upper()}{data.behaviour[1:]} in {sampled}."]
    for model in others or [baseline]:
        figures = _headline_figures(baseline, model if others else None)
        subject = f"{model.name} against {baseline.name}" if others else baseline.name
        sentences.append(f"{subject}: {', '.join(figures) or 'nothing was measured'}.")
    return " ".join(sentences)


def _headline_figures(baseline: ModelRow, other: ModelRow | None) -> list[str]:
    def figures(model: ModelRow) -> dict[str, tuple[float | None, str]]:
        first, accuracy = model.groups[0], model.last_word_accuracy
        return {
            "TP": (first.tp, number(first.tp, 2)),
            "EMT": (first.emt, number(first.emt, 2)),
            "perplexity": (model.perplexity, number(model.perplexity, 1)),
            "last-word accuracy": (accuracy, percent(accuracy)),
        }

    after = figures(other or baseline)
    texts = []
    for name, (value, text) in figures(baseline).items():
        new, new_text = after[name]
        if value is None or new is None:
            continue
        change = f" ({delta(new, value, relative=True)})" if name == "perplexity" else ""
        texts.append(f"{name} {text} → {new_text}{change}" if other else f"{name} {text}")
    return texts


# ---- how figures are written ---------------------------------------------------------------------------


def number(value: float | None, digits: int = 3) -> str:
    """Fixed decimals with thousands separators and a true minus; a dash for None and NaN."""
    if value is None or math.isnan(value):
        return "–"
    text = "∞" if math.isinf(value) else f"{abs(value):,.{digits}f}"
    return f"−{text}" if value < 0 else text


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}%"


def delta(value: float | None, base: float | None, *, relative: bool = False, digits: int = 3) -> str:
    """The signed change from `base` to `value`, absolute or in percent of `base`; empty if there is none."""
    if value is None or base is None or not (math.isfinite(value) and math.isfinite(base)) or (relative and not base):
        return ""
    change = 100 * (value / base - 1) if relative else value - base
    text = f"{abs(change):,.1f}".removesuffix(".0") + "%" if relative else f"{abs(change):.{digits}f}"
    return f"{'±' if not text.strip('0.,%') else '+' if change > 0 else '−'}{text}"


def duration(seconds: float | None) -> str:
    if seconds is None or seconds < 59.95:
        return "–" if seconds is None else f"{seconds:.1f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours:,} h {minutes:02d} min" if hours else f"{minutes} min"


def visible(text: str) -> str:
    """`text` with every character that would not show, or would reorder the rest, replaced by one that shows."""

    def shown(char: str) -> str:
        if char in "\n\t":
            return char
        if ord(char) < 0x20:
            return chr(0x2400 + ord(char))
        hidden = unicodedata.category(char) in ("Cc", "Cs") or unicodedata.bidirectional(char) in BIDI_CONTROLS
        return "\ufffd" if hidden else char

    return "".join(map(shown, text))


# ---- charts --------------------------------------------------------------------------------------------


def _charts(data: ReportData, colours: dict[str, str]) -> dict[str, list[Markup]]:
    """Inline SVG by section: `behaviour`, `training`, `scores`."""
    with matplotlib.rc_context(RC):
        return {
            "behaviour": [_bars(data.models, metric, colours) for metric in ("emt", "tp")],
            "training": _training(data.curves, colours),
            "scores": [_histogram(data.histogram)] if data.histogram else [],
        }


def _axes(title: str, xlabel: str = "", width: float = 4.4, height: float = 2.6) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="none")
    axes = figure.add_subplot(facecolor="none")
    axes.set_title(title, loc="left", fontsize=9, fontweight="bold", pad=10)
    axes.set_xlabel(xlabel)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.grid(axis="y", color=INK, alpha=0.12, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, pad=4)
    return figure, axes


def _bars(models: Sequence[ModelRow], metric: str, colours: dict[str, str]) -> Markup:
    groups = _group_names(models)
    figure, axes = _axes(metric.upper())
    width = 0.8 / len(models)
    for index, model in enumerate(models):
        for group in model.groups:
            position, value = groups.index(group.group), getattr(group, metric)
            if value is not None:
                x = position + (index - (len(models) - 1) / 2) * width
                axes.bar(x, value, width * 0.88, color=colours[model.name])
                axes.annotate(f"{value:.2f}", (x, value), (0, 2), textcoords="offset points", ha="center", fontsize=7)
    axes.set_xticks(range(len(groups)), [visible(name) for name in groups], parse_math=False)
    axes.set_xlim(-0.6, len(groups) - 0.4)
    axes.set_ylim(0, max(1.0, axes.get_ylim()[1]))
    return _svg(figure, f"Bars of {metric.upper()} by prompt group; the table above has the figures")


def _training(curves: Sequence[TrainingCurve], colours: dict[str, str]) -> list[Markup]:
    panels = {"benign_loss": "Benign loss", "masked_loss": "Masked loss", "learning_rate": "Learning rate"}
    shown = {name: drawn for name in panels if (drawn := [curve for curve in curves if getattr(curve, name)])}
    charts = []
    for name, drawn in shown.items():
        figure, axes = _axes(panels[name], "step", width=9.9 / max(2, len(shown)), height=2.5)
        for index, curve in enumerate(drawn):
            values = np.array(getattr(curve, name), dtype=float)  # None becomes NaN: a gap in the line
            width = 2.8 if index == 0 and len(drawn) > 1 else 1.4  # the first shows behind others that follow it
            marker = "o" if len(values) == 1 else None
            axes.plot(curve.steps, values, color=colours[curve.model], lw=width, marker=marker, zorder=3 + index)
        axes.ticklabel_format(axis="y", style="sci", scilimits=(-3, 4))
        charts.append(_svg(figure, f"{panels[name]} of each model by training step"))
    return charts


def _histogram(histogram: ScoreHistogram) -> Markup:
    figure, axes = _axes("Tokens per bin, log scale", "influence score", width=4.8)
    axes.stairs(histogram.counts, histogram.bin_edges, fill=True, color=PALETTE[0], alpha=0.6)
    if histogram.known_counts is not None:
        axes.stairs(histogram.known_counts, histogram.bin_edges, color=PALETTE[1], linewidth=1.4)
    axes.axvline(histogram.tau, color=BOX_RED, linewidth=1.2, linestyle=(0, (4, 2)))
    axes.text(histogram.tau, 1.02, f"τ = {histogram.tau:.3g}", transform=axes.get_xaxis_transform(), color=BOX_RED)
    axes.ticklabel_format(axis="x", style="sci", scilimits=(-2, 4))
    axes.set_yscale("log")
    axes.set_ylim(bottom=0.7)
    axes.minorticks_off()
    return _svg(figure, f"Histogram of token scores on a log scale, with tau at {histogram.tau:.3g}")


def _svg(figure: Figure, label: str) -> Markup:
    """The figure as an `<svg>` to put inside HTML: no prolog, no metadata, ids of its own, the page's colours."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg)[^>]*?(viewBox="[^"]*")[^>]*>', rf'\1 role="img" aria-label="{label}" \2>', svg, count=1)
    # One page holds several figures: ids that repeat would make a clip path of one apply to another.
    prefix = re.sub(r"\W+", "-", label.lower())
    return Markup(re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}-", svg))


# ---- the page ------------------------------------------------------------------------------------------


def render_report(data: ReportData) -> str:
    """The whole page as one HTML string that loads nothing from outside."""
    names = dict.fromkeys([model.name for model in data.models] + [curve.model for curve in data.curves])
    colours = {name: PALETTE[index % len(PALETTE)] for index, name in enumerate(names)}
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: visible(value) if type(value) is str else value,
    )
    environment.filters.update(number=number, percent=percent, duration=duration)
    environment.globals.update(delta=delta)
    scores = [abs(token.score) for document in data.documents for token in document.tokens]
    return environment.get_template("report.html").render(
        data=data,
        summary=summary_line(data),
        groups=_group_names(data.models),
        colours=colours,
        curve_names=[curve.model for curve in data.curves],
        charts=_charts(data, colours),
        palette=PALETTE,
        # The strongest hundredth of the shown tokens share the full colour: one outlier would pale the rest.
        full_score=float(np.quantile(scores, 0.99)) if scores else 0.0,
    )


def report_json(data: ReportData) -> dict[str, Any]:
    """The figures of the page as plain JSON values, with its summary line; a figure that is not finite is None."""
    return _plain({"summary": summary_line(data), **dataclasses.asdict(data)})


def write_report(data: ReportData, folder: Path) -> Path:
    """Write `index.html` and `report.json` (UTF-8) into `folder`, made if missing; returns the page's path."""
    folder.mkdir(parents=True, exist_ok=True)
    figures = json.dumps(report_json(data), indent=1, allow_nan=False)
    (folder / "report.json").write_text(figures + "\n", encoding="utf-8")
    page = folder / "index.html"
    page.write_text(render_report(data), encoding="utf-8")
    return page


def _group_names(models: Iterable[ModelRow]) -> list[str]:
    return list(dict.fromkeys(group.group for model in models for group in model.groups))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
