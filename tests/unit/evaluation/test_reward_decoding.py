"""The reward model's loss by hand, and reward-augmented decoding against a slow loop without caches."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ifguide.config.compare import Reward
from ifguide.evaluation import reward_decoding
from ifguide.evaluation.generation import Sampling, _sample_batch, _uniforms, sample_nucleus
from ifguide.evaluation.reward_decoding import RewardGuide
from ifguide.evaluation.reward_model import RewardModel, load_reward_model
from ifguide.methods.reward_model import (
    RatedText,
    cumulative_squared_error,
    rate_texts,
    reward_steps,
    train_reward_model,
)
from tests.tiny import tiny_model

FAMILIES = ("gpt_neox", "llama", "gpt2", "opt_350m", "gpt_neo", "gemma3")
PROMPTS_BT = torch.tensor([[5, 9, 11, 30, 2, 7, 8], [40, 3, 3, 12, 22, 6, 1]])
SAMPLING = Sampling(continuations=3, max_new_tokens=6, top_p=0.9, temperature=1.0, seed=4)


def reward_model(family: str = "gpt_neox", *, seed: int = 9) -> RewardModel:
    """Rewards that differ between prefixes, most of them inside [0, 1] and some outside."""
    made = RewardModel(tiny_model(family, seed=seed)).eval()
    with torch.no_grad():
        made.weight.copy_(0.1 * torch.randn(made.weight.shape, generator=torch.Generator().manual_seed(seed)))
    return made


def test_the_loss_weighs_the_tokens_of_the_continuation_one_two_three() -> None:
    rewards_BT = torch.tensor([[9.0, 0.5, 0.2, 0.9], [9.0, 9.0, 0.7, 9.0]], dtype=torch.float64)
    loss_B = cumulative_squared_error(rewards_BT, torch.tensor([1.0, 0.0]), torch.tensor([1, 2]), torch.tensor([4, 3]))
    by_hand = (1 * 0.5**2 + 2 * 0.8**2 + 3 * 0.1**2) / 6
    np.testing.assert_allclose(loss_B.numpy(), [by_hand, 0.7**2], rtol=1e-12)


def test_a_reward_is_of_the_prefix_alone_and_survives_the_disk(tmp_path: Path) -> None:
    model = reward_model("opt_350m")  # its trunk ends in a projection
    with torch.inference_mode():
        whole_BT, _ = model(PROMPTS_BT)
        for stop in (1, 4, 7):
            torch.testing.assert_close(model(PROMPTS_BT[:, :stop])[0][:, -1], whole_BT[:, stop - 1])
        model.save(tmp_path)
        torch.testing.assert_close(load_reward_model(tmp_path)(PROMPTS_BT)[0], whole_BT, rtol=0, atol=0)
    with pytest.raises(FileNotFoundError, match=r"reward_head\.safetensors"):
        load_reward_model(tmp_path / "elsewhere")


def test_training_learns_which_continuations_deserve_a_reward() -> None:
    rng = np.random.default_rng(0)
    texts = []
    for _ in range(160):
        bad = bool(rng.random() < 0.5)
        tokens = rng.integers(3, 40, size=rng.integers(1, 6))
        tokens[rng.integers(len(tokens))] = 45 if bad else 46
        prompt = tuple(int(t) for t in rng.integers(3, 40, size=rng.integers(1, 4)))
        texts.append(RatedText(prompt=prompt, continuation=tuple(tokens.tolist()), reward=float(not bad)))
    trained = [RewardModel(tiny_model("gpt_neox")) for _ in range(2)]
    for model in trained:
        options, shown = Reward(epochs=6, learning_rate=1e-2, batch_size=16), []
        losses = train_reward_model(model, texts[:120], options, seed=0, show=shown.append)
    assert losses[-1] < 0.5 * losses[0]
    assert len(shown) == reward_steps(texts[:120], options) == 48
    last = shown[-8:]  # seven batches of 16 and one of 8
    assert (16 * sum(last[:7]) + 8 * last[7]) / 120 == pytest.approx(losses[-1])
    rates = [rate_texts(model, texts[120:], batch_size=size) for model, size in zip(trained, (40, 7), strict=True)]
    np.testing.assert_allclose(rates[0], rates[1], atol=1e-5)
    wanted = np.array([text.reward for text in texts[120:]])
    assert np.mean((rates[0] > 0.5) == (wanted > 0.5)) > 0.9


def slow_shift(
    logits_V: torch.Tensor, text: list[int], reward: RewardModel, beta: float, top_k: int, top_p: float, heat: float
) -> torch.Tensor:
    """Token by token from the likeliest on, until the nucleus is full or there are `top_k` of them; each with the whole
    text through the reward model."""
    own_V = logits_V.double().numpy() / heat
    probabilities_V = np.exp(own_V) / np.exp(own_V).sum()
    shifted = torch.full_like(logits_V, -torch.inf)
    held = 0.0
    for token in np.argsort(-own_V, kind="stable")[:top_k]:
        if held >= top_p:
            break
        held += probabilities_V[token]
        value = float(reward(torch.tensor([[*text, int(token)]]))[0][0, -1])
        shifted[token] = own_V[token] + beta * min(1.0, max(0.0, value))
    return shifted


@pytest.mark.parametrize(
    ("family", "top_p", "heat"),
    [("gpt_neox", 0.6, 0.7), ("gpt_neox", 0.3, 1.0), *((family, 0.9, 1.0) for family in FAMILIES)],
)
def test_logits_and_samples_are_those_of_a_loop_without_caches(
    family: str, top_p: float, heat: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reward_decoding, "CANDIDATES", 8)  # two rows at a time
    model, reward = tiny_model(family), reward_model(family)
    guide = RewardGuide(model=reward, beta=20.0, top_k=4)
    sampling = Sampling(continuations=2, max_new_tokens=4, top_p=top_p, temperature=heat, seed=4)
    uniforms = _uniforms(sampling, [0, 1])
    with torch.inference_mode():
        sampled = _sample_batch(model, PROMPTS_BT, uniforms, sampling, None, guide)
        plain = _sample_batch(model, PROMPTS_BT, uniforms, sampling, None)
        guided = guide.begin(PROMPTS_BT, 2)
        texts = [prompt for prompt in PROMPTS_BT.tolist() for _ in range(2)]
        left = set()
        for step in range(sampling.max_new_tokens):
            logits_RV = model(torch.tensor(texts)).logits[:, -1]
            slow_RV = torch.stack(
                [slow_shift(logits_RV[row], text, reward, 20.0, 4, top_p, heat) for row, text in enumerate(texts)]
            )
            torch.testing.assert_close(guided.shift(logits_RV, top_p, heat), slow_RV, rtol=1e-4, atol=2e-4)
            left |= set(torch.isfinite(slow_RV).sum(1).tolist())
            next_R = sample_nucleus(slow_RV, torch.from_numpy(uniforms[:, step]), 1.0)
            assert next_R.tolist() == [row[step] for row in sampled]
            guided.take(next_R)
            texts = [[*text, token] for text, token in zip(texts, next_R.tolist(), strict=True)]
    assert (left == {4}) == (top_p == 0.9)  # top_k tokens of each row are left, or fewer where the nucleus has fewer
    assert sampled != plain


def test_without_a_reward_the_draw_is_from_the_nucleus_with_all_that_tie_with_its_last() -> None:
    model, reward = tiny_model("gpt_neox"), reward_model()
    probabilities = torch.tensor([0.05, 0.3, 0.15, 0.2, 0.15, 0.15])
    logits_RV = torch.full((1, model.config.vocab_size), -torch.inf)
    logits_RV[0, :6] = probabilities.log()
    with torch.inference_mode():
        guided = RewardGuide(model=reward, beta=0.0, top_k=10**6).begin(PROMPTS_BT[:1], 1)
        for top_p, kept in (
            (0.29, [1]),
            (0.49, [1, 3]),
            (0.6, [1, 2, 3, 4, 5]),
            (0.94, [1, 2, 3, 4, 5]),
            (1.0, range(6)),
        ):
            expected = torch.zeros(6)
            expected[list(kept)] = probabilities[list(kept)] / probabilities[list(kept)].sum()
            drawn_from = guided.shift(logits_RV, top_p, 1.0).softmax(1)[0]
            torch.testing.assert_close(drawn_from[:6], expected)


def test_rows_do_not_depend_on_their_batch_and_no_reward_is_top_k_sampling() -> None:
    model, reward = tiny_model("gpt_neox"), reward_model()
    uniforms = _uniforms(SAMPLING, [0, 1])
    with torch.inference_mode():
        guide = RewardGuide(model=reward, beta=30.0, top_k=20)
        together = _sample_batch(model, PROMPTS_BT, uniforms, SAMPLING, None, guide)
        alone = [
            _sample_batch(model, PROMPTS_BT[i : i + 1], _uniforms(SAMPLING, [i]), SAMPLING, None, guide)
            for i in range(2)
        ]
        assert together == alone[0] + alone[1]
        everything = RewardGuide(model=reward, beta=0.0, top_k=10**6)
        whole = replace(SAMPLING, top_p=1.0)
        assert _sample_batch(model, PROMPTS_BT, uniforms, whole, None, everything) == _sample_batch(
            model, PROMPTS_BT, uniforms, whole, None
        )
        best = RewardGuide(model=reward, beta=0.0, top_k=1)
        greedy = Sampling(continuations=3, max_new_tokens=6, top_p=1e-9, temperature=1.0, seed=4)
        assert _sample_batch(model, PROMPTS_BT, uniforms, SAMPLING, None, best) == _sample_batch(
            model, PROMPTS_BT, uniforms, greedy, None
        )
