"""The artifacts of a selection: a ranking, and a mask with its character spans, from the scores of a corpus.

Where `build_mask.others` names the scores of other runs, an artifact of mean ranks is made first (`selection.ensemble`)
and takes the place of the scores.

Blocks that stand out, of great score mass or of repeated tokens, are listed beside the ranking (`selection.outliers`).
The scratch tables of an interrupted run are not used again: the passes are cheap beside scoring, and a rerun computes
the same bytes.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from ifguide import schemas
from ifguide.artifacts import (
    Artifact,
    Manifest,
    data_files,
    open_artifact,
    remove_tree,
    require,
    require_same,
    verified_files,
)
from ifguide.config import BuildMask, ConfigError
from ifguide.config.typed_yaml import result_part
from ifguide.distributed.shards import StageError
from ifguide.selection.distributed import RunTasks, Selection, select
from ifguide.selection.ensemble import find_ensemble, make_ensemble
from ifguide.selection.folders import SelectionFolders
from ifguide.selection.measures import measure_of
from ifguide.selection.outliers import dominant_line, outlier_line
from ifguide.selection.shards import Rules, ShardFiles
from ifguide.spans.tables import SPANS, PackedCorpus, write_spans
from ifguide.telemetry import log

VERB = "build_mask"


def make_mask(options: BuildMask, folders: SelectionFolders, *, config_yaml: str, run_tasks: RunTasks) -> Manifest:
    """Make `folders.ranking` and `folders.mask`, or find them complete; returns the mask's manifest.

    Raises:
        MismatchError: scores are of another corpus. ConfigError: `behaviour` was not scored, or one of `others` is no
            folder of scores. ValueError: a score is NaN or infinite (names the block), or a shard of the scores has
            changed (names it).
    """
    corpus, scores = require(folders.corpus, "pack_corpus"), require(folders.scores, "score_corpus")
    require_same(
        f"the corpus of {folders.scores}",
        scores.inputs["corpus"],
        f"{folders.corpus}",
        corpus.fingerprint,
        "score this corpus, or name the scores' own",
    )
    require_behaviour(options.behaviour, folders.scores)
    own = measure_of(replace(options, others=()), folders.scores)
    ensemble = find_ensemble(options, folders) if options.others else None
    others = {name: run for name, run in ensemble.runs.items() if name != "scores"} if ensemble else {}
    inputs = {"corpus": corpus.fingerprint, "scores": scores.fingerprint}
    plan: dict[str, Any] = {
        "verb": VERB,
        "options": {VERB: result_part(options)},
        "inputs": inputs | {name: manifest.fingerprint for name, (_, manifest) in others.items()},
        "config_yaml": config_yaml,
    }
    ranking, mask = open_artifact(folders.ranking, **plan), open_artifact(folders.mask, **plan)
    if mask.manifest and ranking.manifest:
        log(VERB, f"complete: {mask.manifest.summary}")
        return mask.manifest
    if ensemble:
        scores = make_ensemble(ensemble, options, folders, config_yaml=config_yaml, run_tasks=run_tasks)
        folders = replace(folders, scores=folders.ensemble)
    rules = _rules(options, folders)
    remove_tree(rules.scratch)
    selected = select(rules, _shard_files(folders, scores), run_tasks)
    if selected.num_blocks != corpus.rows["blocks"]:
        raise StageError(
            f"{VERB}: {selected.num_blocks} blocks were masked, {folders.corpus} has {corpus.rows['blocks']}"
        )
    summary = _summary(selected, options, smoothed=own.column == schemas.smoothed_column(options.behaviour))
    if others:
        named = [{"folder": str(folder), "fingerprint": other.fingerprint} for folder, other in others.values()]
        summary["ensemble"] = named
    if not ranking.manifest:
        rows = {"units": selected.ranked_units, "outliers": selected.outliers["blocks"]}
        tables = [path for name in ("ranking", "outliers") for path in data_files(folders.ranking, f"{name}-*.parquet")]
        ranking.finish(tables, rows=rows, summary=summary)
    if mask.manifest:  # only the ranking was made again
        remove_tree(rules.scratch)
    else:
        _keep_spans(folders, corpus, selected.tokens_masked, run_tasks)
        _finish(mask, selected, summary, rules)
    assert mask.manifest is not None
    _log_selection(selected, summary, options, mask.plan["options"][VERB])
    return mask.manifest


def _log_selection(
    selected: Selection, summary: Mapping[str, Any], options: BuildMask, recorded: Mapping[str, Any]
) -> None:
    share = selected.tokens_masked / max(selected.predicted_tokens, 1)
    log(
        VERB,
        f"tau {selected.tau:.6g}; {selected.units_masked:,} of {selected.num_units:,} {options.unit}s touched,"
        f" {selected.tokens_masked:,} tokens masked ({share:.2%} of the corpus); `ifguide inspect` shows them",
    )
    if selected.discoveries:
        chance = f"{selected.discoveries.rate:.3g} of them by chance (build_mask.fdr: {options.fdr:g})"
        log(VERB, f"{selected.discoveries.count:,} tokens have z-scores above tau, {chance}")
    log(VERB, outlier_line(summary, recorded))
    if dominant := dominant_line(summary, recorded):
        log(VERB, dominant, level=logging.WARNING)


def _finish(mask: Artifact, selected: Selection, summary: dict[str, Any], rules: Rules) -> None:
    files = data_files(mask.folder) + data_files(mask.folder, SPANS)
    rows = {"blocks": selected.num_blocks, "tokens": selected.tokens_masked}
    mask.finish(files, rows=rows, summary=summary, remove=(rules.scratch.name,))


def _keep_spans(folders: SelectionFolders, corpus: Manifest, masked: int, run_tasks: RunTasks) -> None:
    """Write the mask as character spans of every document, for targets with another tokenizer."""
    packed = PackedCorpus.of(folders.corpus, corpus)
    arguments = ((packed, folders.mask, shard) for shard in range(packed.num_shards))
    counts = list(run_tasks(write_spans, arguments))
    documents, spans, tokens = (sum(column) for column in zip(*counts, strict=True))
    if (documents, tokens) != (corpus.rows["documents"], masked):
        raise StageError(
            f"{VERB}: spans of {documents} documents and {tokens} masked tokens, where {corpus.rows['documents']} and"
            f" {masked} are expected"
        )
    log(VERB, f"{spans:,} character spans of {documents:,} documents")


def _summary(selected: Selection, options: BuildMask, *, smoothed: bool) -> dict[str, Any]:
    return {
        "tau": selected.tau,
        "predicted_tokens": selected.predicted_tokens,
        "tokens_masked": selected.tokens_masked,
        "token_budget": selected.budget,
        "units_above_tau": selected.ranked_units,
        "units_masked": selected.units_masked,
        "largest_unit": selected.largest_unit[0],
        "largest_unit_tokens": selected.largest_unit[1],
        "unit": options.unit,
        "behaviour": options.behaviour,
        "smoothed": smoothed,
        "score_min": selected.score_range[0],
        "score_max": selected.score_range[1],
        "median_block_mass": selected.median_mass,
        "high_mass_blocks": selected.outliers["high_mass"],
        "repeated_blocks": selected.outliers["repeated"],
        "excluded_blocks": selected.excluded_blocks,
        **({"null_spread": asdict(selected.spread)} if selected.spread else {}),
        **({"discoveries": asdict(selected.discoveries)} if selected.discoveries else {}),
    }


def _rules(options: BuildMask, folders: SelectionFolders) -> Rules:
    return Rules(
        quantile=options.quantile,
        window=options.window,
        max_fraction=options.max_fraction,
        unit=options.unit,
        prior=options.rate_prior if options.rank_by == "rate" else None,
        measure=measure_of(options, folders.scores),
        fdr=options.fdr,
        outlier_mass_ratio=options.outlier_mass_ratio,
        outlier_bigram_share=options.outlier_bigram_share,
        exclude_repeated=options.exclude_repeated,
        ranking=folders.ranking,
        mask=folders.mask,
    )


def require_behaviour(behaviour: str, scores: Path) -> None:
    """Refuse a `build_mask.behaviour` that the folder of scores does not hold.

    Raises:
        ConfigError: names the behaviours that it does hold.
    """
    behaviours = schemas.scored_behaviours(schemas.read_schema(next(verified_files(scores))))
    if behaviour not in behaviours:
        raise ConfigError(
            f"build_mask.behaviour: {behaviour!r} is not in {scores}, which holds {', '.join(behaviours)}"
        )


def shown_options(options: BuildMask, behaviour: str, scores: pa.Schema) -> BuildMask:
    """A run's `options` for the mask of another `behaviour`, which is only shown.

    They want no z-scores where the tables of scores, of the schema `scores`, hold no nulls of the behaviour.
    """
    if schemas.null_columns(scores, behaviour):
        return replace(options, behaviour=behaviour)
    return replace(options, behaviour=behaviour, standardise=False, fdr=None)


def _shard_files(folders: SelectionFolders, scored: Manifest) -> list[ShardFiles]:
    corpus_files, score_files = data_files(folders.corpus), data_files(folders.scores)
    if [path.name for path in corpus_files] != [path.name for path in score_files]:
        raise StageError(f"{VERB}: {folders.corpus} and {folders.scores} hold different shards")
    shards, made_by = [], VERB if scored.verb == VERB else "score_corpus"
    for corpus, scores in zip(corpus_files, score_files, strict=True):
        name = corpus.stem.removeprefix("shard-")
        if scores.name not in scored.files:
            raise StageError(
                f"{VERB}: {scores} is not in its manifest; delete {folders.scores} and score the corpus again"
            )
        digest = scored.files[scores.name]["sha256"]
        documents = folders.corpus / f"documents-{name}.parquet"
        shards.append(ShardFiles(name, corpus, documents, scores, digest, made_by))
    return shards
