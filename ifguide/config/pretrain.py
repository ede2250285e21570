"""The `pretrain` section of the config: objective, optimiser, engine, checkpoints.

`affects_result=False` marks what a training can be resumed with another value of: workers, offload, checkpoints, logs.
Micro-batches, ZeRO stage and engine change the order of sums, and stage 3 draws other random weights to start from, so
they are part of what the model was made from.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from ifguide.config.resources import WorkerResources
from ifguide.config.typed_yaml import ConfigError, option

ObjectiveKind = Literal["penalty", "ignore", "unlikelihood", "clipped"]


@dataclass(frozen=True, kw_only=True)
class Wandb:
    """A Weights & Biases project to log to as well; its package is imported only then (`pip install wandb`).

    Attributes:
        project: its name.
        entity: user or team.
    """

    project: str = option(affects_result=False)
    entity: str | None = option(None, affects_result=False)


@dataclass(frozen=True, kw_only=True)
class MaskedLoss:
    """What masked tokens carry; `ifguide.training.objective` has the formulas.

    Attributes:
        kind: `penalty` is the paper's, unbounded; the others are bounded; `ignore` leaves masked tokens out.
        floor_probability: `clipped` is the penalty until a masked token is less likely than this.
    """

    kind: ObjectiveKind = "clipped"
    floor_probability: float = option(1e-3, above=0, at_most=0.999)


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Low-rank adapters, trained in place of the weights of `init_from` and merged into them at the end.

    Attributes:
        rank: of each adapter.
        alpha: an adapter weighs this over its rank.
        targets: linear maps of the blocks that get one, by the last part of their names (`q_proj`). Empty: all.
    """

    rank: int = option(16, at_least=1)
    alpha: float = option(32.0, above=0)
    targets: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Acceleration:
    """What makes a training faster. Those that change the order of sums change last bits, so they count among what a
    model was made from; bench/LOG.md has what each gives.

    Attributes:
        compiled_layers: compile what lies between the products of a layer; not with `zero_stage` 3. Null: in trainings
            long enough to earn the compilation's time, on a CPU in bfloat16 alone.
        compiled_loss: softmax, loss, mask and gradient of logits as one compiled kernel. Null: as above.
        fused_optimizer: AdamW as one kernel, which clips as well.
        deepspeed_optimizer: of engine `deepspeed`, its own fused AdamW instead of torch's; built on first use, for
            which there must be a compiler.
        deepspeed_compile: of engine `deepspeed`, have it compile the whole model, but for the head, in place of
            `compiled_layers`.
        prefetched_batches: a thread makes the next step's batches while a step is computed.
        kept_memory: on a CPU, keep what a step frees for the next one instead of taking it anew page by page.
        background_checkpoints: of engine `torch`, written by a thread from a copy in the CPU's memory. Null: on a GPU;
            on a CPU the copy would take its memory once more.
    """

    compiled_layers: bool | None = option(None, off=False)
    compiled_loss: bool | None = option(None, off=False)
    fused_optimizer: bool = option(True, off=False)
    deepspeed_optimizer: bool = option(False, off=False)
    deepspeed_compile: bool = option(False, off=False)
    prefetched_batches: bool = option(True, affects_result=False)
    kept_memory: bool = option(True, affects_result=False)
    background_checkpoints: bool | None = option(None, affects_result=False)


@dataclass(frozen=True, kw_only=True)
class Pretrain:
    """Train the target with the signed loss.

    Attributes:
        use_mask: false trains the plain baseline.
        tokenizer: the target's, where it is not the corpus'. The documents are packed again and masked by characters.
        train_tokenizer: train the target's tokenizer of this many tokens on the documents.
        objective: what masked tokens carry.
        penalty: lambda, which multiplies it. The paper has kind `penalty` and 1.
        init_from: a published model to go on from, on the hub that of `target.revision`. Null: random weights.
        lora: train adapters of `init_from` instead of all its weights, for models that do not fit otherwise.
        epochs: passes over the corpus.
        batch_blocks: blocks of a step, over all workers; a multiple of `workers` times `micro_batch_blocks`.
        micro_batch_blocks: blocks of one forward pass of a worker.
        learning_rate: the greatest, after the warm-up.
        final_learning_rate_ratio: last over greatest learning rate; a cosine lies between.
        warmup_fraction: share of the steps in which the rate rises.
        weight_decay: of AdamW.
        betas: of AdamW.
        gradient_clipping: greatest norm of the gradient.
        max_benign_rise: stop when the smoothed benign loss is this many nats over its lowest. Null: never.
        heldout_blocks: blocks that are not trained on, but evaluated at each checkpoint.
        export: which checkpoint becomes the model: the last, or the best on `heldout_blocks`.
        document_attention: documents of a block do not see each other; each is trained on as if it were alone. Factors,
            refinement and scores read the corpus so too.
        dtype: of weights and products.
        engine: `deepspeed`, or `torch` on one device in the driver's process.
        zero_stage: of DeepSpeed: what workers share out among them. 3 draws other random weights to start from.
        offload_optimizer: keep the optimizer's state in the CPU's memory.
        offload_parameters: keep the parameters there (ZeRO-3).
        offload_nvme: folder on a disk for the offloaded parameters (ZeRO-3).
        activation_checkpointing: compute activations again in the backward pass instead of keeping them.
        acceleration: what makes a step faster.
        workers: processes that train.
        min_workers: start with as many workers as there are, from this many on; each restart counts them again.
        resources: of one worker.
        checkpoint_steps: steps from one checkpoint to the next; with `export: best` the model depends on them.
        keep_last: newest checkpoints that stay.
        keep_best: best checkpoints on `heldout_blocks` that stay.
        log_steps: steps from one line of the log to the next.
        wandb: log to Weights & Biases as well.
        max_failures: restarts after a failed worker; -1: without end.
    """

    use_mask: bool = True
    tokenizer: str | None = None
    train_tokenizer: int | None = option(None, at_least=300)
    objective: MaskedLoss = MaskedLoss()
    penalty: float = option(0.5, at_least=0)
    init_from: str | None = None
    lora: Lora | None = option(None, off=None)  # noqa: RUF009  # frozen, as its metadata are
    epochs: float = option(4.0, above=0)
    batch_blocks: int = option(512, at_least=1)
    micro_batch_blocks: int = option(8, at_least=1)
    learning_rate: float = option(6e-4, above=0)
    final_learning_rate_ratio: float = option(0.1, at_least=0, at_most=1)
    warmup_fraction: float = option(0.01, at_least=0, at_most=1)
    weight_decay: float = option(4e-4, at_least=0)
    betas: tuple[float, float] = option((0.9, 0.95), at_least=0, at_most=1)
    gradient_clipping: float = option(1.0, above=0)
    max_benign_rise: float | None = option(1.0, above=0)
    heldout_blocks: int = option(0, at_least=0)
    export: Literal["last", "best"] = "last"
    document_attention: bool = option(False, off=False)
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    engine: Literal["deepspeed", "torch"] = "deepspeed"
    zero_stage: int = option(1, at_least=0, at_most=3)
    offload_optimizer: bool = option(False, affects_result=False)
    offload_parameters: bool = option(False, affects_result=False)
    offload_nvme: str | None = option(None, affects_result=False)
    activation_checkpointing: bool = option(False, affects_result=False)
    acceleration: Acceleration = Acceleration()
    workers: int = option(1, at_least=1, affects_result=False)
    min_workers: int | None = option(None, at_least=1, affects_result=False)
    resources: WorkerResources = option(WorkerResources(), affects_result=False)  # noqa: RUF009  # frozen
    checkpoint_steps: int = option(500, at_least=1, affects_result=False)
    keep_last: int = option(1, at_least=1, affects_result=False)
    keep_best: int = option(1, at_least=0, affects_result=False)
    log_steps: int = option(10, at_least=1, affects_result=False)
    wandb: Wandb | None = option(None, affects_result=False)  # noqa: RUF009  # frozen, as its metadata are
    max_failures: int = option(3, at_least=-1, affects_result=False)

    RENAMED: ClassVar[dict[str, str]] = {"cpus_per_worker": "resources.cpus", "gpus_per_worker": "resources.gpus"}

    @property
    def has_own_tokenizer(self) -> bool:
        """True when the target is given another tokenizer than the corpus'."""
        return self.tokenizer is not None or self.train_tokenizer is not None

    @property
    def fewest_workers(self) -> int:
        """Workers that it may start with."""
        return self.min_workers or self.workers

    @property
    def parts_parameters(self) -> bool:
        """True when a worker holds a part of each weight."""
        return self.engine == "deepspeed" and self.zero_stage == 3


def check_pretrain(train: Pretrain) -> None:
    """Raises ConfigError, naming the key, for options that do not go together."""
    if train.tokenizer is not None and train.train_tokenizer is not None:
        raise ConfigError("pretrain.train_tokenizer: pretrain.tokenizer is named too; unset one of them")
    if train.train_tokenizer is not None and train.init_from is not None:
        raise ConfigError(
            "pretrain.train_tokenizer: the weights of pretrain.init_from are of that model's own tokens; unset it, or"
            f" name them by pretrain.tokenizer={train.init_from}"
        )
    if train.lora is not None and train.init_from is None:
        raise ConfigError("pretrain.lora: adapters need weights to begin with; name a model by pretrain.init_from")
    for index, beta in enumerate(train.betas):
        if beta == 1:
            raise ConfigError(f"pretrain.betas[{index}]: {beta} must be below 1")
    per_step = train.workers * train.micro_batch_blocks
    if train.batch_blocks % per_step:
        raise ConfigError(
            f"pretrain.batch_blocks: {train.batch_blocks} is not a multiple of workers * micro_batch_blocks"
            f" = {train.workers} * {train.micro_batch_blocks} = {per_step}"
        )
    if train.engine == "torch" and (train.workers > 1 or train.min_workers is not None):
        raise ConfigError("pretrain.engine: torch has one worker; set pretrain.workers=1, or engine: deepspeed")
    if train.min_workers is not None and train.min_workers > train.workers:
        raise ConfigError(f"pretrain.min_workers: {train.min_workers} is over workers = {train.workers}")
    if train.export == "best" and not (train.heldout_blocks and train.keep_best):
        raise ConfigError("pretrain.export: best needs pretrain.heldout_blocks to tell, and keep_best of 1 or more")
    for key, least in (("offload_optimizer", 1), ("offload_parameters", 3)):
        if getattr(train, key) and (train.engine != "deepspeed" or train.zero_stage < least):
            raise ConfigError(
                f"pretrain.{key}: needs engine: deepspeed and a zero_stage of at least {least},"
                f" not {train.engine} and {train.zero_stage}"
            )
    for key in ("deepspeed_optimizer", "deepspeed_compile"):
        if getattr(train.acceleration, key) and train.engine != "deepspeed":
            raise ConfigError(f"pretrain.acceleration.{key}: is of engine deepspeed, not {train.engine}; unset it")
    if train.acceleration.deepspeed_compile and train.acceleration.compiled_layers:
        raise ConfigError("pretrain.acceleration.deepspeed_compile: compiles the layers, too; unset compiled_layers")
    if train.acceleration.compiled_layers and train.parts_parameters:
        raise ConfigError("pretrain.acceleration.compiled_layers: not with zero_stage 3; unset it")
    if train.offload_nvme is not None and not (train.offload_parameters and train.offload_optimizer):
        raise ConfigError(
            "pretrain.offload_nvme: takes only parameters, where the optimizer is in memory; set offload_parameters and"
            " offload_optimizer to true with zero_stage 3, or unset offload_nvme"
        )
