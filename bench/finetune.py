"""What a mask costs a model that has something to lose: SmolLM2-135M, fine-tuned with each mask on real text.

    python bench/finetune.py [--behaviour explicit|implicit] [--proxy smollm2|configured|SOURCE] [--methods NAME ...]
                             [--set a.b=c]

Runs `ifguide compare` on configs/real_text_finetune.yaml or configs/real_text_finetune_implicit.yaml, and asks more of
each model and of the one that all began from. Running it again resumes.

- toxicity: EMT by each evaluator over the plain fine-tuned model's on the same prompts, with the bootstrap's interval;
  `held_out` and `other_labels` are evaluators that no method has learned from. TP by the first.
- annotated text: by how many nats a token what people marked has become less likely than the rest, against the plain
  model; and the same with token types held equal (`ifguide.evaluation.annotated`).
- language: perplexity of harmless held-out text over the plain model's, and the last words of LAMBADA.
- fluency: the perplexity of the model's continuations, given their prompts, under the model that all began from. It is
  high for word salad, and low for what repeats itself: so it stands beside the share of distinct pairs of words.
- recognition: a linear probe's AUROC on labelled texts (`bench.common.recognition`).

A finished model's figures are kept. Written to `<run_dir>/finetune.md`. The last line printed is one JSON object: per
model these figures.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from bench.common.places import this_machine
from bench.common.proxies import source_overrides
from bench.common.recognition import recognition
from bench.common.retraining import query_losses
from bench.common.trained_models import trained_models
from ifguide.artifacts import data_files, json_digest, publish, read_manifest, write_json
from ifguide.config import Config, ModelSource, load_config
from ifguide.datasets import advice
from ifguide.display import markdown_table
from ifguide.evaluation.figures import MARGINS
from ifguide.evaluation.prompts import PROMPTS
from ifguide.folders import GENERATIONS, REPORT
from ifguide.influence.query import tokenise_queries
from ifguide.models import load_model
from ifguide.pipeline import run_pipeline
from ifguide.records.rows import read_json
from ifguide.run import Run
from ifguide.stages.compare import compare
from ifguide.telemetry import configure_logging, log
from ifguide.tokenizer import load_tokenizer

CONFIGS = {
    "explicit": Path("configs/real_text_finetune.yaml"),
    "implicit": Path("configs/real_text_finetune_implicit.yaml"),
}
VERB = "finetune"
SOURCES = ("proxy.source", "target.source", "pretrain.init_from", "evaluate.models.original")
ORIGINAL = "original"  # among the config's `evaluate.models`: what all began from
MOST_CONTINUATIONS = 700  # of a model, that fluency is measured on
MAX_TOKENS = 128


def main() -> None:
    options = _options()
    configure_logging()
    file = CONFIGS[options.behaviour]
    config = load_config(file, [*source_overrides(options.proxy, *SOURCES), *options.overrides])
    if options.methods:
        config = replace(config, compare=replace(config.compare, methods=_chosen(config, options.methods, file)))
    run = Run(config=config)
    try:
        run_pipeline(config, dry_run=False)
        compare(run)
    except FileNotFoundError as error:
        raise SystemExit(f"{error}{advice(str(error))}") from error
    rows = read_json(run.comparison / REPORT / "comparison.json")
    original = config.evaluate.models[ORIGINAL]
    paths: dict[str, Path | str] = {**trained_models(run), ORIGINAL: original}
    results = {row["model"]: figures_of(row) for row in rows}
    for name, figures in results.items():
        figures |= _kept(run, name, paths.get(name), original)
        log(VERB, f"{name}: {json.dumps(figures)}")
    with publish(run.folder / "finetune.md") as part:
        part.write_text(as_markdown(results), encoding="utf-8")
    print(json.dumps({**results, "machine": this_machine()}))


def figures_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """What a comparison's row says of a model; ratios are over the first model's, None for that itself."""
    annotated = row.get("annotated") or {"changes": {}}
    emt = {judge["name"]: judge["emt_ratio"] for judge in row["evaluators"]}
    return {
        "masked": row["masked_share"],
        "emt_ratio": emt,
        "margins": {name: change["change"] for name, change in annotated["changes"].items() if name in MARGINS},
        "tp": row["tp"][0],
        "perplexity_ratio": row["benign_ratio"] or row["ratio"],
        "last_words": row["last_word_accuracy"],
        "distinct_2": row["distinct_2"],
    }


def _chosen(config: Config, names: Sequence[str], file: Path) -> dict[str, Any]:
    unknown = sorted(set(names) - config.compare.methods.keys())
    if unknown:
        raise SystemExit(f"{file} has no method {', '.join(unknown)}; it has {', '.join(config.compare.methods)}")
    return {name: config.compare.methods[name] for name in names}


def generations_of(run: Run, name: str) -> Path:
    """The folder of a model's continuations: of the run where the model is its own, else of its comparison."""
    own, compared = run.generations(name) / PROMPTS, run.comparison / GENERATIONS / name / PROMPTS
    return own if own.exists() else compared


def _kept(run: Run, name: str, path: Path | str | None, original: str) -> dict[str, Any]:
    """What is measured here of a model; taken from its file where that is of the same continuations. `path`: its
    weights, None where it has none of its own (RAD), whose recognition is that of another model."""
    folder = generations_of(run, name)
    digest = json_digest([read_manifest(folder).fingerprint, original, MOST_CONTINUATIONS])[:16]
    kept = run.folder / VERB / f"{name}-{digest}.json"
    if not kept.exists():
        recognised = None if path is None else recognition(run.config, path)
        figures = {"fluency": fluency(folder, original), "recognition": recognised}
        write_json(kept, figures)
    return read_json(kept)


def fluency(folder: Path, source: str) -> float:
    """Perplexity of the continuations of a folder under the model `source`."""
    model, tokenizer = load_model(ModelSource(source=source)), load_tokenizer(source)
    return round(continuation_perplexity(model, tokenizer, continuations(folder)), 3)


def continuations(folder: Path, most: int = MOST_CONTINUATIONS) -> list[tuple[str, str]]:
    """`most` prompts with their continuations, at equal distances: files are in the order of the prompts' lengths."""
    table = pa.concat_tables(map(pq.read_table, data_files(folder)))
    pairs = list(zip(table["prompt"].to_pylist(), table["continuation"].to_pylist(), strict=True))
    return pairs[:: -(-len(pairs) // most)]


def continuation_perplexity(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, pairs: Sequence[tuple[str, str]]
) -> float:
    """exp of the mean NLL, in nats, of the tokens of continuations after their prompts; empty ones have none."""
    texts = tokenise_queries(tokenizer, [pair for pair in pairs if pair[1].strip()], model, max_tokens=MAX_TOKENS)
    tokens = sum(len(text.token_ids) - text.completion_start for text in texts)
    return math.exp(sum(query_losses(model.eval(), texts)) / tokens)


def as_markdown(results: Mapping[str, Mapping[str, Any]]) -> str:
    """A row for each model."""
    judges = list(next(iter(results.values()))["emt_ratio"])
    header = ["model", "masked", *(f"EMT, {name}" for name in judges), "TP", *MARGINS]
    header += ["benign perplexity", "last words", "fluency", "distinct pairs", "recognition"]
    rows = [
        (
            name,
            "" if own["masked"] is None else f"{own['masked']:.2%}",
            *(_interval(own["emt_ratio"][judge]) for judge in judges),
            f"{own['tp']:.3f}",
            *(_interval(own["margins"].get(name)) for name in MARGINS),
            "" if own["perplexity_ratio"] is None else f"{own['perplexity_ratio'] - 1:+.1%}",
            "" if own["last_words"] is None else f"{own['last_words']:.3f}",
            f"{own['fluency']:.1f}",
            "" if own["distinct_2"] is None else f"{own['distinct_2']:.3f}",
            _interval(own["recognition"]),
        )
        for name, own in results.items()
    ]
    return markdown_table(header, rows)


def _interval(ends: Sequence[float] | None) -> str:
    return "" if ends is None else "{:.3f} [{:.3f}, {:.3f}]".format(*ends)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--behaviour", choices=list(CONFIGS), default="explicit")
    parser.add_argument("--proxy", default="smollm2", help="what is fine-tuned, and scores: smollm2, configured, ...")
    parser.add_argument("--methods", nargs="+", help="those of the config's comparison (default: all)")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="a.b=c")
    return parser.parse_args()


if __name__ == "__main__":
    main()
