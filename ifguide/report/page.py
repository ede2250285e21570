"""One self-contained HTML page, its JSON twin and a model card fragment, from the figures of a run.

The page shows what guided pretraining (IF-Guide, arXiv 2506.01790) changed and what it cost: the models side by
side with intervals and paired p values, toxicity against perplexity, classes and groups of prompts, repetition,
training, how the influence scores spread around tau, how the mask compares with other ways to find the behaviour, and
the highest-ranked documents token by token. Everything comes in as plain dataclasses; nothing is measured here.

The page loads nothing: charts are inline SVG, and its content security policy allows its own style and, by its hash,
the one script that searches the documents and tells the scores of tokens by click, tap and key. Without the script all
else works, and a token's score is its title. Equal data give equal bytes. Every string of the data is escaped; control
bytes are made visible.

Cost: about 2 s of CPU time for eleven charts, nearly all matplotlib's; 4 s with thirteen, two of 80 bars, and 120,000
tokens of documents. The module does not know which behaviour it reports on, and reads no artifacts; the stages do.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np
from markupsafe import Markup, escape

from ifguide.artifacts import write_text
from ifguide.display import visible, visible_pieces
from ifguide.evaluation import benjamini_hochberg
from ifguide.report.card import card_fragment, summary_line
from ifguide.report.charts import PALETTE, charts_of, colours_of, group_names
from ifguide.report.contents import Behaviour, RankedDocument, ReportData
from ifguide.report.figures import Difference, Figure, Group, ModelRow
from ifguide.report.text import duration, interval, number, p_value, percent, relative, signed

TEMPLATES = Path(__file__).parent / "templates"
LEVELS = 15  # of a token's colour
MIDDLE_RANK = 0.5
SHOWN_TEXT = ("rep_4", "distinct_2")  # figures of the text in the first table
OPACITY = {"w": ("warm", 0.8), "c": ("cool", 0.6)}  # class of a token -> colour of report.css, opacity at full score
REPORT_FILES = ("index.html", "report.json", "model_card.md")


def render_report(data: ReportData) -> str:
    """The whole page as one HTML string that loads nothing from outside."""
    colours = colours_of([model.name for model in data.models] + [curve.model for curve in data.curves])
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: visible(value) if type(value) is str else value,
    )
    environment.filters.update(
        number=number, percent=percent, duration=duration, signed=signed, p_value=p_value, relative=relative
    )
    searched = any(part.documents for part in data.behaviours)
    script = (TEMPLATES / "report.js").read_text(encoding="utf-8") if searched else ""
    return environment.get_template("report.html").render(
        data=data,
        summary=summary_line(data),
        groups=group_names(data.models),
        evaluators=list(dict.fromkeys(label.name for model in data.models for label in model.whole.compared)),
        compared=[model for model in data.models if model.beside],
        text_figures=text_figures(data.models),
        shown_text=SHOWN_TEXT,
        differences=list(differences(data.models)),
        corrected=corrections(data.models),
        interval=interval,
        colours=colours,
        curve_names=[curve.model for curve in data.curves],
        charts=charts_of(data, colours),
        palette=PALETTE,
        style=Markup((TEMPLATES / "report.css").read_text(encoding="utf-8") + level_rules()),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        ramps=[colour_ramp(part) for part in data.behaviours],
        token_spans=token_spans,
    )


def report_json(data: ReportData) -> dict[str, Any]:
    """The figures of the page as plain JSON values, with its summary line; a figure that is not finite is None."""
    return _plain({"summary": summary_line(data), **dataclasses.asdict(data)})


def write_report(data: ReportData, folder: Path) -> Path:
    """Write `REPORT_FILES` (UTF-8) into `folder`; returns the page's path."""
    page = folder / "index.html"
    figures = json.dumps(report_json(data), allow_nan=False) + "\n"
    for name, text in zip(REPORT_FILES, (render_report(data), figures, card_fragment(data)), strict=True):
        write_text(folder / name, text)
    return page


def level_rules() -> str:
    """The style of every level of a token's colour."""
    return "".join(
        f".{kind}{level} {{ background: rgb(var(--{colour}) / {opacity * level / LEVELS:.2f}); }}\n"
        for kind, (colour, opacity) in OPACITY.items()
        for level in range(1, LEVELS + 1)
    )


class ColourRamp(NamedTuple):
    """The score of a token without colour, and how far from it a score has the full one."""

    middle: float
    reach: float


def colour_ramp(part: Behaviour) -> ColourRamp:
    """That of a behaviour's tokens: behaviours, and what is measured of them, differ in scale."""
    middle = MIDDLE_RANK if part.histogram and part.histogram.ranks else 0.0
    scores = [token.score for document in part.documents for token in document.tokens]
    strengths = [abs(score - middle) for score in scores if score is not None]
    # The strongest hundredth of the shown tokens share the full colour: one outlier would pale the rest.
    return ColourRamp(middle, float(np.quantile(strengths, 0.99)) if strengths else 0.0)


def token_spans(document: RankedDocument, ramp: ColourRamp) -> Markup:
    """The document's tokens, one `<span>` each: class w (score above the middle) or c with its level of colour, m if
    masked, k if annotated; the score is the title, if there is one. There is no space between them: the text is shown
    as it is."""
    parts = []
    shown = visible_pieces([token.text for token in document.tokens])
    for token, text in zip(document.tokens, shown, strict=True):
        strength = 0.0 if token.score is None else token.score - ramp.middle
        level = round(LEVELS * min(1.0, abs(strength) / ramp.reach)) if ramp.reach else 0
        kinds = [f"{'w' if strength > 0 else 'c'}{level}"] if level else []
        kinds += ["m"] * token.masked + ["k"] * token.annotated
        attribute = f' class="{" ".join(kinds)}"' if kinds else ""
        attribute += "" if token.score is None else f' title="{token.score:.3g}"'
        parts.append(f"<span{attribute}>{escape(text)}</span>")
    return Markup("".join(parts))


def text_figures(models: Sequence[ModelRow]) -> list[str]:
    """The names of the figures of the continuations' tokens (`rep_4`, `distinct_2`), in order."""
    return list(dict.fromkeys(name for model in models for name in model.whole.text))


def differences(models: Sequence[ModelRow]) -> Iterator[tuple[str, str, str, Difference]]:
    """(model, prompts, figure, difference from the first model) of everything that was paired."""
    for model in models[1:]:
        for prompt_set in model.sets:
            prefix = "" if prompt_set is model.sets[0] else f"{prompt_set.name}: "
            for kind, groups in (("", prompt_set.groups), ("gap in ", prompt_set.gaps)):
                for group in groups:
                    for name, difference in _paired(group):
                        yield model.name, f"{prefix}{kind}{group.name}", name, difference
        for label, fluency in model.fluency.items():
            if fluency and fluency.difference:
                yield model.name, "", label, fluency.difference


def corrections(models: Sequence[ModelRow]) -> dict[str, dict[float | None, float | None]]:
    """For each table of the page, p value -> that corrected for the figures of the table; gaps by prompt set."""
    groups = [group for model in models for group in model.groups]
    wholes = [model.whole for model in models]
    fluency = [
        figure for model in models for figure in (model.perplexity, model.benign_perplexity, model.last_word_accuracy)
    ]
    texts = [group.text.get(name) for group in wholes for name in SHOWN_TEXT]
    tables: dict[str, list[Figure | None]] = {
        "comparison": [*(figure for group in groups for figure in (group.emt, group.tp)), *fluency, *texts],
        "evaluators": [f for group in wholes for label in group.compared for f in (label.emt, label.tp)],
        "annotated": [f for model in models for f in (model.annotated_nll, model.margin, model.type_margin)],
        "text": [f for model in models for own in model.sets for f in own.groups[0].text.values()],
        "classes": [f for group in groups for label in group.classes for f in (label.emt, label.tp, label.mean)],
    }
    for name in dict.fromkeys(own.name for model in models for own in model.sets):
        gaps = [gap for model in models for own in model.sets if own.name == name for gap in own.gaps]
        tables[f"gaps of {name}"] = [f for gap in gaps for f in (gap.emt, gap.tp, gap.classes[0].mean)]
    families = {table: [f.difference for f in figures if f and f.difference] for table, figures in tables.items()}
    families["beside"] = [change for model in models for own in model.beside.values() for change in own.values()]
    families["annotated"] += [change for model in models for change in model.margins_beside.values()]
    families["differences"] = [difference for *_, difference in differences(models)]
    return {table: benjamini_hochberg(change.p_value for change in family) for table, family in families.items()}


def _paired(group: Group) -> Iterator[tuple[str, Difference]]:
    named: list[tuple[str, Figure]] = []
    for label in group.classes:
        own = "" if label is group.classes[0] else f", {label.name}"
        named += [(f"EMT{own}", label.emt), (f"TP{own}", label.tp), (f"mean score{own}", label.mean)]
    for name, figure in (*named, *group.text.items()):
        if figure.difference:
            yield name, figure.difference


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
