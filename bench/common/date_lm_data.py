"""The sets of `bench/date_lm.py`: DATE-LM's own, from the hub or a folder, or one of their kind drawn here."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq

from bench.common.places import ABSENT
from bench.common.texts import read_rows
from ifguide.artifacts import json_digest
from ifguide.telemetry import log

HUB = "DataAttributionEval/Toxicity-Bias-Filtering"
MAX_CHARACTERS = 2000  # of a text before it is tokenised and cut


class Example(NamedTuple):
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

    @property
    def digest(self) -> str:
        """Of all examples."""
        return json_digest(
            [[example._asdict() for example in part] for part in (self.train, self.reference, self.benign)]
        )


def read_benchmark(options: argparse.Namespace) -> Benchmark:
    """The set that the options name, see the module. FileNotFoundError where a folder holds neither kind."""
    if options.subset:
        from datasets import load_dataset

        loaded = load_dataset(HUB, options.subset)
        return date_lm_benchmark(options.subset, list(loaded["train"]), list(loaded["ref"]), options)
    for suffix in ("jsonl", "parquet"):
        files = [options.data / f"{split}.{suffix}" for split in ("train", "ref")]
        if all(file.is_file() for file in files):
            train, ref = map(_table, files)
            return date_lm_benchmark(options.data.name, train, ref, options)
    if not (options.data / "offensive_tweets.jsonl").is_file():
        raise FileNotFoundError(
            f"{options.data} has neither train.jsonl and ref.jsonl (or .parquet) nor offensive_tweets.jsonl:"
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
    """`examples` tweets, `unsafe` of them called offensive by people, the others not; references and the harmless side
    are further tweets of the same kinds."""
    rng = np.random.default_rng(options.seed)
    count, references = options.examples or 10_000, options.reference or 32
    wanted = {"offensive_tweets.jsonl": options.unsafe, "other_tweets.jsonl": count - options.unsafe}
    train: list[Example] = []
    further: list[list[Example]] = []
    for name, number in wanted.items():
        texts = sorted({row["text"] for row in read_rows(options.data / name)})  # some are there twice
        chosen = [_text(text, name == "offensive_tweets.jsonl") for text in _draw(rng, texts, number + references)]
        train += chosen[:number]
        further.append(chosen[number:])
    return Benchmark(name="tweets-drawn", train=train, reference=further[0], benign=further[1])


def _text(text: str, unsafe: bool) -> Example:
    return Example(prompt="", response=text[:MAX_CHARACTERS], unsafe=unsafe)


def _draw(rng: np.random.Generator, rows: Sequence[Any], count: int) -> list[Any]:
    if count > len(rows):
        log("date_lm", f"{count} rows asked for, {len(rows)} there are")
    return [rows[i] for i in rng.permutation(len(rows))[:count]]


def _table(path: Path) -> list[dict[str, Any]]:
    return read_rows(path) if path.suffix == ".jsonl" else pq.read_table(path).to_pylist()
