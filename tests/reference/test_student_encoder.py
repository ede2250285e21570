"""The encoder student: its alignment, what it learns, and that a seed decides it."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

from ifguide.config import Encoder, ModelSource
from ifguide.models import load_model
from ifguide.student.encoder import EncoderStudent, TokenRegression, encoder_source, require_apart
from ifguide.student.encoder_fit import (
    MEAN,
    EncoderSettings,
    FittedEncoder,
    LabelledBlocks,
    best_encoder,
    documents,
    fit_encoder,
    rate,
)
from ifguide.student.fidelity import fidelity
from ifguide.student.head_fit import TRANSFORMS
from ifguide.student.parts import EncoderPart, Labelled, fit_encoder_parts
from ifguide.student.pretrained import require_readable
from tests.tiny import ARCHITECTURES, GPT2, LLAMA, VOCABULARY, as_tensors, random_blocks
from tests.tokenizers import byte_level, train_unigram

LENGTH, EPOCHS = 16, 3
OPTIONS = Encoder(hidden_size=16, layers=1, heads=2, epochs=EPOCHS, learning_rate=0.02, batch_tokens=64)


def settings(options: Encoder = OPTIONS, *, apart: bool = False, seed: int = 0) -> EncoderSettings:
    source = encoder_source(options, VOCABULARY, LENGTH)
    return EncoderSettings(options=options, source=source, seed=seed, apart=apart)


def labelled(blocks: int, seed: int) -> LabelledBlocks:
    """Scores that the token and the one before it tell."""
    tokens_BT, lengths_B = random_blocks(blocks, LENGTH, seed=seed)
    known_BT = (np.arange(LENGTH) >= 1) & (np.arange(LENGTH) < lengths_B[:, None])
    of_token, of_last = np.random.default_rng(9).normal(size=(2, VOCABULARY))
    scores_BT = of_token[tokens_BT] + 0.5 * of_last[np.roll(tokens_BT, 1, axis=1)]
    return LabelledBlocks(tokens_BT, known_BT, np.where(known_BT, scores_BT, 0).astype(np.float32))


class Fit(NamedTuple):
    """A student, and what it was fitted on and chosen by."""

    fitted: LabelledBlocks
    held: LabelledBlocks
    found: FittedEncoder


@pytest.fixture(scope="module")
def fit() -> Fit:
    fitted, held = labelled(160, 0), labelled(40, 1)
    return Fit(fitted, held, fit_encoder(fitted, held, settings()))


def scores_of(student: EncoderStudent, blocks: LabelledBlocks) -> np.ndarray:
    tokens_BT, lengths_B = as_tensors(blocks.tokens_BT, blocks.known_BT.sum(axis=1) + 1)
    return student.score(tokens_BT, lengths_B).numpy()


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("source", ["sizes", "pretrained"])
def test_a_later_token_changes_no_earlier_score(source: str, apart: bool, tmp_path: Path) -> None:
    options = OPTIONS
    if source == "pretrained":
        load_model(ModelSource(architecture={**LLAMA, "bos_token_id": None})).save_pretrained(tmp_path / "model")
        options = Encoder(source=str(tmp_path / "model"))
    regression = TokenRegression.begin(encoder_source(options, VOCABULARY, LENGTH), 1, seed=0)
    torch.nn.init.normal_(regression.head.weight, generator=torch.Generator().manual_seed(0))
    student = EncoderStudent(regression)
    tokens_BT, lengths_B = as_tensors(*random_blocks(3, LENGTH, ragged=False))
    document_BT = (torch.arange(LENGTH) // 6).expand_as(tokens_BT) if apart else None
    before = student.score(tokens_BT, lengths_B, document_BT)
    assert not before[:, 0].any()
    for place in (1, 7, LENGTH - 1):
        changed = tokens_BT.clone()
        changed[:, place] = (changed[:, place] + 1) % VOCABULARY
        after = student.score(changed, lengths_B, document_BT)
        assert torch.equal(after[:, :place], before[:, :place])
        assert (after[:, place] != before[:, place]).any(), "a score reads its own token"
        later = slice(12, None) if apart else slice(0, 0)
        assert place >= 12 or torch.equal(after[:, later], before[:, later]), "documents do not see each other"


def test_its_scores_are_the_linear_map_of_both_states_in_float64(fit: Fit) -> None:
    regression = fit.found.student.regression
    tokens_BT, lengths_B = as_tensors(*random_blocks(2, LENGTH, seed=5))
    states = regression.body(tokens_BT, use_cache=False).last_hidden_state.double().numpy()
    weights = regression.head.weight[0].double().numpy()
    found = fit.found.student.score(tokens_BT, lengths_B).numpy()
    for row, length in enumerate(lengths_B.tolist()):
        for j in range(1, length):
            expected = weights @ np.concatenate([states[row, j - 1], states[row, j]]) + float(regression.head.bias)
            assert found[row, j] == pytest.approx(expected, rel=1e-4, abs=1e-5)
        assert not found[row, length:].any()


def test_with_bfloat16_products_scores_still_differ(fit: Fit) -> None:
    tokens_BT, _ = as_tensors(*random_blocks(100, LENGTH, ragged=False))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        scores_BTS = fit.found.student.regression(tokens_BT)
    assert scores_BTS.dtype == torch.float32
    assert len(scores_BTS.unique()) > 0.9 * scores_BTS.numel()


def test_what_the_tokens_tell_is_learnt_and_recorded(fit: Fit) -> None:
    student, chosen, tried, edge = fit.found
    assert len(tried) == EPOCHS * (len(TRANSFORMS) + 1)
    assert chosen == best_encoder(tried)
    assert chosen["spearman"] > 0.8
    assert {own["target"] for own in tried} == {*TRANSFORMS, MEAN}
    losses = [own["loss"] for own in tried[:: len(TRANSFORMS) + 1]]
    assert losses == sorted(losses, reverse=True)
    exact_N, own_N = fit.held.scores_BT[fit.held.known_BT], scores_of(student, fit.held)[fit.held.known_BT]
    for name, value in fidelity(exact_N, own_N).items():
        assert chosen[name] == pytest.approx(value, abs=1e-3)
    slope, offset = np.polyfit(own_N.astype(float), exact_N.astype(float), 1)
    assert (slope, offset) == pytest.approx((1, 0), abs=1e-4), "scores are the least-squares estimate of exact ones"
    assert edge == pytest.approx(np.quantile(own_N, 0.98), rel=1e-4)


def test_a_seed_decides_the_bytes_and_files_keep_them(fit: Fit, tmp_path: Path) -> None:
    again = fit_encoder(fit.fitted, fit.held, settings())
    found = scores_of(fit.found.student, fit.held)
    np.testing.assert_array_equal(scores_of(again.student, fit.held), found)
    again.student.save(tmp_path / "student.npz")
    state = torch.random.get_rng_state()
    np.testing.assert_array_equal(scores_of(EncoderStudent.load(tmp_path / "student.npz"), fit.held), found)
    assert torch.equal(torch.random.get_rng_state(), state)
    other = fit_encoder(fit.fitted, fit.held, settings(seed=1))
    assert (scores_of(other.student, fit.held) != found).any()


def test_a_family_with_dropout_is_trained_without_and_draws_nothing(fit: Fit) -> None:
    source = ModelSource(architecture={**GPT2, "resid_pdrop": 0.5})
    options = replace(settings(replace(OPTIONS, epochs=1)), source=source)
    torch.manual_seed(0)
    state = torch.random.get_rng_state()
    found = fit_encoder(fit.fitted, fit.held, options)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(1)
    again = fit_encoder(fit.fitted, fit.held, options)
    assert found.tried == again.tried
    np.testing.assert_array_equal(scores_of(again.student, fit.held), scores_of(found.student, fit.held))


def test_states_of_another_width_than_the_config_s_are_fitted_and_kept(fit: Fit, tmp_path: Path) -> None:
    source = ModelSource(architecture=ARCHITECTURES["opt_350m"])
    found = fit_encoder(fit.fitted, fit.held, replace(settings(replace(OPTIONS, epochs=1)), source=source))
    assert found.student.regression.head.in_features == 2 * 8
    found.student.save(tmp_path / "student.npz")
    kept = EncoderStudent.load(tmp_path / "student.npz")
    np.testing.assert_array_equal(scores_of(kept, fit.held), scores_of(found.student, fit.held))


def test_training_stops_where_it_finds_no_more(fit: Fit) -> None:
    rng = np.random.default_rng(4)
    noise = fit.held._replace(scores_BT=rng.normal(size=fit.held.scores_BT.shape).astype(np.float32))
    options = Encoder(hidden_size=16, layers=1, heads=2, epochs=30, patience=1, learning_rate=1e-6, batch_tokens=64)
    _, chosen, tried, _ = fit_encoder(fit.fitted.take(slice(20)), noise, settings(options))
    assert tried[-1]["epoch"] == chosen["epoch"] + 1 < 30


def test_parts_hold_all_blocks_and_give_the_student_of_them(fit: Fit, tmp_path: Path) -> None:
    paths = []
    for number in range(2):
        part = EncoderPart()
        for blocks, held_out in ((fit.fitted, False), (fit.held, True)):
            rows = slice(number * len(blocks.tokens_BT) // 2, (number + 1) * len(blocks.tokens_BT) // 2)
            part.add(Labelled(*map(torch.from_numpy, blocks.take(rows))), held_out=held_out)
        paths.append(tmp_path / f"part-{number}.npz")
        part.save(paths[-1])
    student, chosen, _, edge = fit_encoder_parts(paths, settings())
    assert isinstance(student, EncoderStudent)
    np.testing.assert_array_equal(scores_of(student, fit.held), scores_of(fit.found.student, fit.held))
    assert (chosen, edge) == (fit.found.chosen, fit.found.edge)
    EncoderPart().save(tmp_path / "empty.npz")
    with pytest.raises(ValueError, match="held out"):
        fit_encoder_parts([tmp_path / "empty.npz"], settings())


def test_documents_are_told_by_where_there_is_no_score() -> None:
    known_BT = np.array([[0, 1, 1, 0, 1, 0, 0, 0], [0, 1, 1, 1, 1, 1, 1, 1]], dtype=bool)
    assert documents(known_BT).tolist() == [[1, 1, 1, 2, 2, 3, 4, 5], [1] * 8]


def test_documents_that_do_not_see_each_other_are_fitted_and_scored_alike(fit: Fit) -> None:
    known_BT = fit.fitted.known_BT & (np.arange(LENGTH) != 6)
    fitted, held = (blocks._replace(known_BT=blocks.known_BT & known_BT[0]) for blocks in (fit.fitted, fit.held))
    found = fit_encoder(fitted, held, settings(apart=True))
    tokens_BT, lengths_B = as_tensors(held.tokens_BT, np.full(len(held.tokens_BT), LENGTH))
    scores_BT = found.student.score(tokens_BT, lengths_B, documents(held.known_BT)).numpy()
    own_N = scores_BT[held.known_BT]
    assert fidelity(held.scores_BT[held.known_BT], own_N)["spearman"] == pytest.approx(
        found.chosen["spearman"], abs=1e-6
    )


def test_the_rate_rises_and_falls_as_a_cosine() -> None:
    rates = [rate(step, 100) for step in range(100)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert rates[52] == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi * 47 / 95)))
    assert rate(0, 1) == 1


def test_what_cannot_be_trained_is_refused(fit: Fit) -> None:
    with pytest.raises(ValueError, match="differ"):
        fit_encoder(fit.fitted._replace(scores_BT=np.ones_like(fit.fitted.scores_BT)), fit.held, settings())
    wild = Encoder(hidden_size=16, layers=1, heads=2, learning_rate=1e30, batch_tokens=64)
    with pytest.raises(ValueError, match=r"lower fit_student\.encoder\.learning_rate"):
        fit_encoder(fit.fitted, fit.held, settings(wild))


def test_a_pretrained_encoder_that_cannot_read_the_blocks_is_refused(tmp_path: Path) -> None:
    folder, tokenizer = str(tmp_path / "model"), str(tmp_path / "tokenizer")
    load_model(ModelSource(architecture=LLAMA)).save_pretrained(folder)
    byte_level().save_pretrained(tokenizer)
    with pytest.raises(ValueError, match=r"model fit_student\.encoder\.source: .*model only 48"):
        require_readable(folder, tokenizer, LENGTH)
    large = ModelSource(architecture={**LLAMA, "vocab_size": 300})
    load_model(large).save_pretrained(folder)
    require_readable(folder, tokenizer, 64)
    with pytest.raises(ValueError, match=r"block_size: 65 .* positions of fit_student\.encoder\.source"):
        require_readable(folder, tokenizer, 65)
    train_unigram(vocab_size=100).save_pretrained(folder)
    with pytest.raises(
        ValueError, match=r"^fit_student\.encoder\.source: token 0 is .*, and '<unk>' in .*; name a model"
    ):
        require_readable(folder, tokenizer, 64)
    byte_level().save_pretrained(folder)
    require_readable(folder, tokenizer, 64)


@pytest.mark.parametrize("family", ["opt", "bloom", "llama"])
def test_a_pretrained_encoder_that_cannot_keep_documents_apart_is_refused(family: str, tmp_path: Path) -> None:
    load_model(ModelSource(architecture=ARCHITECTURES[family])).save_pretrained(tmp_path)
    if family == "llama":
        require_apart(str(tmp_path))
    else:
        with pytest.raises(
            ValueError, match=r"^pretrain\.document_attention: (OPT|Bloom)ForCausalLM, the encoder, lets"
        ):
            require_apart(str(tmp_path))
