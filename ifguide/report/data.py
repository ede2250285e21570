"""The content of the report page, gathered from finished artifacts and figures: nothing is made here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ifguide.artifacts import MANIFEST, environment, file_digest, read_manifest
from ifguide.config import ClassifierSource, Evaluate, redact
from ifguide.report import contents
from ifguide.report.agreement import agreement_rows
from ifguide.report.figures import Figure, ModelRow, model_rows
from ifguide.report.view import ShownDocument, View, score_histogram
from ifguide.selection.distributed import RunTasks
from ifguide.selection.folders import SelectionFolders
from ifguide.selection.outliers import dominant_line
from ifguide.student.said import audit_lines
from ifguide.telemetry import read_metrics
from ifguide.training.choices import read_choices

MAX_OUTLIERS = 20
METRICS = "metrics.jsonl"  # of a training


@dataclass(frozen=True, kw_only=True)
class ReportSources:
    """What any report page is of: its title, how things were measured, and the artifacts that it rests on.

    `artifacts`: folders by the names that the page has for them, in order, made or not. `trained`: the folders of the
    models' trainings, by model."""

    title: str
    artifacts: Mapping[str, Path]
    options: Evaluate
    trained: Mapping[str, Path]
    config_yaml: str
    seed: int


@dataclass(frozen=True, kw_only=True)
class Selected:
    """A scored behaviour with its ranking and mask.

    `trained`: a model was trained with that mask. `plain`: it goes by scores, where the run's own goes by z-scores."""

    name: str
    trained: bool
    folders: SelectionFolders
    plain: bool = False


def report_data(
    sources: ReportSources,
    metrics: Mapping[str, Any],
    behaviours: Sequence[Selected],
    *,
    run_tasks: RunTasks,
    run_classifier: RunTasks,
) -> tuple[contents.ReportData, dict[str, Any]]:
    """The report and the headline figures: {model: {emt, tp, perplexity, ...}, mask: {precision, recall}}.

    `metrics`: of `evaluation.figures.measure`. `behaviours`: the mask's own first; none if there is no mask. A mask
    that was imported has no ranking: it is compared with the annotations, and its documents are not shown. `run_tasks`:
    of tasks that count the tokens of a shard. `run_classifier`: of one that classifies, with `evaluate.resources`."""
    rows = model_rows(metrics)
    figures: dict[str, Any] = {
        row.name: {
            "emt": row.whole.emt.value,
            "tp": row.whole.tp.value,
            "perplexity": _value(row.perplexity),
            "benign_perplexity": _value(row.benign_perplexity),
            "margin": _value(row.margin),
            "last_word_accuracy": _value(row.last_word_accuracy),
        }
        for row in rows
    }
    views = [View(selected.folders) for selected in behaviours]
    agreement: tuple[contents.AgreementRow, ...] = ()
    if views and views[0].annotated:
        agreement = agreement_rows(
            views[0], sources.options, sources.seed, run_tasks=run_tasks, run_classifier=run_classifier
        )
        figures["mask"] = {"precision": agreement[0].precision, "recall": agreement[0].recall}
    shown = [(selected, view) for selected, view in zip(behaviours, views, strict=True) if view.ranked]
    data = contents.ReportData(
        models=rows,
        behaviours=tuple(
            _behaviour(selected, view, sources.options.top_documents, run_tasks) for selected, view in shown
        ),
        agreement=agreement,
        **_of_any_page(sources, metrics),
    )
    return data, figures


def _value(figure: Figure | None) -> float | None:
    return figure.value if figure else None


def comparison_data(
    sources: ReportSources, metrics: Mapping[str, Any], rows: tuple[ModelRow, ...]
) -> contents.ReportData:
    """The report of `compare`: `rows` of the run's own models and of one for each method."""
    return contents.ReportData(models=rows, **_of_any_page(sources, metrics))


def _of_any_page(sources: ReportSources, metrics: Mapping[str, Any]) -> dict[str, Any]:
    """What the figures were measured of and with, how the models were trained, and the artifacts."""
    options = sources.options
    assert options.prompts is not None
    settings = {
        "prompts": options.prompts.path,
        **{f"prompts of {name}": source.path for name, source in options.prompt_sets.items()},
        "classifier": _classifier_text(options.classifier),
        **{f"classifier {name}": _classifier_text(source) for name, source in options.classifiers.items()},
        "prompts grouped by": ", ".join(f"{how} {count:,}" for how, count in metrics["grouped_by"].items() if count),
        "continuations of a prompt": str(options.continuations),
        "sampling": f"{options.max_new_tokens} tokens, top-p {options.top_p:g}, temperature {options.temperature:g}",
        "perplexity of": ", ".join(source.path for source in options.heldout),
        "annotated text": ", ".join(source.path for source in options.annotated),
        "last words of": options.cloze.path if options.cloze else "",
        **{f"model {name}": source for name, source in options.models.items()},
        "intervals": f"{100 * metrics['confidence']:g}%, {metrics['bootstrap_samples']:,} bootstrap samples",
        "seed": str(sources.seed),
        "reliability of the queries": _reliability(sources.artifacts.get("query")),
        **_audit(sources.artifacts.get("scores")),
        **_steps(sources.trained),
    }
    return {
        "title": sources.title,
        "behaviour": options.behaviour,
        "config_text": sources.config_yaml,
        "continuations": options.continuations,
        "threshold": metrics["threshold"],
        "confidence": metrics["confidence"],
        "settings": tuple((name, value) for name, value in redact(settings).items() if value),
        "software": tuple(sorted(environment().items())),
        "curves": _curves(sources.trained),
        "provenance": _provenance(sources.artifacts),
    }


def _reliability(query: Path | None) -> str:
    """How far scores by all queries agree with those by endlessly many, and tell queries apart that V is not made of;
    empty where neither was measured."""
    if query is None or not (query / MANIFEST).exists():
        return ""
    summary = read_manifest(query).summary
    reliability, held_out = summary.get("reliability"), summary.get("held_out", {})
    parts = [] if reliability is None else [f"{reliability:.2f} of 1"]
    if "auroc" in held_out:
        count = held_out["positive"] + held_out["negative"]
        parts.append(f"{count:,} held-out queries told apart with AUROC {held_out['auroc']:.2f}")
    return ", ".join(parts)


def _audit(scores: Path | None) -> dict[str, str]:
    """What made the scores, and how near the exact ones they are; empty where they are exact."""
    if scores is None or not (scores / MANIFEST).exists():
        return {}
    return audit_lines(read_manifest(scores).summary)


def _steps(trained: Mapping[str, Path]) -> dict[str, str]:
    """What the steps of each training ran by, as its folder tells it."""
    chosen = {name: read_choices(folder) for name, folder in trained.items()}
    return {f"training of {name}": choices.text() for name, choices in chosen.items() if choices}


def _classifier_text(source: ClassifierSource) -> str:
    training = (
        "trained on " + text.path + (f" [{text.rows[0]}, {text.rows[1]})" if text.rows else "")
        for text in source.training
    )
    return ", ".join(filter(None, (source.name, source.label, source.checkpoint, *training)))


def _behaviour(selected: Selected, view: View, top_documents: int, run_tasks: RunTasks) -> contents.Behaviour:
    return contents.Behaviour(
        name=selected.name,
        trained=selected.trained,
        plain=selected.plain,
        scored=view.measure is not None,
        histogram=_histogram(view, run_tasks),
        documents=tuple(_documents(view, top_documents)),
        outliers=_outliers(view),
        dominant=dominant_line(view.summary, view.options),
    )


def _curves(folders: Mapping[str, Path]) -> tuple[contents.TrainingCurve, ...]:
    return tuple(curve for curve in map(_curve, folders, folders.values()) if curve)


def _curve(name: str, folder: Path) -> contents.TrainingCurve | None:
    logged = read_metrics(_metrics(folder))
    if not logged:
        return None
    try:
        masked = tuple(row["loss_masked"] for row in logged)
        return contents.TrainingCurve(
            model=name,
            steps=tuple(row["step"] for row in logged),
            benign_loss=tuple(row["loss_benign"] for row in logged),
            learning_rate=tuple(row["learning_rate"] for row in logged),
            masked_loss=masked if any(value is not None for value in masked) else None,
        )
    except KeyError as error:
        raise ValueError(f"{folder / METRICS}: a row has no {error}; delete its line: its figures are lost") from error


def _metrics(folder: Path) -> Path:
    """The file of a training's figures.

    Raises:
        ValueError: it has changed since the training ended.
    """
    path = folder / METRICS
    entry = read_manifest(folder).summary.get("metrics") if (folder / MANIFEST).exists() else None
    if entry and path.exists() and file_digest(path) != entry["sha256"]:
        raise ValueError(
            f"{path} has changed since the training ended: restore it, or delete it, and the report has no curve of it"
        )
    return path


def _histogram(view: View, run_tasks: RunTasks) -> contents.ScoreHistogram | None:
    if view.measure is None:
        return None
    edges, counts, annotated = score_histogram(view, run_tasks)
    return contents.ScoreHistogram(
        bin_edges=tuple(edges.tolist()),
        counts=tuple(counts.tolist()),
        tau=view.summary["tau"],
        annotated_counts=tuple(annotated.tolist()) if view.annotated else None,
        measure=view.measure_name,
        ranks=view.ranks,
    )


def _documents(view: View, count: int) -> list[contents.RankedDocument]:
    return [
        contents.RankedDocument(
            doc_id=document.unit_id,
            source=document.source + (f", {document.left_out:,} more tokens not shown" if document.left_out else ""),
            rank=document.rank,
            rank_score=document.rank_score,
            tokens=tuple(
                contents.Token(text=text, score=score, masked=bool(masked), annotated=bool(annotated))
                for text, score, masked, annotated in zip(
                    document.texts, _scores(view, document), document.masked, document.annotated, strict=True
                )
            ),
        )
        for document in view.top_documents(count)
    ]


def _scores(view: View, document: ShownDocument) -> list[float | None]:
    """The scores of its tokens; None of those that have no rank, as a block's first token, which is not predicted, and
    of all where the tables of scores are gone."""
    if document.scores is None:
        return [None] * len(document.texts)
    return [None if view.ranks and score == 0 else score for score in document.scores.tolist()]


def _outliers(view: View) -> contents.Outliers | None:
    """The blocks that stand out by mass or repetition, the heaviest first; None where there are none."""
    summary, options = view.summary, view.options
    if not summary["high_mass_blocks"] and not summary["repeated_blocks"]:
        return None
    rows = []
    for record, text in view.outliers(MAX_OUTLIERS):
        names = ("block_id", "mass_over_median", "distinct_bigram_share", "repeated")
        rows.append(contents.OutlierRow(**{name: record[name] for name in names}, text=text))
    return contents.Outliers(
        high_mass=summary["high_mass_blocks"],
        repeated=summary["repeated_blocks"],
        mass_ratio=options["outlier_mass_ratio"],
        excluded=options["exclude_repeated"],
        rows=tuple(rows),
    )


def _provenance(folders: Mapping[str, Path]) -> tuple[contents.ArtifactRow, ...]:
    """The manifests of those that are there."""
    rows = []
    for name, folder in folders.items():
        if (folder / MANIFEST).exists():
            manifest = read_manifest(folder)
            rows.append(
                contents.ArtifactRow(
                    verb=manifest.verb,
                    folder=name,
                    fingerprint=manifest.fingerprint,
                    inputs=tuple(f"{key} {value[:12]}" for key, value in manifest.inputs.items()),
                    created=manifest.created,
                    rows=next(iter(manifest.rows.values()), None),
                    seconds=manifest.seconds,
                )
            )
    return tuple(rows)
