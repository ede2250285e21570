"""Pairs and rated texts of scored continuations, the loss of DPO against float64, and that training resumes."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from ifguide.config.compare import Dpo
from ifguide.config.resources import WorkerResources
from ifguide.methods import preferences
from ifguide.methods.dpo import dpo_trainer, last_complete, train_dpo
from ifguide.methods.pairs import Pair, ScoredPrompt, make_pairs, rate_continuations
from ifguide.methods.preferences import DpoTraining
from ifguide.methods.samples import SampleFiles
from ifguide.telemetry import Progress
from tests.tiny import VOCABULARY, tiny_model

EOS = 2
PAIRS = [
    Pair(prompt=(5, 9, 11), chosen=(30, 7, 8, EOS), rejected=(4, 4)),
    Pair(prompt=(6,), chosen=(12,), rejected=(22, 6, 1)),
    Pair(prompt=(40, 3), chosen=(3, 12), rejected=(3, 13)),
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {f"t{i}": i for i in range(VOCABULARY)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocabulary, "t0")), eos_token="t2")


def continuation_log_probability(
    model: PreTrainedModel, prompt: tuple[int, ...], continuation: tuple[int, ...]
) -> float:
    """Token by token in float64, one forward pass each, without padding."""
    total, text = 0.0, list(prompt)
    for token in continuation:
        logits_V = model(torch.tensor([text])).logits[0, -1].double()
        total += float(torch.log_softmax(logits_V, -1)[token])
        text.append(token)
    return total


def test_pairs_are_the_lowest_scores_over_the_highest() -> None:
    prompt = ScoredPrompt(
        row=3, prompt=(7,), continuations=((1, 1), (2, 2), (3,), (4, 4), ()), scores=(0.9, 0.1, 0.5, 0.4, 0.9)
    )
    close = ScoredPrompt(row=4, prompt=(8,), continuations=((1, 1), (2, 2)), scores=(0.5, 0.6))
    options = {"min_difference": 0.3, "max_new_tokens": 2, "eos": EOS}
    best = Pair(prompt=(7,), chosen=(2, 2), rejected=(EOS,))
    assert make_pairs([prompt, close], per_prompt=1, **options) == [best]
    second = Pair(prompt=(7,), chosen=(4, 4), rejected=(1, 1))
    assert make_pairs([close, prompt], per_prompt=9, **options) == [best, second]


def test_rated_texts_are_all_continuations_and_end_only_where_the_sampler_did_not_cut() -> None:
    prompt = ScoredPrompt(row=0, prompt=(7, 8), continuations=((1, 1), (3,), ()), scores=(0.25, 1.0, 0.0))
    rated = rate_continuations([prompt], max_new_tokens=2, eos=EOS)
    assert [(text.continuation, text.reward) for text in rated] == [((1, 1), 0.75), ((3, EOS), 0.0), ((EOS,), 1.0)]
    assert all(text.prompt == (7, 8) for text in rated)


@pytest.mark.parametrize("family", ["gpt_neox", "gpt2"])
def test_the_loss_and_its_gradient_are_those_of_the_paper(
    family: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model, reference = tiny_model(family), tiny_model(family, seed=1)
    exact = tiny_model(family, dtype=torch.float64)
    options = Dpo(beta=0.3, micro_batch_size=3, batch_size=3)
    expected = 0.0
    slopes = []
    with torch.no_grad():
        for pair in PAIRS:
            chosen, rejected = (
                continuation_log_probability(exact, pair.prompt, tokens)
                - continuation_log_probability(reference, pair.prompt, tokens)
                for tokens in (pair.chosen, pair.rejected)
            )
            expected -= math.log(1 / (1 + math.exp(-0.3 * (chosen - rejected)))) / len(PAIRS)
            slopes.append(-0.3 / (1 + math.exp(0.3 * (chosen - rejected))) / len(PAIRS))
    trainer = dpo_trainer(model, reference, tokenizer, PAIRS, options, folder=tmp_path, seed=2**40, use_cpu=True)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(len(PAIRS))])
    loss = trainer.compute_loss(trainer.model, batch)
    assert float(loss.detach()) == pytest.approx(expected, rel=2e-5)
    assert abs(expected - math.log(2)) > 0.05  # two equal models would give log 2 whatever the loss

    # The gradient in the LM head: each pair's slope times that of the difference of log-probabilities.
    loss.backward()
    head = exact.get_output_embeddings().weight
    for pair, slope in zip(PAIRS, slopes, strict=True):
        for tokens, sign in ((pair.chosen, 1), (pair.rejected, -1)):
            text = torch.tensor([[*pair.prompt, *tokens]])
            log_p = torch.log_softmax(exact(text).logits[0, :-1].double(), -1)
            places = range(len(pair.prompt) - 1, text.shape[1] - 1)
            (slope * sign * sum(log_p[j, text[0, j + 1]] for j in places)).backward()
    own = model.get_output_embeddings().weight.grad
    torch.testing.assert_close(own.double(), head.grad, rtol=1e-3, atol=1e-6)


def test_every_step_is_shown(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    options = Dpo(micro_batch_size=2, batch_size=2, epochs=3, learning_rate=1e-3, checkpoint_steps=4)
    shown: list[dict[str, Any]] = []
    progress = Progress("compare", 0, "steps", every_seconds=0, sinks=(shown.append,))
    trainer = dpo_trainer(
        tiny_model("gpt_neox"),
        tiny_model("gpt_neox"),
        tokenizer,
        PAIRS[:2] * 2,
        options,
        folder=tmp_path,
        seed=0,
        use_cpu=True,
    )
    summary = train_dpo(trainer, tmp_path, progress)
    assert [values["done"] for values in shown] == [0, 1, 2, 3, 4, 5, 6]
    assert {values["total"] for values in shown} == {6}
    assert shown[-1]["loss"] == pytest.approx(summary["loss"])


def test_training_prefers_the_chosen_and_resumes_to_the_same_weights(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    options = Dpo(micro_batch_size=2, batch_size=2, epochs=6, learning_rate=1e-3, checkpoint_steps=4)
    start = tiny_model("gpt_neox")

    def train(folder: Path, options: Dpo = options) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
        model = copy.deepcopy(start)
        trainer = dpo_trainer(
            model, copy.deepcopy(start), tokenizer, PAIRS[:2] * 2, options, folder=folder, seed=0, use_cpu=True
        )
        return train_dpo(trainer, folder), model.state_dict()

    summary, weights = train(tmp_path / "whole")
    assert summary["steps"] == 12
    assert summary["accuracy"] == 1
    assert summary["margin"] > 0.1
    assert summary["loss"] < math.log(2)
    # What a kill leaves: the checkpoint of step 8 complete, that of step 12 without its last file.
    killed = tmp_path / "whole"
    (killed / "checkpoint-12" / "trainer_state.json").unlink()
    assert last_complete(killed) == killed / "checkpoint-8"
    again, resumed = train(killed, replace(options, checkpoint_steps=5))
    assert again["steps"] == 12
    for name, values in weights.items():
        assert torch.equal(resumed[name], values), name


def test_only_options_that_change_the_weights_tell_checkpoints_apart(tmp_path: Path) -> None:
    training = DpoTraining(
        name="dpo",
        start="start",
        samples=SampleFiles(model="baseline", generations=tmp_path, scores=tmp_path, prompts=(), max_new_tokens=2),
        options=Dpo(),
        seed=0,
        folder=tmp_path,
        resources=WorkerResources(),
    )

    def digest(pairs: list[Pair] = PAIRS, **options: Any) -> str:
        return replace(training, options=replace(training.options, **options))._digest(pairs)

    assert digest(checkpoint_steps=7) == digest()
    assert len({digest(), digest(learning_rate=0.5), digest(beta=0.5), digest(PAIRS[:1])}) == 4


def test_checkpoints_of_other_options_or_pairs_are_not_gone_on_with(tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    preferences._only_of(scratch, "one")
    (scratch / "checkpoint-1").mkdir()
    preferences._only_of(scratch, "one")
    assert (scratch / "checkpoint-1").exists()
    preferences._only_of(scratch, "another")
    assert not (scratch / "checkpoint-1").exists()
