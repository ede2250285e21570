"""The table and the picture of a comparison: toxicity against perplexity, one row and one point for each model.

The figures are those of `report/metrics.json` (`evaluation.figures`); intervals are of a bootstrap over prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib

from ifguide.display import markdown_table, plain_markdown
from ifguide.report.charts import RC, colours_of, tradeoff
from ifguide.report.figures import Figure, ModelRow
from ifguide.report.text import p_value

Interval = tuple[float | None, float | None, float | None]  # value, low, high


@dataclass(frozen=True, kw_only=True)
class Row:
    """One model. `ratio` is its perplexity over the first model's, None where the two cannot be paired (their tokens
    differ); `benign_ratio` that of the benign perplexity, None too where no held-out document is flagged; `p_value` of
    the difference in EMT to the first.

    `fluency_of` names the model that a decoding method decodes: perplexity and last words are that one's."""

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
    fluency_of: str | None = None


def rows_of(models: Sequence[ModelRow]) -> list[Row]:
    """A row for each model, of all prompts of its first set."""
    base = models[0]
    return [
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
            p_value=model.whole.emt.difference.p_value if model.whole.emt.difference else None,
            fluency_of=model.made.decodes,
        )
        for model in models
    ]


def as_markdown(rows: Sequence[Row]) -> str:
    """A Markdown table, one line a model, and a note below it if there are decoding methods."""
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
        "p (EMT)",
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
            p_value(row.p_value),
        )
        for row in rows
    ]
    table = markdown_table(titles, cells)
    decoded = [plain_markdown(f"{row.model}: {row.fluency_of}") for row in rows if row.fluency_of]
    if decoded:
        table += f"\n\\* of the model that is decoded ({', '.join(decoded)}): decoding does not change it.\n"
    return table


def _starred(row: Row, text: str) -> str:
    return rf"{text}\*" if text and row.fluency_of else text


def as_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows as plain values."""
    return [asdict(row) for row in rows]


def draw(models: Sequence[ModelRow], path: Path) -> None:
    """The picture of the report's page, toxicity (EMT) against perplexity with intervals, as a PNG."""
    with matplotlib.rc_context(RC):
        figure = tradeoff(models, colours_of(model.name for model in models))
        figure.savefig(path, dpi=200, facecolor="white", format="png")  # the path may end in .part


def _ratio(model: ModelRow, base: ModelRow, own: Figure | None, other: Figure | None) -> float | None:
    if own is None or other is None or not own.value or not other.value or not model.comparable(base, own):
        return None
    return own.value / other.value


def _values(figure: Figure) -> Interval:
    return figure.value, figure.low, figure.high


def _interval(figure: Figure | None) -> Interval | None:
    return _values(figure) if figure else None


def _text(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _with_interval(interval: Interval | None, form: str) -> str:
    if interval is None or None in interval:
        return ""
    value, low, high = (format(end, form) for end in interval)
    return f"{value} [{low}, {high}]"
