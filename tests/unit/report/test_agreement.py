"""Which documents of a large corpus are compared with the annotations, and where their texts are classified."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from ifguide.config import ClassifierSource, Evaluate
from ifguide.config.resources import Resources
from ifguide.evaluation.metrics import MaskAgreement
from ifguide.report import agreement
from ifguide.report.agreement import agreement_rows, sampled_documents, span_agreement
from ifguide.report.contents import AgreementRow
from tests.sharded import in_any_order


def test_a_large_corpus_is_compared_in_documents_of_drawn_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = np.random.default_rng(0).integers(5, 60, 400)
    stops = np.cumsum(lengths)
    starts = stops - lengths
    block, blocks_per_shard = 16, 40
    first_blocks = list(range(0, -(-int(stops[-1]) // block), blocks_per_shard))
    view: Any = SimpleNamespace(block_size=block, first_blocks=first_blocks, files=first_blocks)

    def sampled(limit: int, seed: int = 0) -> list[range]:
        monkeypatch.setattr(agreement, "AGREEMENT_TOKENS", limit)
        return sampled_documents(view, starts, stops, seed)

    assert sampled(int(stops[-1])) == [range(400)]
    shard = block * blocks_per_shard
    for limit in (int(stops[-1]) - 1, 5 * shard + 300, 200):
        parts = sampled(limit)
        documents = [i for part in parts for i in part]
        assert len(set(documents)) == len(documents)
        assert all(starts[i] // shard == (stops[i] - 1) // shard for i in documents)
        # but for what is cut off at the ends of the shards, the limit is used up
        assert limit - 60 * 2 * (limit // shard + 1) <= lengths[documents].sum() <= limit
    assert sampled(5 * shard) != sampled(5 * shard, seed=1)
    assert sampled(5 * shard) == sampled(5 * shard)


def test_a_marked_document_whose_tokens_cannot_be_placed_is_left_out_and_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def places(tokenizer: Any, text: str, tokens: list[int]) -> np.ndarray:
        if tokens[0] == 9:
            raise ValueError("no place")
        return np.stack([np.arange(len(tokens)), np.arange(len(tokens)) + 1], axis=1)

    tokens, annotated = np.array([1, 2, 3, 0, 9, 2, 3, 0]), np.array([0, 1, 0, 0, 1, 1, 1, 0], dtype=bool)
    table = pa.table({"token_start": [0, 4], "num_tokens": [4, 4]})
    monkeypatch.setattr(agreement, "token_places", places)
    monkeypatch.setattr(agreement, "document_table", lambda corpus: table)
    tokenizer = SimpleNamespace(decode=lambda ids, **_: "".join(map(str, ids)))
    view: Any = SimpleNamespace(
        corpus=None, tokenizer=tokenizer, read=lambda first, last: {"tokens": tokens, "annotated": annotated}
    )
    finders = {
        "twos": lambda texts: [[(text.index("2"), text.index("2") + 1)] for text in texts],
        "none": lambda texts: [[] for _ in texts],
    }
    twos, none = span_agreement(view, finders, 0)
    assert (twos.method, twos.selected, twos.precision) == ("twos, without 1 whose tokens cannot be placed", 1, 1.0)
    assert (none.method, none.selected) == ("none", 0)


def test_texts_are_classified_in_a_task_with_the_resources_of_the_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    in_task, made = [], []

    class Classifier:
        classes = ("insult",)

        def score(self, texts: list[str]) -> dict[str, np.ndarray]:
            return {"insult": np.array(["pig" in text for text in texts], np.float32)}

    def make(source: Any, *, gpus: float) -> Classifier:
        made.append((in_task[-1:], gpus))
        return Classifier()

    def run_classifier(function: Any, calls: Any) -> Iterator[Any]:
        in_task.append(function.__name__)
        yield from (function(*arguments) for arguments in calls)
        in_task.pop()

    def compared(view: Any, finders: Any, seed: int) -> Iterator[AgreementRow]:
        for name, find in finders.items():
            (spans,) = find(["You pig. Hello."])
            yield AgreementRow(method=name, selected=len(spans), precision=1.0, recall=float(seed), f1=1.0)

    monkeypatch.setattr(agreement, "View", lambda folders: folders)
    monkeypatch.setattr(agreement, "make_classifier", make)
    monkeypatch.setattr(agreement, "span_agreement", compared)
    monkeypatch.setattr(agreement, "mask_agreement", lambda view, run_tasks: MaskAgreement())
    options = Evaluate(classifier=ClassifierSource(name="hf:some/model"), resources=Resources(gpus=0.5))
    view: Any = SimpleNamespace(folders=object())
    rows = agreement_rows(view, options, 7, run_tasks=in_any_order(), run_classifier=run_classifier)
    assert made == [(["text_agreement"], 0.5)]
    assert [(row.method, row.selected) for row in rows] == [("mask (IF-Guide)", 0), ("sentences by hf:some/model", 1)]
    assert rows[1].recall == 7
