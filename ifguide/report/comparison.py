"""The tables and the picture of a comparison: toxicity against perplexity, one row and one point for each model.

With several evaluators there is a second table, of what each of them says of each model, and a panel for each of them.
Where models are compared with a second one, the reference, there is a table of EMT over that one's.
p values are corrected for the figures of their table (`benjamini_hochberg`); the JSON has the plain ones beside them.
The figures are those of `report/metrics.json` (`evaluation.figures`); intervals are of a bootstrap over prompts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib

from ifguide.display import markdown_table, plain_markdown
from ifguide.evaluation import benjamini_hochberg
from ifguide.evaluation.figures import ANNOTATED_TITLES, MARGINS
from ifguide.report.charts import RC, colours_of, evaluators_of, tradeoff
from ifguide.report.figures import ClassFigures, Difference, Figure, ModelRow
from ifguide.report.text import p_value

# value, low, high; of a ratio `high` alone is None where it has no upper bound
Interval = tuple[float | None, float | None, float | None]


@dataclass(frozen=True, kw_only=True)
class Evaluator:
    """What one class of a classifier says of a model. Ratios are over the first model's on the same prompts, None for
    that model itself; `p_value` is of the difference in EMT, `p_corrected` the same corrected for all models and
    evaluators. `beside`: the same over the row's reference."""

    name: str
    emt: Interval
    tp: Interval
    emt_ratio: Interval | None
    tp_ratio: Interval | None
    p_value: float | None
    p_corrected: float | None = None
    beside: OverReference | None = None


@dataclass(frozen=True, kw_only=True)
class OverReference:
    """Ratios over the reference's EMT and TP on the same prompts; p values as in `Evaluator`, of their own table."""

    emt_ratio: Interval
    tp_ratio: Interval
    p_value: float | None
    p_corrected: float | None = None


@dataclass(frozen=True, kw_only=True)
class Change:
    """A figure less that of another model, of the same documents."""

    change: Interval
    p_value: float | None
    p_corrected: float | None = None


@dataclass(frozen=True, kw_only=True)
class Annotated:
    """Figures of annotated text by name (`evaluation.annotated`), in nats a token: `changes` from the first model's,
    none of that model itself, `beside` from the row's reference. p values are corrected for both."""

    figures: dict[str, Interval]
    changes: dict[str, Change]
    beside: dict[str, Change]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One model. `ratio` is its perplexity over the first model's, None where the two cannot be paired (their tokens
    differ); `benign_ratio` that of the benign perplexity, None too where no held-out document is flagged; `p_value` of
    the difference in EMT to the first, `p_corrected` the same corrected for the number of models. `evaluators[0]` is
    the one of `emt` and `tp`.

    `fluency_of` names the model that a decoding method decodes: the figures of given texts are that one's. `reference`
    names one more model that this one is compared with."""

    model: str
    made_by: str
    masked_share: float | None
    masked_loss: str | None
    emt: Interval
    tp: Interval
    perplexity: Interval | None
    ratio: float | None
    benign_perplexity: Interval | None
    benign_ratio: float | None
    last_word_accuracy: float | None
    distinct_2: float | None
    p_value: float | None
    p_corrected: float | None = None
    evaluators: tuple[Evaluator, ...] = ()
    annotated: Annotated | None = None
    fluency_of: str | None = None
    reference: str | None = None


def rows_of(models: Sequence[ModelRow]) -> list[Row]:
    """A row for each model, of all prompts of its first set."""
    base = models[0]
    rows = [
        Row(
            model=model.name,
            made_by=model.made.by,
            masked_share=model.made.masked_share,
            masked_loss=model.made.masked_loss,
            emt=_values(model.whole.emt),
            tp=_values(model.whole.tp),
            perplexity=_interval(model.perplexity),
            ratio=_ratio(model, base, model.perplexity, base.perplexity),
            benign_perplexity=_interval(model.benign_perplexity),
            benign_ratio=_ratio(model, base, model.benign_perplexity, base.benign_perplexity),
            last_word_accuracy=model.last_word_accuracy.value if model.last_word_accuracy else None,
            distinct_2=model.whole.text["distinct_2"].value,
            p_value=_p(model.whole.emt),
            evaluators=tuple(_evaluator(label, model.beside.get(label.name)) for label in model.whole.compared),
            annotated=_annotated(model),
            fluency_of=model.made.decodes,
            reference=model.reference,
        )
        for model in models
    ]
    return _corrected(rows)


def _corrected(rows: Sequence[Row]) -> list[Row]:
    """The rows with the p values of their tables corrected, each for the figures of its own."""
    of_models = benjamini_hochberg(row.p_value for row in rows)
    evaluators = [evaluator for row in rows for evaluator in row.evaluators]
    of_both = benjamini_hochberg(evaluator.p_value for evaluator in evaluators)
    of_reference = benjamini_hochberg(evaluator.beside.p_value for evaluator in evaluators if evaluator.beside)

    annotated = [row.annotated for row in rows if row.annotated]
    of_annotated = benjamini_hochberg(
        change.p_value for own in annotated for change in (*own.changes.values(), *own.beside.values())
    )

    def corrected(evaluator: Evaluator) -> Evaluator:
        beside = evaluator.beside and replace(evaluator.beside, p_corrected=of_reference[evaluator.beside.p_value])
        return replace(evaluator, p_corrected=of_both[evaluator.p_value], beside=beside)

    def of_texts(changes: Mapping[str, Change]) -> dict[str, Change]:
        return {name: replace(change, p_corrected=of_annotated[change.p_value]) for name, change in changes.items()}

    return [
        replace(
            row,
            p_corrected=of_models[row.p_value],
            evaluators=tuple(map(corrected, row.evaluators)),
            annotated=row.annotated
            and replace(row.annotated, changes=of_texts(row.annotated.changes), beside=of_texts(row.annotated.beside)),
        )
        for row in rows
    ]


def _annotated(model: ModelRow) -> Annotated | None:
    figures = {name: figure for name in ANNOTATED_TITLES if (figure := getattr(model, name))}
    if not figures:
        return None
    changes = {name: figure.difference for name, figure in figures.items() if figure.difference}
    return Annotated(
        figures={name: _values(figure) for name, figure in figures.items()},
        changes={name: _change(difference) for name, difference in changes.items()},
        beside={name: _change(difference) for name, difference in model.margins_beside.items()},
    )


def _change(difference: Difference) -> Change:
    return Change(change=(difference.value, difference.low, difference.high), p_value=difference.p_value)


def _evaluator(label: ClassFigures, beside: Mapping[str, Difference] | None) -> Evaluator:
    return Evaluator(
        name=label.name,
        emt=_values(label.emt),
        tp=_values(label.tp),
        emt_ratio=_over_first(label.emt),
        tp_ratio=_over_first(label.tp),
        p_value=_p(label.emt),
        beside=OverReference(
            emt_ratio=_ratios(beside["emt"]), tp_ratio=_ratios(beside["tp"]), p_value=beside["emt"].p_value
        )
        if beside
        else None,
    )


def as_markdown(rows: Sequence[Row]) -> str:
    """A Markdown table, one line a model, and a note below it if there are decoding methods. Where there are several
    evaluators, a second table with a line for each of them and each model. Where there is a reference, one of EMT over
    the reference's, with a column for each evaluator. Where there is annotated text, one of what became of it."""
    titles = (
        "model",
        "made by",
        "tokens masked",
        "their loss",
        "EMT",
        "TP",
        "perplexity",
        "over the first",
        "benign perplexity",
        "over the first",
        "last word",
        "distinct-2",
        "corrected p (EMT)",
    )
    cells = [
        (
            plain_markdown(row.model),
            plain_markdown(row.made_by),
            _text(row.masked_share, ".2%"),
            row.masked_loss or "",
            _with_interval(row.emt, ".3f"),
            _with_interval(row.tp, ".3f"),
            _starred(row, _with_interval(row.perplexity, ".1f")),
            _starred(row, _text(row.ratio, ".3f")),
            _starred(row, _with_interval(row.benign_perplexity, ".1f")),
            _starred(row, _text(row.benign_ratio, ".3f")),
            _starred(row, _text(row.last_word_accuracy, ".3f")),
            _text(row.distinct_2, ".3f"),
            p_value(row.p_corrected),
        )
        for row in rows
    ]
    table = markdown_table(titles, cells)
    decoded = [plain_markdown(f"{row.model}: {row.fluency_of}") for row in rows if row.fluency_of]
    if decoded:
        table += f"\n\\* of the model that is decoded ({', '.join(decoded)}): decoding does not change it.\n"
    if any(len(row.evaluators) > 1 for row in rows):
        table += f"\nBy evaluator, all prompts:\n\n{_by_evaluator(rows)}"
    if compared := [row for row in rows if row.reference]:
        name = plain_markdown(compared[0].reference or "")
        table += f"\nEMT over that of {name}, all prompts:\n\n{_over_reference(compared)}"
    if annotated := [row for row in rows if row.annotated]:
        first = plain_markdown(annotated[0].model)
        table += (
            f"\nAnnotated text: nats a token, less those of {first}. Margin: how much less likely it is than others."
        )
        table += f"\n\n{_of_annotated(annotated)}"
    return table


def _by_evaluator(rows: Sequence[Row]) -> str:
    titles = ("evaluator", "model", "EMT", "over the first", "TP", "over the first", "corrected p (EMT)")
    names = dict.fromkeys(evaluator.name for row in rows for evaluator in row.evaluators)
    cells = [
        (
            plain_markdown(evaluator.name),
            plain_markdown(row.model),
            _with_interval(evaluator.emt, ".3f"),
            _with_interval(evaluator.emt_ratio, ".3f"),
            _with_interval(evaluator.tp, ".3f"),
            _with_interval(evaluator.tp_ratio, ".3f"),
            p_value(evaluator.p_corrected),
        )
        for name in names
        for row in rows
        for evaluator in row.evaluators
        if evaluator.name == name
    ]
    return markdown_table(titles, cells)


def _over_reference(rows: Sequence[Row]) -> str:
    names = dict.fromkeys(evaluator.name for row in rows for evaluator in row.evaluators)
    titles = ["model", *(title for name in names for title in (plain_markdown(name), "corrected p"))]
    cells = []
    for row in rows:
        line = [plain_markdown(row.model)]
        for name in names:
            beside = next((own.beside for own in row.evaluators if own.name == name), None)
            line += [_with_interval(beside.emt_ratio, ".3f"), p_value(beside.p_corrected)] if beside else ["", ""]
        cells.append(line)
    return markdown_table(titles, cells)


def _of_annotated(rows: Sequence[Row]) -> str:
    columns = [("changes", name, title) for name, title in ANNOTATED_TITLES.items()]
    if reference := next((row.reference for row in rows if row.reference), None):
        less = f"less {plain_markdown(reference)}'s"
        columns += [("beside", name, f"{ANNOTATED_TITLES[name]}, {less}") for name in MARGINS]
    cells = []
    for row in rows:
        line = [plain_markdown(row.model)]
        for kind, name, _ in columns:
            change = getattr(row.annotated, kind).get(name)
            text = _starred(row, _with_interval(change.change, "+.3f")) if change else ""
            line += [text, p_value(change.p_corrected) if change else ""]
        cells.append(line)
    return markdown_table(["model", *(text for *_, title in columns for text in (title, "corrected p"))], cells)


def _starred(row: Row, text: str) -> str:
    return rf"{text}\*" if text and row.fluency_of else text


def as_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows as plain values."""
    return [asdict(row) for row in rows]


def draw(models: Sequence[ModelRow], path: Path) -> None:
    """The picture of the report's page, toxicity (EMT) against perplexity with intervals, as a PNG; a panel for each
    evaluator."""
    with matplotlib.rc_context(RC):
        figure = tradeoff(models, colours_of(model.name for model in models), evaluators_of(models))
        figure.savefig(path, dpi=200, facecolor="white", format="png")  # the path may end in .part


def _ratio(model: ModelRow, base: ModelRow, own: Figure | None, other: Figure | None) -> float | None:
    if own is None or other is None or not own.value or not other.value or not model.comparable(base, own):
        return None
    return own.value / other.value


def _over_first(figure: Figure) -> Interval | None:
    return _ratios(figure.difference) if figure.difference else None


def _ratios(change: Difference) -> Interval:
    return change.ratio, change.ratio_low, change.ratio_high


def _p(figure: Figure) -> float | None:
    return figure.difference.p_value if figure.difference else None


def _values(figure: Figure) -> Interval:
    return figure.value, figure.low, figure.high


def _interval(figure: Figure | None) -> Interval | None:
    return _values(figure) if figure else None


def _text(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _with_interval(interval: Interval | None, form: str) -> str:
    if interval is None or interval[0] is None or interval[1] is None:
        return ""
    value, low, high = ("∞" if end is None else format(end, form) for end in interval)
    return f"{value} [{low}, {high}]"
