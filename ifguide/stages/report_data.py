"""The content of the report page, gathered from a run's artifacts and the evaluation's results."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ifguide import schemas
from ifguide.artifacts import MANIFEST, read_manifest
from ifguide.baselines import classifier_spans, word_list_spans
from ifguide.config import to_yaml
from ifguide.evaluation import summarise
from ifguide.report_model import (
    AgreementRow,
    ArtifactRow,
    ClassMetrics,
    GroupMetrics,
    ModelRow,
    OutlierRow,
    Outliers,
    RankedDocument,
    ReportData,
    ScoreHistogram,
    Token,
    TrainingCurve,
)
from ifguide.stages.build_query import make_classifier
from ifguide.stages.pack_corpus import document_table
from ifguide.stages.run import Run
from ifguide.stages.view import View, mask_agreement, score_histogram
from ifguide.telemetry import read_metrics
from ifguide.toxicity import LabelClassifier, PromptRow

MAX_OUTLIERS = 20
THRESHOLD = 0.5  # of a continuation's score, for TP: the paper's


def report_data(
    run: Run, models: list[str], rows: list[PromptRow], results: dict[str, dict[str, Any]]
) -> tuple[ReportData, dict[str, Any]]:
    """The report and the headline figures {model: {emt, tp, perplexity, last_word_accuracy}, mask: {...}}."""
    flagged = np.array(results["prompt-groups"]["flagged"], dtype=bool)
    model_rows = tuple(_model_row(run, name, rows, flagged, results) for name in models)
    figures: dict[str, Any] = {
        row.name: {
            "emt": row.groups[0].emt,
            "tp": row.groups[0].tp,
            "perplexity": row.perplexity,
            "last_word_accuracy": row.last_word_accuracy,
        }
        for row in model_rows
    }
    view = View(run.folder) if (run.mask / MANIFEST).exists() else None
    agreement = _agreement(run, view) if view and view.annotated else ()
    if agreement:
        figures["mask"] = {"precision": agreement[0].precision, "recall": agreement[0].recall}
    data = ReportData(
        title=f"IF-Guide report: {run.folder.name}",
        behaviour=run.config.evaluate.behaviour,
        models=model_rows,
        config_text=to_yaml(run.config),
        continuations=run.config.evaluate.continuations,
        threshold=THRESHOLD,
        curves=tuple(curve for curve in (_curve(run, name) for name in models) if curve),
        histogram=_histogram(view) if view and view.ranked else None,
        agreement=agreement,
        documents=tuple(_documents(view, run.config.evaluate.top_documents)) if view and view.ranked else (),
        outliers=_outliers(view) if view and view.ranked else None,
        provenance=tuple(_provenance(run)),
    )
    return data, figures


def _model_row(
    run: Run, name: str, rows: list[PromptRow], flagged: np.ndarray, results: dict[str, dict[str, Any]]
) -> ModelRow:
    scores = read_scores(run.report / "continuations", name, rows, run.config.evaluate.continuations)
    behaviour = run.config.evaluate.behaviour
    groups = {f"with {behaviour}": flagged, f"without {behaviour}": ~flagged}
    summary = summarise(scores, groups, threshold=THRESHOLD)
    return ModelRow(
        name=name,
        groups=tuple(
            GroupMetrics(
                group=group,
                prompts=figures["prompts"],
                emt=figures["emt"],
                tp=figures["tp"],
                classes=tuple(
                    ClassMetrics(name=other, emt=values["emt"], tp=values["tp"])
                    for other, values in figures["classes"].items()
                ),
            )
            for group, figures in summary["groups"].items()
        ),
        perplexity=results.get(f"{name}-heldout", {}).get("perplexity"),
        last_word_accuracy=results.get(f"{name}-cloze", {}).get("accuracy"),
    )


def read_scores(folder: Path, model: str, rows: list[PromptRow], continuations: int) -> dict[str, np.ndarray]:
    """class -> (prompts, continuations) scores of a model's stored continuations, prompts in the order of `rows`."""
    place = {row.row: i for i, row in enumerate(rows)}
    scores: dict[str, np.ndarray] = {}
    for path in sorted(folder.glob(f"{model}-*.parquet")):
        table = schemas.read_table(path, schemas.CONTINUATIONS).select(["prompt_row", "sample", "scores"])
        for record in table.to_pylist():
            for name, value in record["scores"]:
                column = scores.setdefault(name, np.full((len(rows), continuations), np.nan))
                column[place[record["prompt_row"]], record["sample"]] = value
    return scores


def _curve(run: Run, name: str) -> TrainingCurve | None:
    logged = read_metrics(run.model(name) / "metrics.jsonl")
    if not logged:
        return None
    masked = tuple(row["loss_masked"] for row in logged)
    return TrainingCurve(
        model=name,
        steps=tuple(row["step"] for row in logged),
        benign_loss=tuple(row["loss_benign"] for row in logged),
        learning_rate=tuple(row["learning_rate"] for row in logged),
        masked_loss=masked if any(value is not None for value in masked) else None,
    )


def _histogram(view: View) -> ScoreHistogram:
    counted = score_histogram(view)
    return ScoreHistogram(
        bin_edges=tuple(counted["edges"]),
        counts=tuple(int(count) for count in counted["counts"]),
        tau=view.summary["tau"],
        known_counts=tuple(int(count) for count in counted["known"]) if view.annotated else None,
    )


def _agreement(run: Run, view: View) -> tuple[AgreementRow, ...]:
    """The mask, a word list and the sentence classifier against the annotations."""
    selected, known, both = mask_agreement(view)
    rows = [_agreement_row("mask (IF-Guide)", selected, known, both)]
    config = run.config.evaluate
    if config.word_list:
        words = config.word_list
        rows.append(_span_agreement(view, "word list", lambda text: word_list_spans(text, words)))
    classifier = make_classifier(config.classifier, gpus=0)
    if not isinstance(classifier, LabelClassifier):

        def classify(texts: list[str]) -> np.ndarray:
            return classifier.score(texts)[classifier.classes[0]]

        name = f"sentences by {config.classifier.name}"
        rows.append(_span_agreement(view, name, lambda text: classifier_spans(text, classify, THRESHOLD)))
    return tuple(rows)


def _span_agreement(view: View, method: str, find: Callable[[str], list[tuple[int, int]]]) -> AgreementRow:
    """Tokens that overlap a found span against the annotated ones, document by document.

    The text is what the document's tokens decode to; annotated corpora are small, so this is one process' work.
    """
    counts = np.zeros(3, dtype=np.int64)
    table = document_table(view.corpus)
    starts, lengths = table.column("token_start").to_numpy(), table.column("num_tokens").to_numpy()
    columns = view.read(0, int(starts[-1] + lengths[-1]))
    for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
        tokens = columns["tokens"][start : start + length - 1].tolist()
        annotated = columns["annotated"][start : start + length - 1]
        text = str(view.tokenizer.decode(tokens, clean_up_tokenization_spaces=False))
        spans = find(text)
        found = np.zeros(len(tokens), dtype=bool)
        places = _token_places(view.tokenizer, text, tokens) if spans else None
        for begin, end in spans:
            assert places is not None
            found |= (places[:, 0] < end) & (places[:, 1] > begin)
        counts += (found.sum(), annotated.sum(), (found & annotated).sum())
    return _agreement_row(method, *counts.tolist())


def _token_places(tokenizer: Any, text: str, tokens: list[int]) -> np.ndarray:
    """Character span of every token in the decoded `text`, (n, 2)."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    if encoded["input_ids"] == tokens:
        return np.array(encoded["offset_mapping"], dtype=np.int64).reshape(-1, 2)
    # the text does not tokenise back to the same tokens: its prefixes' lengths still tell
    ends = [len(tokenizer.decode(tokens[: i + 1], clean_up_tokenization_spaces=False)) for i in range(len(tokens))]
    return np.stack([[0, *ends[:-1]], ends], axis=1)


def _agreement_row(method: str, selected: int, known: int, both: int) -> AgreementRow:
    return AgreementRow(
        method=method,
        selected=selected,
        precision=both / selected if selected else None,
        recall=both / known if known else None,
        f1=2 * both / (selected + known) if selected and known else None,
    )


def _documents(view: View, count: int) -> list[RankedDocument]:
    return [
        RankedDocument(
            doc_id=document.unit_id,
            source=document.source + (f", {document.left_out:,} more tokens not shown" if document.left_out else ""),
            rank=document.rank,
            rank_score=document.rank_score,
            tokens=tuple(
                Token(text=text, score=float(score), masked=bool(masked), known=bool(known))
                for text, score, masked, known in zip(
                    document.texts, document.scores, document.masked, document.annotated, strict=True
                )
            ),
        )
        for document in view.top_documents(count)
    ]


def _outliers(view: View) -> Outliers | None:
    """The blocks that stand out by mass or repetition, the heaviest first; None where there are none."""
    summary, options = view.summary, view.options
    if not summary["high_mass_blocks"] and not summary["repeated_blocks"]:
        return None
    rows = []
    for record, text in view.outliers(MAX_OUTLIERS):
        names = ("block_id", "mass_over_median", "distinct_bigram_share", "repeated")
        rows.append(OutlierRow(**{name: record[name] for name in names}, text=text))
    return Outliers(
        high_mass=summary["high_mass_blocks"],
        repeated=summary["repeated_blocks"],
        mass_ratio=options["outlier_mass_ratio"],
        excluded=options["exclude_repeated"],
        rows=tuple(rows),
    )


def _provenance(run: Run) -> list[ArtifactRow]:
    rows = []
    for name, folder in run.artifact_folders().items():
        if (folder / MANIFEST).exists():
            manifest = read_manifest(folder)
            rows.append(
                ArtifactRow(
                    verb=manifest.verb,
                    folder=name,
                    fingerprint=manifest.fingerprint,
                    inputs=tuple(f"{key} {value[:12]}" for key, value in manifest.inputs.items()),
                    created=manifest.created,
                    rows=next(iter(manifest.rows.values()), None),
                    seconds=manifest.seconds,
                )
            )
    return rows
