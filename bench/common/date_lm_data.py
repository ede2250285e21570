"""The sets of `bench/date_lm.py`: DATE-LM's own, from the hub or a folder, or one of their shape drawn here."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from bench.common.places import ABSENT
from bench.common.texts import read_paragraphs, read_rows
from ifguide.telemetry import log

HUB = "DataAttributionEval/Toxicity-Bias-Filtering"
MAX_CHARACTERS = 2000  # of a text before it is tokenised and cut


@dataclass(frozen=True, kw_only=True)
class Example:
    """A training or reference example; `prompt` may be empty. Its loss is the response's."""

    prompt: str
    response: str
    unsafe: bool


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """`train` is ranked; `reference` are unsafe examples outside it, `benign` the other side of the differential."""

    name: str
    train: list[Example]
    reference: list[Example]
    benign: list[Example]


def read_benchmark(options: argparse.Namespace) -> Benchmark:
    """The set that the options name, see the module. FileNotFoundError where a folder holds neither kind."""
    if options.subset:
        from datasets import load_dataset

        loaded = load_dataset(HUB, options.subset)
        return date_lm_benchmark(options.subset, list(loaded["train"]), list(loaded["ref"]), options)
    for suffix in ("jsonl", "parquet"):
        files = [options.data / f"{split}.{suffix}" for split in ("train", "ref")]
        if all(file.is_file() for file in files):
            return date_lm_benchmark(options.data.name, *(_table(file) for file in files), options)
    if not (options.data / "civil_comments_spans.jsonl").is_file():
        raise FileNotFoundError(
            f"{options.data} has neither train.jsonl and ref.jsonl (or .parquet) nor civil_comments_spans.jsonl:"
            f" {ABSENT}, or --data"
        )
    return drawn_benchmark(options)


def date_lm_benchmark(
    name: str, train: Sequence[Mapping[str, Any]], ref: Sequence[Mapping[str, Any]], options: argparse.Namespace
) -> Benchmark:
    """DATE-LM's own rows: all, or `examples` of them with the share of unsafe ones kept; all or `reference` of ref."""
    rng = np.random.default_rng(options.seed)
    examples = [_example(row) for row in train]
    unsafe, safe = ([e for e in examples if e.unsafe == wanted] for wanted in (True, False))
    if options.examples and options.examples < len(examples):
        kept = max(1, round(options.examples * len(unsafe) / len(examples)))
        unsafe, safe = _draw(rng, unsafe, kept), _draw(rng, safe, options.examples - kept)
    examples = [*unsafe, *safe]
    reference = [_example(row) for row in ref]
    reference = _draw(rng, reference, options.reference or len(reference))
    return Benchmark(name=name, train=examples, reference=reference, benign=_draw(rng, examples, len(reference)))


def _example(row: Mapping[str, Any]) -> Example:
    return Example(prompt=row["prompt"], response=row["response"], unsafe=row.get("type") == "Unsafe")


def drawn_benchmark(options: argparse.Namespace) -> Benchmark:
    """`examples` texts, `unsafe` of them comments with marked spans; references and harmless ones are disjoint."""
    rng = np.random.default_rng(options.seed)
    toxic = [row["text"] for row in read_rows(options.data / "civil_comments_spans.jsonl") if row["toxic_spans"]]
    count, references = options.examples or 10_000, options.reference or 32
    unsafe = _draw(rng, toxic, options.unsafe + references)
    sources = (
        [row["text"] for row in read_rows(options.data / "civil_comments_unflagged.jsonl")],
        [row["text"] for row in read_paragraphs(options.data)],
        _bold_sentences(options.data),
    )
    train = [_text(text, True) for text in unsafe[: options.unsafe]]
    benign = []
    places = (0, 0.5, 0.75, 1)  # of the sources' shares, so that rounded numbers add up
    for pool, *ends in zip(sources, places[:-1], places[1:], strict=True):
        number, held = (round(ends[1] * n) - round(ends[0] * n) for n in (count - options.unsafe, references))
        chosen = _draw(rng, pool, number + held)
        train += [_text(text, False) for text in chosen[:number]]
        benign += [_text(text, False) for text in chosen[number:]]
    return Benchmark(
        name="civil_comments-drawn",
        train=train,
        reference=[_text(text, True) for text in unsafe[options.unsafe :]],
        benign=benign,
    )


def _text(text: str, unsafe: bool) -> Example:
    return Example(prompt="", response=text[:MAX_CHARACTERS], unsafe=unsafe)


def _draw(rng: np.random.Generator, rows: Sequence[Any], count: int) -> list[Any]:
    if count > len(rows):
        log("date_lm", f"{count} rows asked for, {len(rows)} there are")
    return [rows[i] for i in rng.permutation(len(rows))[:count]]


def _bold_sentences(data: Path) -> list[str]:
    found: list[str] = []
    for path in sorted((data / "bold").glob("*_wiki.json")):
        groups = json.loads(path.read_text(encoding="utf-8"))
        found += [sentence for names in groups.values() for texts in names.values() for sentence in texts]
    return found


def _table(path: Path) -> list[dict[str, Any]]:
    return read_rows(path) if path.suffix == ".jsonl" else pq.read_table(path).to_pylist()
