"""What a report says in words: its summary line, and a Markdown fragment to paste into a model card.

`ifguide.training.model_card` writes the card of a trained model, which says where it comes from and nothing of
quality; this fragment says what was measured of it, with intervals, on which prompts, by which classifier, and what it
rests on.
"""

from __future__ import annotations

from collections.abc import Callable

from ifguide.display import markdown_code, markdown_table, plain_markdown
from ifguide.evaluation import benjamini_hochberg
from ifguide.report.contents import ReportData
from ifguide.report.figures import Figure, ModelRow
from ifguide.report.text import interval, number, p_value, percent, relative

SUMMARISED = 3  # models besides the first: of more the summary is of one, and the table has the others


def summary_line(data: ReportData) -> str:
    """The result in one paragraph: each further model against the baseline, or the only model's figures."""
    baseline, *others = data.models
    prompts = f"{baseline.whole.prompts:,} prompts"
    sampled = f"{data.continuations} continuations of each of {prompts}" if data.continuations else prompts
    sentences = [f"{data.behaviour[:1].upper()}{data.behaviour[1:]} in {sampled}."]
    told = others if len(others) <= SUMMARISED else others[:1]
    for model in told or [baseline]:
        figures = _headline_figures(baseline, model if others else None)
        subject = f"{model.name} against {baseline.name}" if others else baseline.name
        sentences.append(f"{subject}: {', '.join(figures) or 'nothing was measured'}.")
    if len(told) < len(others):
        sentences.append(f"The table has {len(others) - len(told)} more.")
    return " ".join(sentences)


def _headline_figures(baseline: ModelRow, other: ModelRow | None) -> list[str]:
    def figures(model: ModelRow) -> dict[str, tuple[Figure | None, Callable[[float], str]]]:
        return {
            "TP": (model.whole.tp, lambda value: number(value, 2)),
            "EMT": (model.whole.emt, lambda value: number(value, 2)),
            "perplexity": (model.perplexity, lambda value: number(value, 1)),
            "benign perplexity": (model.benign_perplexity, lambda value: number(value, 1)),
            "last-word accuracy": (model.last_word_accuracy, percent),
        }

    model = other or baseline
    after = figures(model)
    texts = []
    for name, (figure, text) in figures(baseline).items():
        new, _ = after[name]
        if figure is None or new is None or figure.value is None or new.value is None:
            continue
        is_perplexity = name.endswith("perplexity")
        if is_perplexity and not model.comparable(baseline, new):
            continue  # of other tokens than the first model's
        change = f" ({relative(new.value, figure.value)})" if is_perplexity else ""
        texts.append(f"{name} {text(figure.value)}" + (f" → {text(new.value)}{change}" if other else ""))
    return texts


def card_fragment(data: ReportData) -> str:
    """Markdown sections: figures of every model with intervals, how they were measured, what they rest on."""
    share, behaviour = f"{100 * data.confidence:g}%", plain_markdown(data.behaviour)
    parts = [
        f"## Evaluation: {behaviour}",
        f"Intervals are {share} bootstrap intervals over prompts (blocks for perplexity, texts for accuracy)."
        f" TP is the share of prompts with at least one continuation that scores {data.threshold:g} or more, EMT the"
        f" mean over prompts of the highest score; less is less {behaviour}."
        + (
            f" p is of the paired difference from {plain_markdown(data.models[0].name)}, corrected for the figures of"
            " the table (Benjamini-Hochberg)."
            if len(data.models) > 1
            else ""
        ),
        _figures_table(data),
    ]
    for number_of, prompt_set in enumerate(data.models[0].sets):
        groups = [group.name for group in prompt_set.groups][0 if number_of else 1 :]
        if groups:
            title = f"### Groups of {plain_markdown(prompt_set.name)}, EMT"
            parts += [title, _groups_table(data, number_of, groups)]
    if data.settings:
        parts += [
            "### How it was measured",
            markdown_table(("what", "value"), [tuple(map(plain_markdown, row)) for row in data.settings]),
        ]
    if data.provenance:
        rows = [
            (plain_markdown(row.folder), markdown_code(row.fingerprint), ", ".join(map(markdown_code, row.inputs)))
            for row in data.provenance
        ]
        parts += ["### Provenance", markdown_table(("artifact", "fingerprint", "made from"), rows)]
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


def _figures_table(data: ReportData) -> str:
    named_figures = []
    for model in data.models:
        whole = model.whole
        named = [("EMT", whole.emt), ("TP", whole.tp)]
        for label in whole.classes[1:]:
            named += [(f"EMT, {label.name}", label.emt), (f"TP, {label.name}", label.tp)]
        named += [(name, figure) for name, figure in (*model.fluency.items(), *whole.text.items()) if figure]
        named += model.benchmarks.items()
        named_figures += [(model.name, name, figure) for name, figure in named]
    changes = [figure.difference for *_, figure in named_figures if figure.difference]
    corrected = benjamini_hochberg(change.p_value for change in changes)
    rows = [
        (
            plain_markdown(model),
            plain_markdown(name),
            _with_interval(figure),
            p_value(corrected.get(figure.difference.p_value)) if figure.difference else "",
        )
        for model, name, figure in named_figures
    ]
    return markdown_table(("model", "figure", "value", "p"), rows)


def _groups_table(data: ReportData, number_of: int, groups: list[str]) -> str:
    rows = []
    for name in groups:
        cells = [
            next((_with_interval(group.emt) for group in model.sets[number_of].groups if group.name == name), "")
            for model in data.models
        ]
        rows.append((plain_markdown(name), *cells))
    for gap in data.models[0].sets[number_of].gaps:
        cells = [
            next((_with_interval(own.emt) for own in model.sets[number_of].gaps if own.name == gap.name), "")
            for model in data.models
        ]
        rows.append((plain_markdown(f"gap in {gap.name}"), *cells))
    return markdown_table(("group", *(plain_markdown(model.name) for model in data.models)), rows)


def _with_interval(figure: Figure) -> str:
    return f"{number(figure.value)} {interval(figure.low, figure.high)}".rstrip()
