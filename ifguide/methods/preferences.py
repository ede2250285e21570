"""The trainings of DPO and of RAD's reward model, each one task on a worker: scored continuations in, a model out.

A model lies in `<folder>/hf`, published whole: a training that was interrupted leaves none. DPO goes on from its last
checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ifguide.artifacts import json_digest, publish_folder, remove_tree, write_json
from ifguide.config import ConfigError, ModelSource
from ifguide.config.compare import Dpo, Reward
from ifguide.config.resources import WorkerResources
from ifguide.config.typed_yaml import result_part
from ifguide.distributed.metrics import stage_progress
from ifguide.folders import EXPORT
from ifguide.methods.dpo import dpo_trainer, train_dpo
from ifguide.methods.pairs import Pair, make_pairs, rate_continuations
from ifguide.methods.reward_model import RatedText, RewardModel, rate_texts, reward_steps, train_reward_model
from ifguide.methods.samples import SampleFiles, read_samples
from ifguide.models import load_model
from ifguide.storage import is_remote, work_folder
from ifguide.telemetry import configure_logging
from ifguide.tokenizer import load_tokenizer

VERB = "compare"
DPO, SCRATCH = "dpo", "checkpoints"
HELDOUT = 10  # one prompt in so many says how good the reward model is


@dataclass(frozen=True, kw_only=True)
class RewardTraining:
    """The reward model of `samples`, made in `folder`. `baseline` names the tokenizer, and the trunk where
    `options.source` names no other."""

    baseline: str
    samples: SampleFiles
    options: Reward
    seed: int
    folder: Path
    resources: WorkerResources

    def run(self) -> dict[str, Any]:
        """Train and publish it; gives the number of texts, the losses of the epochs, and the squared error on held-out
        prompts beside the variance of their rewards.

        Raises:
            ConfigError: `options.source` reads other tokens than the baseline.
        """
        device = _prepare(self.resources)
        tokenizer = load_tokenizer(self.baseline)
        source = self.options.source or self.baseline
        if self.options.source and load_tokenizer(source).get_vocab() != tokenizer.get_vocab():
            raise ConfigError(
                f"compare.reward.source: {source} reads other tokens than this run's baseline; name another"
            )
        trunk = load_model(ModelSource(source=source), device=device)
        train, heldout, left_out = self._texts(tokenizer, trunk)
        model = RewardModel(trunk).to(device)
        with stage_progress(VERB, self.folder, reward_steps(train, self.options), "steps") as progress:
            losses = train_reward_model(
                model, train, self.options, seed=self.seed, show=lambda loss: progress.advance(1, loss=loss)
            )
        _publish(self.folder, model.save, tokenizer)
        rewards = np.array([text.reward for text in heldout])
        rates = rate_texts(model, heldout, batch_size=self.options.batch_size) if heldout else rewards
        return {
            "texts": len(train),
            "prompts_left_out": left_out,
            "loss": losses,
            "heldout_texts": len(heldout),
            "heldout_error": float(np.mean((rates - rewards) ** 2)) if heldout else None,
            "heldout_variance": float(np.var(rewards)) if heldout else None,
        }

    def describe(self, summary: Mapping[str, Any]) -> str:
        """What `run` gave, in a line."""
        if summary["heldout_error"] is None:
            return "reward model: of one prompt, so none is held out to say how good it is"
        return (
            f"reward model: squared error {summary['heldout_error']:.4f} on held-out prompts, where their mean has"
            f" {summary['heldout_variance']:.4f}"
        )

    def _texts(self, tokenizer: Any, trunk: Any) -> tuple[list[RatedText], list[RatedText], int]:
        """The texts to learn from, those of held-out prompts, and how many prompts were left out."""
        prompts, left_out = read_samples(self.samples, tokenizer, trunk)
        drawn = np.random.default_rng(self.seed).permutation(len(prompts))
        heldout = set(drawn[: max(1, len(prompts) // HELDOUT)].tolist()) if len(prompts) > 1 else set()
        train, held = (
            rate_continuations(
                [prompt for i, prompt in enumerate(prompts) if (i in heldout) == is_held],
                max_new_tokens=self.samples.max_new_tokens,
                eos=tokenizer.eos_token_id,
            )
            for is_held in (False, True)
        )
        return train, held, left_out


@dataclass(frozen=True, kw_only=True)
class DpoTraining:
    """The DPO of the model `start` on pairs of `samples`, made in `folder`. `name` is the method's, for errors."""

    name: str
    start: str
    samples: SampleFiles
    options: Dpo
    seed: int
    folder: Path
    resources: WorkerResources

    def run(self) -> dict[str, Any]:
        """Train and publish it; gives the numbers of pairs and prompts and what `train_dpo` gives.

        Raises:
            ConfigError: no prompt has two continuations whose scores differ enough.
        """
        device = _prepare(self.resources)
        tokenizer = load_tokenizer(self.start)
        model, reference = (load_model(ModelSource(source=self.start), device=device) for _ in range(2))
        prompts, left_out = read_samples(self.samples, tokenizer, model)
        pairs = make_pairs(
            prompts,
            per_prompt=self.options.pairs_per_prompt,
            min_difference=self.options.min_difference,
            max_new_tokens=self.samples.max_new_tokens,
            eos=tokenizer.eos_token_id,
        )
        if not pairs:
            raise ConfigError(
                f"compare.methods.{self.name}.dpo.min_difference: no two continuations of one of the {len(prompts)}"
                f" prompts have scores {self.options.min_difference} apart; lower it, or raise"
                " compare.samples.continuations"
            )
        scratch = self._scratch()
        _only_of(scratch, self._digest(pairs))
        trainer = dpo_trainer(
            model, reference, tokenizer, pairs, self.options, folder=scratch, seed=self.seed, use_cpu=device == "cpu"
        )
        with stage_progress(VERB, self.folder, 0, "steps") as progress:
            trained = train_dpo(trainer, scratch, progress)
        _publish(self.folder, _with_weights(model, self.start).save_pretrained, load_tokenizer(self.start))
        remove_tree(scratch)
        return {"pairs": len(pairs), "prompts": len(prompts), "prompts_left_out": left_out, **trained}

    def describe(self, summary: Mapping[str, Any]) -> str:
        """What `run` gave, in a line."""
        return (
            f"{self.name}: {summary['pairs']} pairs of {summary['prompts']} prompts, {summary['steps']} steps, the"
            f" chosen preferred in {summary['accuracy']:.1%} at the end"
        )

    def _digest(self, pairs: Sequence[Pair]) -> str:
        """Of what a checkpoint depends on: how often there is one is not of it."""
        return json_digest([result_part(self.options), self.seed, self.start, [asdict(pair) for pair in pairs]])

    def _scratch(self) -> Path:
        """Where checkpoints lie: a disk. With a remote artifact they are this machine's, and end with it."""
        return work_folder(DPO, self.folder) if is_remote(self.folder) else self.folder / SCRATCH


def _only_of(scratch: Path, digest: str) -> None:
    """Remove the checkpoints of an attempt with other options or pairs."""
    path = scratch / "of.json"
    if scratch.exists() and not (path.exists() and json.loads(path.read_text(encoding="utf-8")) == digest):
        remove_tree(scratch)
    scratch.mkdir(parents=True, exist_ok=True)
    write_json(path, digest)


def _prepare(resources: WorkerResources) -> str:
    """Ready this process for its task; its device."""
    configure_logging()
    torch.set_num_threads(max(1, int(resources.cpus)))
    return "cuda" if resources.gpus else "cpu"


def _with_weights(model: Any, start: str) -> Any:
    """The weights of `model` in one as `start` is saved: the trainer leaves marks on a model's config."""
    plain = load_model(ModelSource(source=start))
    plain.load_state_dict({name: values.cpu() for name, values in model.state_dict().items()})
    return plain


def _publish(folder: Path, save: Callable[[Path], Any], tokenizer: Any) -> None:
    with publish_folder(folder / EXPORT) as part:
        save(part)
        tokenizer.save_pretrained(part)


def train(training: RewardTraining | DpoTraining) -> dict[str, Any]:
    """`training.run()`, as a function for a worker."""
    return training.run()
