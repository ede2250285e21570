"""Factors and scores of packed blocks whose documents do not see each other, against each document alone, in
float64."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from kronfluence.utils.constants import ACTIVATION_COVARIANCE_MATRIX_NAME, GRADIENT_COVARIANCE_MATRIX_NAME
from torch import Tensor

from ifguide.config import ModelSource
from ifguide.documents import begun
from ifguide.influence.factor_sample import FactorSample
from ifguide.influence.factors import COVARIANCE, EkfacFit
from ifguide.influence.method import PRESETS, Attribution, Method
from ifguide.influence.partition_files import sum_partitions
from ifguide.influence.proxy import Beginning, describe_proxy
from ifguide.influence.query import load_factors
from ifguide.influence.refinement import GaussNewton
from ifguide.influence.scorer import TokenScorer
from ifguide.models import tracked_modules
from ifguide.spans.tables import in_blocks
from tests.reference import oracles
from tests.reference.test_influence import random_directions
from tests.tiny import ARCHITECTURES, VOCABULARY, tiny_model

LENGTHS = (12, 12, 7)  # of the blocks
DOCUMENTS = ((0,) * 5 + (1,) + (2,) * 6, (2,) * 3 + (3,) * 9, (3,) * 2 + (4,) * 5 + (0,) * 5)  # the last is filled up
BOS = 1
ENGINES = {
    "forward": Method(engine="forward", precision="float32", rank=None, fused=False),
    "difference": Method(engine="difference", precision="float32", rank=None, fused=False),
}


def blocks() -> tuple[Tensor, Tensor, Tensor]:
    """Tokens (B, T), lengths (B,), documents (B, T)."""
    generator = torch.Generator().manual_seed(4)
    tokens_BT = torch.randint(3, VOCABULARY, (len(LENGTHS), max(LENGTHS)), generator=generator)
    return tokens_BT, torch.tensor(LENGTHS), torch.tensor(DOCUMENTS)


def pieces() -> list[tuple[int, slice]]:
    """Each document in each block: its row, and where it is."""
    found = []
    for row, (length, documents) in enumerate(zip(LENGTHS, DOCUMENTS, strict=True)):
        edges = [0, *(j for j in range(1, length) if documents[j] != documents[j - 1]), length]
        found += [(row, slice(*pair)) for pair in itertools.pairwise(edges)]
    return found


def texts(beginning: int | None) -> list[Tensor]:
    """Each document alone, as the model reads it."""
    tokens_BT, _, _ = blocks()
    first = tokens_BT.new_tensor([] if beginning is None else [beginning])
    return [torch.cat([first, tokens_BT[row, where]]) for row, where in pieces()]


@pytest.mark.parametrize("beginning", [None, BOS])
@pytest.mark.parametrize("engine", ["forward", "difference", "backward"])
@pytest.mark.parametrize("family", ["gpt_neox", "llama", "mistral", "gpt2"])
def test_scores_are_those_of_each_document_alone(family: str, engine: str, beginning: int | None) -> None:
    model = tiny_model(family, dtype=torch.float64)
    directions = random_directions(model)
    attribution: Attribution = "position" if engine == "backward" else "target"
    method = ENGINES.get(engine, PRESETS["exact"])
    scorer = TokenScorer(model, directions, attribution=attribution, method=method, beginning=beginning)
    scores_BT = scorer.score(*blocks())
    oracle = oracles.position_scores if attribution == "position" else oracles.target_scores
    expected_BT = torch.zeros_like(scores_BT)
    skipped = int(beginning is not None)
    for (row, where), text in zip(pieces(), texts(beginning), strict=True):
        alone = oracle(tiny_model(family, dtype=torch.float64), directions, text)[skipped:]
        expected_BT[row, where.start + 1 : where.stop] = alone[1:]  # the first has no prediction
    tolerance = 1e-4 if engine == "difference" else 1e-9  # its steps are finite
    assert (scores_BT - expected_BT).abs().max() < tolerance * expected_BT.abs().max()
    tokens_BT, lengths_B, _ = blocks()
    whole_BT = scorer.score(tokens_BT, lengths_B)
    assert (scores_BT - whole_BT).abs().max() > 0.1 * expected_BT.abs().max()


def test_padding_is_of_no_document_that_is_in_its_block() -> None:
    """A corpus of one block that is not full: its first document must not see what fills the block up."""
    model = tiny_model("llama", dtype=torch.float64)
    scorer = TokenScorer(model, random_directions(model), attribution="target")
    tokens_BT, numbers = blocks()[0][:1].repeat(1, 2), np.repeat([0, 1], [5, 12])
    document_BT = torch.from_numpy(in_blocks(numbers, tokens_BT.numpy()))
    scores_T = scorer.score(tokens_BT, torch.tensor([17]), document_BT)[0]
    for where in (slice(0, 5), slice(5, 17)):
        text = tokens_BT[:1, where]
        torch.testing.assert_close(scores_T[where], scorer.score(text, torch.tensor([text.shape[1]]))[0])


@pytest.mark.parametrize("beginning", [None, BOS])
def test_products_in_bfloat16_keep_documents_apart_too(beginning: int | None) -> None:
    model = tiny_model("llama")
    directions = [random_directions(model), random_directions(model, seed=2)]
    low = replace(ENGINES["difference"], precision="bfloat16")
    scorer = TokenScorer(model, directions, attribution="target", method=low, beginning=beginning)
    exact = TokenScorer(model, directions, attribution="target", beginning=beginning)

    def errors(*read: Tensor) -> Tensor:
        """Of each direction, relative."""
        expected_KBT = exact.score(*read)
        return (scorer.score(*read) - expected_KBT).flatten(1).norm(dim=1) / expected_KBT.flatten(1).norm(dim=1)

    tokens_BT, lengths_B, document_BT = blocks()
    rounding = errors(tokens_BT, lengths_B)  # of whole blocks
    assert (rounding < 0.1).all()
    assert (errors(tokens_BT, lengths_B, document_BT) < 2 * rounding).all()


@pytest.mark.parametrize("beginning", [None, BOS])
def test_states_are_those_of_each_document_alone(beginning: int | None) -> None:
    model = tiny_model("gpt_neox", dtype=torch.float64)
    scorer = TokenScorer(model, [random_directions(model)], attribution="target", beginning=beginning)
    tokens_BT, lengths_B, document_BT = blocks()
    scores_KBT, states, _ = scorer.score_and_read(tokens_BT, lengths_B, (1, 2), document_BT)
    torch.testing.assert_close(scores_KBT, scorer.score(tokens_BT, lengths_B, document_BT), rtol=0, atol=0)
    skipped = int(beginning is not None)
    for (row, where), text in zip(pieces(), texts(beginning), strict=True):
        hidden = model(text[None], output_hidden_states=True).hidden_states
        for states_BTD, layer in zip(states, (1, 2), strict=True):
            torch.testing.assert_close(states_BTD[row, where], hidden[layer][0, skipped:], rtol=1e-9, atol=1e-9)


def sample_of(beginning: int | None) -> FactorSample:
    tokens_BT, lengths_B, document_BT = (part.numpy() for part in blocks())
    return FactorSample(
        blocks_NT=tokens_BT, lengths_N=lengths_B, documents_NT=document_BT, beginning=beginning,
        num_partitions=1, batch_size=2, seed=0, use_empirical_fisher=True,
    )  # fmt: skip


def sample_of_texts(beginning: int | None) -> FactorSample:
    """The documents alone, one a row."""
    alone = texts(beginning)
    tokens_NT = np.zeros((len(alone), max(map(len, alone))), np.int64)
    for row, text in zip(tokens_NT, alone, strict=True):
        row[: len(text)] = text.numpy()
    return FactorSample(
        blocks_NT=tokens_NT, lengths_N=np.array([len(text) for text in alone]),
        num_partitions=1, batch_size=3, seed=0, use_empirical_fisher=True,
    )  # fmt: skip


@pytest.mark.parametrize("beginning", [None, BOS])
@pytest.mark.parametrize("family", ["gpt_neox", "llama"])
def test_factors_are_of_documents_that_do_not_see_each_other(
    family: str, beginning: int | None, tmp_path: Path
) -> None:
    """Covariances are those of the documents alone. Lambda is of blocks' gradients, each the sum of its documents'."""
    model = tiny_model(family, dtype=torch.float64)
    names = tracked_modules(model).names
    packed, alone = (
        EkfacFit(model=model, sample=sample, module_names=names, workdir=tmp_path / place / "work")
        for place, sample in (("packed", sample_of(beginning)), ("alone", sample_of_texts(beginning)))
    )
    packed.run(tmp_path / "out")
    alone.covariances(0)
    ours, theirs = (sum_partitions(fit.workdir, COVARIANCE.path, COVARIANCE.names, [(0, 0)]) for fit in (packed, alone))
    for kind in (ACTIVATION_COVARIANCE_MATRIX_NAME, GRADIENT_COVARIANCE_MATRIX_NAME):
        for name in names:
            torch.testing.assert_close(ours[kind][name], theirs[kind][name], rtol=1e-9, atol=1e-9)

    gradients = [
        oracles.sequence_gradients(model, names, text[None], torch.tensor([len(text)]))[0] if len(text) > 1 else None
        for text in texts(beginning)
    ]
    factors = load_factors(tmp_path / "out", names)
    for name in names:
        of_blocks = torch.zeros(len(LENGTHS), *next(g for g in gradients if g)[name].shape, dtype=torch.float64)
        for (row, _), gradient in zip(pieces(), gradients, strict=True):
            if gradient is not None:
                of_blocks[row] += gradient[name]
        own = factors[name].in_float64(torch.device("cpu"))
        turned = own.Q_S.T @ of_blocks @ own.Q_A
        torch.testing.assert_close(own.lambda_mean, turned.square().mean(0), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("beginning", [None, BOS])
def test_curvature_is_the_sum_over_the_documents_alone(beginning: int | None) -> None:
    model = tiny_model("llama", dtype=torch.float64)
    names, vector = list(tracked_modules(model).names), random_directions(model)
    vector = {name: V.double() for name, V in vector.items()}
    packed, alone = (
        GaussNewton(model, names, list(sample.loader(0)))(vector)
        for sample in (sample_of(beginning), sample_of_texts(beginning))
    )
    for name in names:
        torch.testing.assert_close(packed[name] * len(LENGTHS), alone[name] * len(pieces()), rtol=1e-9, atol=1e-9)


def test_a_bos_stands_before_every_document() -> None:
    tokens_BT, lengths_B, document_BT = blocks()
    read = begun(tokens_BT, lengths_B, document_BT, BOS)
    assert read.document_BU is not None
    assert torch.equal(read.own(read.tokens_BU, 0), tokens_BT)
    assert torch.equal(read.own(read.document_BU, 0), document_BT)
    rows: Sequence[list[int]] = [[] for _ in LENGTHS]
    for (row, where), _ in zip(pieces(), texts(BOS), strict=True):
        rows[row].extend([BOS, *tokens_BT[row, where].tolist()])
    for row, expected in enumerate(rows):
        assert read.lengths_B[row] == len(expected)
        assert read.tokens_BU[row, : len(expected)].tolist() == expected


def test_what_fills_a_row_up_is_at_no_position_beyond_the_block() -> None:
    document_BT = torch.stack([torch.zeros(24, dtype=torch.long), torch.arange(24)])
    read = begun(torch.arange(48).view(2, 24), torch.tensor([24, 24]), document_BT, BOS)
    assert read.document_BU is not None
    assert read.document_BU.shape[1] > 25
    for row, documents_U in enumerate(read.document_BU):
        assert int(documents_U.bincount().max()) == (25 if row == 0 else 2)
        assert (documents_U.diff() >= 0).all()


def test_samples_with_and_without_documents_are_told_apart() -> None:
    sample = sample_of(None)
    assert sample.identity() != replace(sample, documents_NT=None).identity()


@pytest.mark.parametrize("family", sorted(ARCHITECTURES))
def test_a_proxy_that_cannot_is_refused_by_name(family: str) -> None:
    source = ModelSource(architecture=ARCHITECTURES[family])
    if name := {"opt": "OPT", "opt_350m": "OPT", "bloom": "Bloom"}.get(family):
        with pytest.raises(ValueError, match=rf"^pretrain\.document_attention: {name}ForCausalLM, the proxy, lets"):
            describe_proxy(source, Beginning(None, of_documents=True), 16, 0.5)
    else:
        describe_proxy(source, Beginning(None, of_documents=True), 16, 0.5)
    describe_proxy(source, Beginning(None), 16, 0.5)
