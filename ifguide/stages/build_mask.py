"""`build_mask`: token scores -> ranking of documents and token mask, by Algorithm 1, exactly.

The passes of `ifguide.selection.distributed` as Ray tasks, one for each shard. Blocks that stand out, of great score
mass or of repeated tokens, are listed beside the ranking (`ifguide.selection.outliers`). The scratch tables of an
interrupted run are not used again: the passes are cheap beside scoring, and a rerun computes the same bytes.
"""

from __future__ import annotations

from typing import Any

from ifguide import schemas
from ifguide.artifacts import Manifest, data_files, remove_tree, require, require_same
from ifguide.distributed.session import connect
from ifguide.distributed.shards import StageError
from ifguide.distributed.tasks import run_tasks
from ifguide.run import Run
from ifguide.selection.distributed import Selection, select
from ifguide.selection.outliers import outlier_line
from ifguide.selection.passes import Rules, ShardFiles, require_behaviour
from ifguide.spans.tables import SPANS, PackedCorpus, write_spans
from ifguide.telemetry import log

VERB = "build_mask"


def build_mask(run: Run, *, dry_run: bool = False) -> Manifest | None:
    """Make `ranking/` and `mask/`.

    Raises:
        MismatchError: the scores are of another corpus. ConfigError: `behaviour` was not scored.
        ValueError: a score is NaN or infinite (names the block), or a shard of the scores has changed (names it).
    """
    config = run.config.build_mask
    if dry_run:
        log(
            VERB,
            f"would mask up to {config.max_fraction:.2%} of the tokens, those above the {config.quantile} quantile"
            f" and {config.window} neighbours, {config.unit} by {config.unit}",
        )
        return None
    corpus, scores = require(run.corpus, "pack_corpus"), require(run.scores, "score_corpus")
    require_same(
        f"the corpus of {run.scores}",
        scores.inputs["corpus"],
        f"{run.corpus}",
        corpus.fingerprint,
        "score this corpus, or name the scores' own",
    )
    require_behaviour(config.behaviour, run.scores)
    inputs = {"corpus": corpus.fingerprint, "scores": scores.fingerprint}
    ranking_artifact = run.open(run.ranking, VERB, keys=("build_mask",), inputs=inputs)
    artifact = run.open(run.mask, VERB, keys=("build_mask",), inputs=inputs)
    if artifact.manifest and ranking_artifact.manifest:
        log(VERB, f"complete: {artifact.manifest.summary}")
        return artifact.manifest
    connect(run.config.cluster)
    rules = _rules(run)
    remove_tree(rules.scratch)
    selected = select(rules, _shard_files(run, scores), run_tasks(config.resources))
    if selected.num_blocks != corpus.rows["blocks"]:
        raise StageError(f"{VERB}: {selected.num_blocks} blocks were masked, {run.corpus} has {corpus.rows['blocks']}")
    summary = _summary(selected, run)
    if not ranking_artifact.manifest:
        rows = {"units": selected.ranked_units, "outliers": selected.outliers["blocks"]}
        tables = [path for name in ("ranking", "outliers") for path in data_files(run.ranking, f"{name}-*.parquet")]
        ranking_artifact.finish(tables, rows=rows, summary=summary)
    if not artifact.manifest:
        _keep_spans(run, corpus, selected.tokens_masked)
    rows = {"blocks": selected.num_blocks, "tokens": selected.tokens_masked}
    manifest = artifact.manifest or artifact.finish(
        data_files(run.mask) + data_files(run.mask, SPANS), rows=rows, summary=summary, remove=(rules.scratch.name,)
    )
    share = selected.tokens_masked / max(selected.predicted_tokens, 1)
    log(
        VERB,
        f"tau {selected.tau:.6g}; {selected.units_masked:,} of {selected.num_units:,} {config.unit}s touched,"
        f" {selected.tokens_masked:,} tokens masked ({share:.2%} of the corpus); `ifguide inspect` shows them",
    )
    log(VERB, outlier_line(summary, artifact.plan["options"][VERB]))
    return manifest


def _keep_spans(run: Run, corpus: Manifest, masked: int) -> None:
    """Write the mask as character spans of every document, for targets with another tokenizer."""
    packed = PackedCorpus.of(run.corpus, corpus)
    arguments = ((packed, run.mask, shard) for shard in range(packed.num_shards))
    counts = list(run_tasks(run.config.build_mask.resources)(write_spans, arguments))
    documents, spans, tokens = (sum(column) for column in zip(*counts, strict=True))
    if (documents, tokens) != (corpus.rows["documents"], masked):
        raise StageError(
            f"{VERB}: spans of {documents} documents and {tokens} masked tokens, where {corpus.rows['documents']} and"
            f" {masked} are expected"
        )
    log(VERB, f"{spans:,} character spans of {documents:,} documents")


def _summary(selected: Selection, run: Run) -> dict[str, Any]:
    return {
        "tau": selected.tau,
        "predicted_tokens": selected.predicted_tokens,
        "tokens_masked": selected.tokens_masked,
        "token_budget": selected.budget,
        "units_above_tau": selected.ranked_units,
        "units_masked": selected.units_masked,
        "unit": run.config.build_mask.unit,
        "behaviour": run.config.build_mask.behaviour,
        "score_min": selected.score_range[0],
        "score_max": selected.score_range[1],
        "median_block_mass": selected.median_mass,
        "high_mass_blocks": selected.outliers["high_mass"],
        "repeated_blocks": selected.outliers["repeated"],
        "excluded_blocks": selected.excluded_blocks,
    }


def _rules(run: Run) -> Rules:
    config = run.config.build_mask
    return Rules(
        quantile=config.quantile,
        window=config.window,
        max_fraction=config.max_fraction,
        unit=config.unit,
        column=schemas.score_column(config.behaviour),
        outlier_mass_ratio=config.outlier_mass_ratio,
        outlier_bigram_share=config.outlier_bigram_share,
        exclude_repeated=config.exclude_repeated,
        ranking=run.ranking,
        mask=run.mask,
    )


def _shard_files(run: Run, scored: Manifest) -> list[ShardFiles]:
    corpus_files, score_files = data_files(run.corpus), data_files(run.scores)
    if [path.name for path in corpus_files] != [path.name for path in score_files]:
        raise StageError(f"{VERB}: {run.corpus} and {run.scores} hold different shards")
    shards = []
    for corpus, scores in zip(corpus_files, score_files, strict=True):
        name = corpus.stem.removeprefix("shard-")
        if scores.name not in scored.files:
            raise StageError(f"{VERB}: {scores} is not in its manifest; delete {run.scores} and score the corpus again")
        digest = scored.files[scores.name]["sha256"]
        shards.append(ShardFiles(name, corpus, run.corpus / f"documents-{name}.parquet", scores, digest))
    return shards
