"""What is sampled: the float64 nucleus exactly, greedy decoding as `generate` has it, over model families."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor
from transformers import GenerationConfig

from ifguide.evaluation import generation
from ifguide.evaluation.generation import ATTEMPTS, UNIFORMS, Sampling, _sample_batch, _uniforms, sample_nucleus
from tests.tiny import ARCHITECTURES, VOCABULARY, tiny_model

PROMPTS_BT = torch.tensor([[5, 9, 11, 30, 2, 7, 8], [40, 3, 3, 12, 22, 6, 1]])


def nucleus(logits_V: Tensor, top_p: float, temperature: float = 1.0) -> np.ndarray:
    """Renormalised probabilities of the smallest set of likeliest tokens that holds top_p, by sorting, in float64."""
    p = torch.softmax(logits_V.double() / temperature, -1).numpy()
    kept = np.zeros_like(p)
    mass = 0.0
    for token in np.argsort(-p, kind="stable"):
        if mass >= top_p:
            break
        kept[token] = p[token]
        mass += p[token]
    return kept / kept.sum()


def fits(tokens: np.ndarray, expected_V: np.ndarray) -> None:
    """No token outside the support, and a chi-square test that a right sampler fails once in 1e5."""
    counts = np.bincount(tokens, minlength=len(expected_V))
    assert counts[expected_V == 0].sum() == 0
    support = expected_V > 0
    if support.sum() > 1:
        assert stats.chisquare(counts[support], expected_V[support] * len(tokens)).pvalue > 1e-5


@pytest.mark.parametrize(
    ("top_p", "temperature", "accepting"),
    [
        (1.0, 1.0, True),
        *((p, t, a) for p, t in ((0.9, 1.0), (0.5, 1.0), (0.15, 1.0), (0.9, 0.6)) for a in (True, False)),
    ],
)
def test_sampled_shares_are_those_of_the_float64_nucleus(top_p: float, temperature: float, accepting: bool) -> None:
    logits_V = torch.randn(60, generator=torch.Generator().manual_seed(3)) * 2
    uniforms = np.random.default_rng(1).random((40_000, UNIFORMS))
    if not accepting:
        # Every draw lands on the least likely token, so all rows go to the sorted nucleus.
        p = torch.softmax(logits_V / temperature, -1)
        worst = int(p.argmin())
        uniforms[:, :ATTEMPTS] = float(p[: worst + 1].sum() - p[worst] / 2)
    tokens = sample_nucleus(logits_V.expand(40_000, -1), torch.from_numpy(uniforms), top_p, temperature)
    fits(tokens.numpy(), nucleus(logits_V, top_p, temperature))


def test_tokens_that_tie_with_the_last_of_the_nucleus_are_all_in_it() -> None:
    logits_V = torch.log(torch.tensor([0.4, 0.15, 0.15, 0.15, 0.15]))
    for draws in (torch.rand(4000, UNIFORMS, dtype=torch.float64), torch.full((1, UNIFORMS), 0.9, dtype=torch.float64)):
        tokens = sample_nucleus(logits_V.expand(len(draws), -1), draws, 0.5)
        if len(draws) > 1:
            assert set(tokens.tolist()) == {0, 1, 2, 3, 4}
    assert set(sample_nucleus(logits_V.expand(1000, -1), torch.rand(1000, UNIFORMS).double(), 0.4).tolist()) == {0}


def test_a_uniform_next_to_one_draws_a_token_with_probability() -> None:
    logits = torch.full((1, 1000), -torch.inf)
    logits[0, :900] = 0.0
    uniforms = torch.full((1, UNIFORMS), 1 - 2.0**-53, dtype=torch.float64)
    assert int(sample_nucleus(logits, uniforms, 1.0)) == 899
    assert int(sample_nucleus(logits, uniforms, 0.9)) == 899


def test_rows_do_not_depend_on_their_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(50, 300, generator=torch.Generator().manual_seed(0)) * 3
    uniforms = torch.from_numpy(np.random.default_rng(0).random((50, UNIFORMS)))
    whole = sample_nucleus(logits, uniforms, 0.8)
    monkeypatch.setitem(generation.CHUNK_BYTES, "cpu", 4 * 300 * 7)
    assert torch.equal(sample_nucleus(logits, uniforms, 0.8), whole)


def test_logits_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match="not finite"):
        sample_nucleus(torch.full((1, 4), torch.nan), torch.rand(1, UNIFORMS).double(), 0.9)


def test_a_second_token_is_drawn_given_the_first() -> None:
    model = tiny_model("gpt_neox")
    sampling = Sampling(continuations=30_000, max_new_tokens=2, top_p=0.7, temperature=1.0, seed=5)
    with torch.inference_mode():
        rows = _sample_batch(model, PROMPTS_BT[:1], _uniforms(sampling, [0]), sampling, None)
        pairs = np.array(rows)
        first_V = nucleus(model(PROMPTS_BT[:1]).logits[0, -1], 0.7)
        fits(pairs[:, 0], first_V)
        for token in np.argsort(-first_V)[:3]:
            prefix = torch.cat([PROMPTS_BT[0], torch.tensor([token])])[None]
            fits(pairs[pairs[:, 0] == token, 1], nucleus(model(prefix).logits[0, -1], 0.7))


@pytest.mark.parametrize("family", sorted(ARCHITECTURES))
def test_greedy_equals_generate_for_every_family(family: str) -> None:
    model = tiny_model(family)
    sampling = Sampling(continuations=3, max_new_tokens=8, top_p=1e-9, temperature=1.0, seed=0)
    options = GenerationConfig(do_sample=False, max_new_tokens=8, eos_token_id=None, pad_token_id=0)
    model.generation_config = GenerationConfig()
    with torch.inference_mode():
        ours = _sample_batch(model, PROMPTS_BT, _uniforms(sampling, [0, 1]), sampling, None)
        theirs = model.generate(PROMPTS_BT, attention_mask=torch.ones_like(PROMPTS_BT), generation_config=options)
    expected = theirs[:, PROMPTS_BT.shape[1] :].tolist()
    assert ours == [expected[0]] * 3 + [expected[1]] * 3
    assert all(0 <= token < VOCABULARY for row in ours for token in row)


def test_text_ends_at_eos_as_in_generate() -> None:
    model = tiny_model("llama")
    sampling = Sampling(continuations=200, max_new_tokens=12, top_p=0.9, temperature=1.0, seed=0)
    with torch.inference_mode():
        free = _sample_batch(model, PROMPTS_BT, _uniforms(sampling, [0, 1]), sampling, None)
        cut = _sample_batch(model, PROMPTS_BT, _uniforms(sampling, [0, 1]), sampling, 2)
    assert cut == [row[: row.index(2)] if 2 in row else row for row in free]
    assert any(len(row) < 12 for row in cut)


def test_random_numbers_are_those_of_prompt_and_continuation() -> None:
    sampling = Sampling(continuations=3, max_new_tokens=4, top_p=0.9, temperature=1.0, seed=1)
    uniforms = _uniforms(sampling, [7, 8])
    assert uniforms.shape == (6, 4, UNIFORMS)
    longer = Sampling(continuations=5, max_new_tokens=6, top_p=0.9, temperature=1.0, seed=1)
    np.testing.assert_array_equal(_uniforms(longer, [8])[:3, :4], uniforms[3:])
    assert len(np.unique(uniforms)) == uniforms.size
