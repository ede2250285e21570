"""The training of a reward model for reward-augmented decoding (Deng and Raffel, EMNLP 2023, arXiv 2310.09520).

Its loss is their cumulative squared error: a text of l tokens with target r in [0, 1] costs

    sum over t = 1..l of  t (r_t - r)^2  /  (l (l + 1) / 2),

r_t being the reward of its first t tokens, so that a prefix counts the more, the more of the text it shows. Here the
tokens that count are those of a continuation, with its prompt before them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ifguide.config.compare import Reward
from ifguide.evaluation.reward_model import RewardModel


def cumulative_squared_error(rewards_BT: Tensor, targets_B: Tensor, first_B: Tensor, lengths_B: Tensor) -> Tensor:
    """The loss of each text, (B,): the tokens first <= j < length count, the first with weight 1, the next with 2, ...

    The published Eq. 1 with l = length - first. Every text must have a token that counts."""
    places_T = torch.arange(rewards_BT.shape[1], device=rewards_BT.device)
    weights_BT = (places_T + 1 - first_B[:, None]).clamp(min=0) * (places_T < lengths_B[:, None])
    squared_BT = (rewards_BT - targets_B[:, None]).square()
    return (weights_BT * squared_BT).sum(1) / weights_BT.sum(1)


@dataclass(frozen=True, kw_only=True)
class RatedText:
    """A prompt with a continuation of one token or more, and the reward that the whole text deserves, in [0, 1]."""

    prompt: tuple[int, ...]
    continuation: tuple[int, ...]
    reward: float

    def __post_init__(self) -> None:
        if not self.prompt or not self.continuation or not 0 <= self.reward <= 1:
            raise ValueError(f"a rated text needs tokens and a reward in [0, 1]: {self}")


def reward_steps(texts: Sequence[RatedText], options: Reward) -> int:
    """The steps of `train_reward_model`."""
    return options.epochs * -(-len(texts) // options.batch_size)


def train_reward_model(
    model: RewardModel,
    texts: Sequence[RatedText],
    options: Reward,
    *,
    seed: int,
    show: Callable[[float], None] = lambda loss: None,
) -> list[float]:
    """Train in place with AdamW and a rate that falls linearly to 0; the mean loss of each epoch. `show` gets the loss
    of every step. ValueError: no texts, or a loss that is not finite."""
    if not texts:
        raise ValueError("a reward model needs texts to learn from")
    device = model.weight.device
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": options.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=options.learning_rate)
    steps = reward_steps(texts, options)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    losses = []
    model.train()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        for epoch in range(options.epochs):
            order = np.random.default_rng([seed, epoch]).permutation(len(texts))
            total = 0.0
            for rows, batch in _batches([texts[i] for i in order], options.batch_size, device):
                loss_B = cumulative_squared_error(model(batch["tokens"])[0], *(batch[key] for key in FIELDS))
                optimizer.zero_grad(set_to_none=True)
                loss_B.mean().backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                summed = float(loss_B.detach().double().sum())
                total += summed
                show(summed / rows)
            if not np.isfinite(total):
                raise ValueError("the reward model's loss is not finite; lower compare.reward.learning_rate")
            losses.append(total / len(texts))
    model.eval()
    return losses


def rate_texts(model: RewardModel, texts: Sequence[RatedText], *, batch_size: int) -> np.ndarray:
    """The reward that the model gives each whole text, (n,) float64."""
    rates: list[np.ndarray] = []
    with torch.inference_mode():
        for rows, batch in _batches(texts, batch_size, model.weight.device):
            rewards_BT = model(batch["tokens"])[0]
            last_B = rewards_BT[torch.arange(rows, device=rewards_BT.device), batch["lengths"] - 1]
            rates.append(last_B.double().cpu().numpy())
    return np.concatenate(rates)


FIELDS = ("targets", "first", "lengths")


def _batches(texts: Sequence[RatedText], size: int, device: torch.device) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """Texts padded on the right, where a causal model's prefixes do not see it."""
    for start in range(0, len(texts), size):
        rows = texts[start : start + size]
        lengths = [len(text.prompt) + len(text.continuation) for text in rows]
        tokens_BT = np.zeros((len(rows), max(lengths)), dtype=np.int64)
        for row, text in enumerate(rows):
            tokens_BT[row, : lengths[row]] = text.prompt + text.continuation
        yield (
            len(rows),
            {
                "tokens": torch.from_numpy(tokens_BT).to(device),
                "targets": torch.tensor([text.reward for text in rows], dtype=torch.float32, device=device),
                "first": torch.tensor([len(text.prompt) for text in rows], device=device),
                "lengths": torch.tensor(lengths, device=device),
            },
        )
