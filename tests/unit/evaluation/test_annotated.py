"""NLL of tokens against a loop in float64, and margins against plain Python over resampled documents."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from ifguide.evaluation import AnnotatedTokens, Bootstrap, annotated, annotated_figures, token_nll
from tests.unit.evaluation.small import tiny_model

START = 256
Document = list[tuple[int, bool, float]]  # id, annotated, NLL of each token


def test_token_nll_equals_a_float64_loop_over_pieces_for_every_batch_size(random_model):
    generator = np.random.default_rng(0)
    documents = [generator.integers(0, 256, length, dtype=np.int32) for length in (3, 0, 11, 1, 6)]
    oracle = tiny_model().double().eval()
    expected = []
    for document in documents:
        own = []
        for begin in range(0, len(document), 5):  # pieces of six tokens with the first
            read = [START]
            for token in document[begin : begin + 5].tolist():
                logits = oracle(torch.tensor([read])).logits[0, -1].detach()
                own.append(-float(torch.log_softmax(logits, dim=0)[token]))
                read.append(token)
        expected.append(own)
    for batch_size in (1, 2, 9):
        found = token_nll(random_model, documents, start=START, width=6, batch_size=batch_size)
        assert [len(nll) for nll in found] == [3, 0, 11, 1, 6]
        for own, nll in zip(expected, found, strict=True):
            assert nll == pytest.approx(own, rel=1e-5)


def test_token_nll_refuses_what_it_cannot_measure(random_model):
    document = [np.arange(3)]
    for width in (1, 65):
        with pytest.raises(ValueError, match="they hold 2 at least, and 64 at most"):
            token_nll(random_model, document, start=START, width=width, batch_size=1)
    diverged = tiny_model()
    torch.nn.init.constant_(diverged.get_output_embeddings().weight, math.nan)
    with pytest.raises(ValueError, match="document 0 is NaN"):
        token_nll(diverged, document, start=START, width=8, batch_size=1)


def documents_of(count: int, seed: int) -> list[Document]:
    generator = np.random.default_rng(seed)
    return [
        [
            (int(generator.integers(0, 7)), bool(generator.random() < 0.4), float(generator.gamma(2.0)))
            for _ in range(generator.integers(0, 6))
        ]
        for _ in range(count)
    ]


def tokens_of(documents: Sequence[Document]) -> AnnotatedTokens:
    rows = [(place, *token) for place, document in enumerate(documents) for token in document]
    document_N, ids_N, annotated_N, nll_N = map(np.array, zip(*rows, strict=True))
    return AnnotatedTokens(
        documents=len(documents), document_N=document_N, ids_N=ids_N, annotated_N=annotated_N, nll_N=nll_N
    )


def oracle(documents: Sequence[Document]) -> tuple[float, float, float]:
    """The three figures, token by token."""

    def mean(values: Sequence[float]) -> float:
        return sum(values) / len(values) if values else math.nan

    uses: dict[int, tuple[list[float], list[float]]] = defaultdict(lambda: ([], []))
    for document in documents:
        for token, marked, nll in document:
            uses[token][not marked].append(nll)
    inside, outside = ([nll for use in uses.values() for nll in use[side]] for side in (0, 1))
    both = [(len(a), mean(a) - mean(o)) for a, o in uses.values() if a and o]
    total = sum(count for count, _ in both)
    by_type = sum(count * gap for count, gap in both) / total if total else math.nan
    return mean(inside), mean(inside) - mean(outside), by_type


@pytest.mark.parametrize("chunk", [1, 50, annotated.CHUNK_FIGURES])
def test_margins_and_every_replicate_are_those_of_plain_python(monkeypatch, chunk):
    monkeypatch.setattr(annotated, "CHUNK_FIGURES", chunk)
    documents, bootstrap = documents_of(12, seed=1), Bootstrap(samples=100, seed=3)
    figures = annotated_figures(tokens_of(documents), bootstrap)
    assert list(figures) == ["annotated_nll", "margin", "type_margin"]
    assert [figure.value for figure in figures.values()] == pytest.approx(oracle(documents))
    (counts,) = bootstrap.counts(12)
    for sample, count in enumerate(counts.astype(int)):
        drawn = [document for document, times in zip(documents, count, strict=True) for _ in range(times)]
        assert [figure.samples[sample] for figure in figures.values()] == pytest.approx(oracle(drawn), nan_ok=True)


def test_a_mask_of_words_raises_the_margin_and_not_that_of_equal_types():
    """Token 0 is unlearned wherever it stands: twice as often within the annotated text as outside it."""
    plain = [[(0, True, 2.0), (1, True, 2.0), (0, True, 2.0), (1, False, 2.0), (1, False, 2.0), (0, False, 2.0)]]
    unlearned = [[(token, marked, nll + 3.0 * (token == 0)) for token, marked, nll in plain[0]]]
    before, after = (annotated_figures(tokens_of(each), Bootstrap(samples=100)) for each in (plain, unlearned))
    assert after["margin"].value - before["margin"].value == pytest.approx(1.0)
    assert after["type_margin"].value - before["type_margin"].value == pytest.approx(0.0)
    in_place = [[(token, marked, nll + 3.0 * marked) for token, marked, nll in plain[0]]]
    assert annotated_figures(tokens_of(in_place), Bootstrap(samples=100))["type_margin"].value == pytest.approx(3.0)


def test_without_a_type_that_has_both_uses_there_is_no_margin_of_equal_types():
    figures = annotated_figures(tokens_of([[(0, True, 1.0), (1, False, 3.0)]]), Bootstrap(samples=100))
    assert figures["margin"].value == pytest.approx(-2.0)
    assert math.isnan(figures["type_margin"].value)
    assert np.isnan(figures["type_margin"].samples).all()
