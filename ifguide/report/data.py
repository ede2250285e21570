"""The content of the report page, gathered from a run's artifacts and the evaluation's results."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from ifguide import schemas
from ifguide.artifacts import MANIFEST, data_files, environment, read_manifest
from ifguide.config import OWN, ClassifierSource, to_yaml
from ifguide.corpus.tables import document_table
from ifguide.evaluation.figures import THRESHOLD
from ifguide.evaluation.prompts import PROMPTS
from ifguide.methods.marks import Find, find_sentences, find_words
from ifguide.report.contents import (
    AgreementRow,
    ArtifactRow,
    Behaviour,
    OutlierRow,
    Outliers,
    RankedDocument,
    ReportData,
    ScoreHistogram,
    Token,
    TrainingCurve,
)
from ifguide.report.figures import Figure, ModelRow, model_rows
from ifguide.report.view import View, mask_agreement, score_histogram
from ifguide.run import BASELINE, PENALISED, Run
from ifguide.stages.build_mask import build_mask
from ifguide.storage import readable
from ifguide.telemetry import read_metrics
from ifguide.toxicity import LabelClassifier, make_classifier

MAX_OUTLIERS = 20
DOCUMENTS_AT_ONCE = 500  # whose sentences a classifier gets together
AGREEMENT_TOKENS = 4_000_000  # in which words and sentences are looked for: one process' work and memory
BEHAVIOURS = "behaviours"


def report_data(run: Run, models: Sequence[str], metrics: Mapping[str, Any]) -> tuple[ReportData, dict[str, Any]]:
    """The report and the headline figures: {model: {emt, tp, perplexity, ...}, mask: {precision, recall}}.

    models: the names of those evaluated. metrics: of `evaluation_figures.measure`."""
    rows = model_rows(metrics)
    figures: dict[str, Any] = {
        row.name: {
            "emt": row.whole.emt.value,
            "tp": row.whole.tp.value,
            "perplexity": _value(row.perplexity),
            "benign_perplexity": _value(row.benign_perplexity),
            "last_word_accuracy": _value(row.last_word_accuracy),
        }
        for row in rows
    }
    view = View(run.folder) if (run.mask / MANIFEST).exists() else None
    agreement = _agreement(run, view) if view and view.annotated else ()
    if agreement:
        figures["mask"] = {"precision": agreement[0].precision, "recall": agreement[0].recall}
    folders = run.artifact_folders() | {
        f"generations/{model}/{name}": run.generations(model) / name
        for model in models
        for name in (PROMPTS, *run.config.evaluate.prompt_sets)
    }
    data = ReportData(
        title=f"IF-Guide report: {run.folder.name}",
        models=rows,
        curves=_curves({name: run.model(name) for name in models}),
        behaviours=tuple(_behaviours(run, view)) if view and view.ranked else (),
        agreement=agreement,
        provenance=_provenance(folders),
        **_measurement(run, metrics),
    )
    return data, figures


def _value(figure: Figure | None) -> float | None:
    return figure.value if figure else None


def comparison_data(
    run: Run,
    rows: tuple[ModelRow, ...],
    metrics: Mapping[str, Any],
    methods: Mapping[str, Run],
) -> ReportData:
    """The report of `compare`: `rows` of the run's own models and of one for each of `methods`, by its run."""
    folders = dict(run.artifact_folders())
    trained = {name: run.model(name) for name in (BASELINE, PENALISED)}
    for name, method in methods.items():
        trained[name] = method.model(PENALISED)
        folders |= {f"compare/{name}/mask": method.mask, f"compare/{name}/model": method.model(PENALISED)}
    return ReportData(
        title=f"IF-Guide comparison: {run.folder.name}",
        models=rows,
        curves=_curves({row.name: trained[row.name] for row in rows if row.name in trained}),
        provenance=_provenance(folders),
        **_measurement(run, metrics),
    )


def _measurement(run: Run, metrics: Mapping[str, Any]) -> dict[str, Any]:
    """What the figures were measured of and with: the same for every page."""
    config = run.config.evaluate
    assert config.prompts is not None
    settings = {
        "prompts": config.prompts.path,
        **{f"prompts of {name}": source.path for name, source in config.prompt_sets.items()},
        "classifier": _classifier_text(config.classifier),
        **{f"classifier {name}": _classifier_text(source) for name, source in config.classifiers.items()},
        "prompts grouped by": ", ".join(f"{how} {count:,}" for how, count in metrics["grouped_by"].items() if count),
        "continuations of a prompt": str(config.continuations),
        "sampling": f"{config.max_new_tokens} tokens, top-p {config.top_p:g}, temperature {config.temperature:g}",
        "perplexity of": ", ".join(source.path for source in config.heldout),
        "last words of": config.cloze.path if config.cloze else "",
        **{f"model {name}": source for name, source in config.models.items()},
        "intervals": f"{100 * metrics['confidence']:g}%, {metrics['bootstrap_samples']:,} bootstrap samples",
        "seed": str(run.config.seed),
    }
    return {
        "behaviour": config.behaviour,
        "config_text": to_yaml(run.config),
        "continuations": config.continuations,
        "threshold": metrics["threshold"],
        "confidence": metrics["confidence"],
        "settings": tuple((name, value) for name, value in settings.items() if value),
        "software": tuple(sorted(environment().items())),
    }


def _classifier_text(source: ClassifierSource) -> str:
    return ", ".join(filter(None, (source.name, source.label, source.checkpoint)))


def _behaviours(run: Run, view: View) -> Iterator[Behaviour]:
    """What the scores say of every behaviour they hold, the mask's first.

    Of the others, `build_mask` ranks and selects in a run of their own in `report/behaviours/`, by the same options:
    nothing is trained with that."""
    trained, own = run.config.build_mask.behaviour, run.config.evaluate.behaviour
    files = data_files(run.scores)  # none where somebody has removed them after build_mask
    scored = schemas.scored_behaviours(pq.read_schema(readable(files[0]))) if files else ()
    own = f"{own} (own query)" if own in scored else own
    yield _behaviour(run, view, own if trained == OWN else trained, trained=True)
    for behaviour in scored:
        if behaviour != trained:
            other = _behaviour_run(run, behaviour)
            build_mask(other)
            name = own if behaviour == OWN else behaviour
            yield _behaviour(run, View(other.folder, corpus=other.corpus, scores=other.scores), name, trained=False)


def _behaviour_run(run: Run, behaviour: str) -> Run:
    config = replace(
        run.config,
        run_dir=str(run.report / BEHAVIOURS / behaviour),
        build_mask=replace(run.config.build_mask, behaviour=behaviour),
    )
    return Run(config=config).borrow(run, "corpus", "scores")


def _behaviour(run: Run, view: View, name: str, *, trained: bool) -> Behaviour:
    return Behaviour(
        name=name,
        trained=trained,
        histogram=_histogram(view),
        documents=tuple(_documents(view, run.config.evaluate.top_documents)),
        outliers=_outliers(view),
    )


def _curves(folders: Mapping[str, Path]) -> tuple[TrainingCurve, ...]:
    return tuple(curve for curve in map(_curve, folders, folders.values()) if curve)


def _curve(name: str, folder: Path) -> TrainingCurve | None:
    logged = read_metrics(folder / "metrics.jsonl")
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
    config = run.config.evaluate
    finders: dict[str, Find] = {}
    if config.word_list:
        finders["word list"] = find_words(config.word_list)
    classifier = make_classifier(config.classifier, gpus=0)
    if not isinstance(classifier, LabelClassifier):

        def classify(texts: list[str]) -> np.ndarray:
            return classifier.score(texts)[classifier.classes[0]]

        finders[f"sentences by {config.classifier.name}"] = find_sentences(classify, THRESHOLD)
    return _agreement_row("mask (IF-Guide)", selected, known, both), *_span_agreement(view, finders, run.config.seed)


def _span_agreement(view: View, finders: Mapping[str, Find], seed: int) -> Iterator[AgreementRow]:
    """Tokens that overlap a found span against the annotated ones, of each method.

    The text is what a document's tokens decode to. Of a large corpus it is that of a sample, and the row says so.
    """
    counts = {method: np.zeros(3, dtype=np.int64) for method in finders}
    table = document_table(view.corpus)
    starts = table.column("token_start").to_numpy()
    stops = starts + table.column("num_tokens").to_numpy()
    parts = _sampled_documents(view, starts, stops, seed)
    for part in parts:
        begin = starts[part.start]
        columns = view.read(begin, stops[part.stop - 1])
        for first in range(0, len(part), DOCUMENTS_AT_ONCE):
            own = [slice(starts[i] - begin, stops[i] - begin - 1) for i in part[first : first + DOCUMENTS_AT_ONCE]]
            tokens, annotated = ([columns[name][each] for each in own] for name in ("tokens", "annotated"))
            for method, counted in _count(view.tokenizer, finders, tokens, annotated):
                counts[method] += counted
    sampled = sum(map(len, parts))
    sample = f", in {sampled:,} of {len(starts):,} documents" if sampled < len(starts) else ""
    for method, values in counts.items():
        yield _agreement_row(method + sample, *values.tolist())


def _sampled_documents(view: View, starts: np.ndarray, stops: np.ndarray, seed: int) -> list[range]:
    """The documents, or those that lie within shards drawn by seed, of `AGREEMENT_TOKENS` tokens at most; neighbours
    in one range. Document i covers the tokens `starts[i]` to `stops[i]`."""
    if stops[-1] <= AGREEMENT_TOKENS:
        return [range(len(starts))]
    bounds = np.append(np.array(view.first_blocks) * view.block_size, stops[-1])
    parts, left = [], AGREEMENT_TOKENS
    for shard in np.random.default_rng(seed).permutation(len(view.files)):
        begin, end = bounds[shard], min(bounds[shard + 1], bounds[shard] + left)
        parts.append(range(int(np.searchsorted(starts, begin)), int(np.searchsorted(stops, end, side="right"))))
        left -= end - begin
    return [part for part in parts if part]


def _count(
    tokenizer: Any, finders: Mapping[str, Find], tokens: list[np.ndarray], annotated: list[np.ndarray]
) -> Iterator[tuple[str, tuple[int, int, int]]]:
    """(found, annotated, both) of each document and method."""
    ids = [each.tolist() for each in tokens]
    texts = [str(tokenizer.decode(each, clean_up_tokenization_spaces=False)) for each in ids]
    for method, find in finders.items():
        for i, spans in enumerate(find(texts)):
            found = np.zeros(len(ids[i]), dtype=bool)
            if spans:
                begins, ends = _token_places(tokenizer, texts[i], ids[i]).T
                for begin, end in spans:
                    found |= (begins < end) & (ends > begin)
            yield method, (int(found.sum()), int(annotated[i].sum()), int((found & annotated[i]).sum()))


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


def _provenance(folders: Mapping[str, Path]) -> tuple[ArtifactRow, ...]:
    """The manifests of those that are there."""
    rows = []
    for name, folder in folders.items():
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
    return tuple(rows)
