"""Direct preference optimisation (Rafailov et al., arXiv 2305.18290) with `trl`, of pairs that are tokens already.

The loss of a pair is  -log sigmoid(beta * (d_chosen - d_rejected)),  d being the continuation's log-probability given
the prompt, under the trained model less under the reference; prompt tokens do not count. `trl` itself tokenises text
and ends every text with EOS, which is wrong of continuations that were cut, so its preparation of data is left out.

Training goes on from the last complete checkpoint in its folder; those are the Trainer's, read with `weights_only`.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, TrainerState

from ifguide.config import ModelSource
from ifguide.config.compare import Dpo
from ifguide.methods.pairs import Pair
from ifguide.models import load_model
from ifguide.telemetry import Progress


def dpo_trainer(
    model: PreTrainedModel,
    reference: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[Pair],
    options: Dpo,
    *,
    folder: Path,
    seed: int,
    use_cpu: bool,
) -> Any:
    """A `trl.DPOTrainer` of `model` on `pairs`, with its checkpoints in `folder`. Both models are changed: they compute
    log-probabilities of labels. The optimiser is the paper's, RMSprop, with a warm-up over a tenth of the steps."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    class PairTrainer(DPOTrainer):
        def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
            return dataset

        def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
            # The Trainer's own reading leaves out weights that have another name on disk: GPT-NeoX's LM head.
            saved = load_model(ModelSource(source=resume_from_checkpoint))
            target: Any = self.model if model is None else model
            target.load_state_dict(saved.state_dict())

    config = DPOConfig(
        output_dir=str(folder),
        beta=options.beta,
        num_train_epochs=options.epochs,
        per_device_train_batch_size=options.micro_batch_size,
        gradient_accumulation_steps=options.batch_size // options.micro_batch_size,
        learning_rate=options.learning_rate,
        optim="rmsprop",
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=0.1,  # below 1: a share of the steps
        max_length=None,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=use_cpu,
        dataloader_pin_memory=not use_cpu,
        save_steps=options.checkpoint_steps,
        save_total_limit=2,
        logging_steps=1,
        disable_tqdm=True,
        report_to="none",
        seed=seed % 2**32,  # transformers takes no larger one
    )
    rows = [
        {"prompt_ids": list(p.prompt), "chosen_ids": list(p.chosen), "rejected_ids": list(p.rejected)} for p in pairs
    ]
    return PairTrainer(
        model=model, ref_model=reference, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    )


class _Shown(TrainerCallback):
    """Gives the Trainer's steps to `progress`."""

    def __init__(self, progress: Progress):
        self.progress = progress

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        self.progress.begin(state.max_steps, already=state.global_step)

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: Any = None, **_: Any) -> None:
        if logs and "rewards/margins" in logs:  # not what it logs at the end
            self.progress.advance(state.global_step - self.progress.done, loss=float(logs["loss"]))


def train_dpo(trainer: Any, folder: Path, progress: Progress | None = None) -> dict[str, float]:
    """Train to the end, from the last complete checkpoint in `folder` if there is one; `progress` gets every step.

    Gives the steps, and of the last tenth of them the mean `loss`, `accuracy` (pairs whose chosen continuation has the
    larger d) and `margin` (beta times the difference of the two d)."""
    checkpoint = last_complete(folder)
    if progress is not None:
        trainer.add_callback(_Shown(progress))
    with contextlib.redirect_stdout(io.StringIO()):  # the Trainer prints what it logs
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    rows = [row for row in trainer.state.log_history if "rewards/margins" in row]
    last = rows[-max(1, len(rows) // 10) :]
    named = {"loss": "loss", "accuracy": "rewards/accuracies", "margin": "rewards/margins"}
    means = {name: sum(float(row[key]) for row in last) / len(last) for name, key in named.items()}
    return {"steps": trainer.state.global_step, **means}


def last_complete(folder: Path) -> Path | None:
    """The latest checkpoint that was written to its end: the Trainer's state is its last file."""
    checkpoints = [path.parent for path in folder.glob("checkpoint-*/trainer_state.json")]
    return max(checkpoints, key=lambda path: int(path.name.rpartition("-")[2]), default=None)
