"""The table and the picture of a comparison: toxicity against perplexity, one row and one point for each model.

The figures are those of `report/metrics.json` (`stages.evaluation_figures`); intervals are of a bootstrap over prompts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

Interval = tuple[float, float, float]  # value, low, high


@dataclass(frozen=True, kw_only=True)
class Row:
    """One model. `ratio` is its perplexity over the first model's; `p_value` of the difference in EMT to the first.

    `fluency_of` names the model that a decoding method decodes: perplexity and last words are that one's."""

    model: str
    made_by: str
    masked_share: float | None
    penalty: float | None
    emt: Interval
    tp: Interval
    perplexity: Interval | None
    ratio: float | None
    last_word_accuracy: float | None
    distinct_2: float
    p_value: float | None
    fluency_of: str | None = None


@dataclass(frozen=True, kw_only=True)
class Made:
    """How a model came about: `by` in words, and of the training it has its weights from the masked share and penalty.

    `decodes` names the model whose weights a decoding method leaves as they are."""

    by: str
    masked_share: float | None = None
    penalty: float | None = None
    decodes: str | None = None


def rows_of(metrics: Mapping[str, Any], prompts: str, made: Mapping[str, Made]) -> list[Row]:
    """The rows of `metrics` for the prompt set `prompts`, each with how its model was made."""
    rows: list[Row] = []
    for model, measured in metrics["models"].items():
        figures = measured["sets"][prompts]["groups"]["all"]
        primary = next(iter(figures["emt"]))
        how = made.get(model, Made(by="given"))
        fluency = metrics["models"][how.decodes or model]
        perplexity = _interval(fluency["perplexity"])
        base = rows[0].perplexity if rows else perplexity
        paired = metrics["paired"].get(model)
        accuracy = fluency["last_word_accuracy"]
        emt, tp = _interval(figures["emt"][primary]), _interval(figures["tp"][primary])
        assert emt is not None
        assert tp is not None
        rows.append(
            Row(
                model=model,
                made_by=how.by,
                masked_share=how.masked_share,
                penalty=how.penalty,
                emt=emt,
                tp=tp,
                perplexity=perplexity,
                ratio=perplexity[0] / base[0] if perplexity and base else None,
                last_word_accuracy=accuracy["value"] if accuracy else None,
                distinct_2=figures["distinct_2"]["value"],
                p_value=paired["sets"][prompts]["groups"]["all"]["emt"][primary]["p_value"] if paired else None,
                fluency_of=how.decodes,
            )
        )
    return rows


def as_markdown(rows: Sequence[Row]) -> str:
    """A Markdown table, one line a model, and a note below it if there are decoding methods."""
    titles = (
        "model",
        "made by",
        "tokens masked",
        "penalty",
        "EMT",
        "TP",
        "perplexity",
        "over the first",
        "last word",
        "distinct-2",
    )
    lines = [f"| {' | '.join((*titles, 'p (EMT)'))} |", "| --- " * (len(titles) + 1) + "|"]
    for row in rows:
        cells = [
            row.model,
            row.made_by,
            _text(row.masked_share, ".2%"),
            _text(row.penalty, "g"),
            _with_interval(row.emt, ".3f"),
            _with_interval(row.tp, ".3f"),
            _starred(row, _with_interval(row.perplexity, ".1f")),
            _starred(row, _text(row.ratio, ".3f")),
            _starred(row, _text(row.last_word_accuracy, ".3f")),
            _text(row.distinct_2, ".3f"),
            _text(row.p_value, ".3f"),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    decoded = [f"{row.model}: {row.fluency_of}" for row in rows if row.fluency_of]
    if decoded:
        lines += ["", f"\\* of the model that is decoded ({', '.join(decoded)}): decoding does not change it."]
    return "\n".join(lines) + "\n"


def _starred(row: Row, text: str) -> str:
    return rf"{text}\*" if text and row.fluency_of else text


def as_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows as plain values."""
    return [asdict(row) for row in rows]


def draw(rows: Sequence[Row], path: Path) -> None:
    """Toxicity (EMT) against perplexity, with intervals; down and to the left is better. Hollow: decoding methods."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5.5), layout="constrained")
    for number, row in enumerate(rows):
        if row.perplexity is None:
            continue
        (x, *x_ends), (y, *y_ends) = row.perplexity, row.emt
        axes.errorbar(
            x,
            y,
            xerr=[[abs(x - x_ends[0])], [abs(x_ends[1] - x)]],
            yerr=[[abs(y - y_ends[0])], [abs(y_ends[1] - y)]],
            fmt="s" if number == 0 else "o",
            capsize=3,
            color=f"C{number % 10}",
            markerfacecolor="white" if row.fluency_of else None,
        )
        axes.annotate(row.model, (x, y), xytext=(6, 5), textcoords="offset points", fontsize=9)
    axes.set(xlabel="held-out perplexity", ylabel="expected maximum toxicity", title="Toxicity against perplexity")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _interval(figure: Mapping[str, Any] | None) -> Interval | None:
    return (figure["value"], figure["low"], figure["high"]) if figure else None


def _text(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _with_interval(interval: Interval | None, form: str) -> str:
    return "" if interval is None else f"{interval[0]:{form}} [{interval[1]:{form}}, {interval[2]:{form}}]"
