"""`pretrain`: DeepSpeed under Ray Train with the signed per-token loss (Eq. 9), or without a mask as baseline.

Both models of a run see the same blocks in the same order from the same initial weights; only the loss differs.
DeepSpeed divides gradients by accumulation steps and averages over ranks; the loss is scaled to undo both, so
that one global token count is the only denominator.

Engine checkpoints are DeepSpeed's own files, written to a `.part` folder and renamed; a rerun goes on from the
last one. They are read back by DeepSpeed with pickle: a run directory is trusted as its owner's.
"""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ifguide.artifacts import Manifest, remove_tree, require, require_same, write_json
from ifguide.config import Config, ConfigError, ModelSource, config_from_mapping, to_mapping
from ifguide.model_card import write_model_card
from ifguide.models import check_vocabulary, load_architecture, load_model, load_tokenizer
from ifguide.objective import signed_loss
from ifguide.planning.pretrain_plan import describe, plan_pretrain, require_fit
from ifguide.stages.run import BASELINE, PENALISED, Run, connect
from ifguide.stages.target_corpus import training_run
from ifguide.stages.training_blocks import TrainingBlocks
from ifguide.telemetry import MetricsLog, configure_logging, log, read_metrics
from ifguide.training import (
    Schedule,
    deepspeed_config,
    learning_rate,
    parameter_groups,
    rank_micro_batches,
)
from ifguide.training_log import meter_of, training_line

VERB = "pretrain"
METRICS, SUMMARY = "metrics.jsonl", "summary.json"
CHECKPOINTS = "checkpoints"
EXPORT = "hf"


def pretrain(run: Run, *, dry_run: bool = False) -> Manifest | None:
    """Make `model/penalised`, or `model/baseline` when `pretrain.use_mask` is false.

    Raises:
        MismatchError: the mask is of another corpus. ConfigError: no target is named.
    """
    config = run.config.pretrain
    name = PENALISED if config.use_mask else BASELINE
    target = initial_model(run.config)
    if dry_run:
        plan = plan_pretrain(run.config)
        for line in describe(plan):
            log(VERB, line)
        require_fit(plan)
        return None
    data = training_run(run)  # the run itself, unless the target has a tokenizer of its own
    corpus, mask = require(data.corpus, "pack_corpus"), None
    inputs = {"corpus": corpus.fingerprint}
    if config.use_mask:
        mask = require(data.mask, "build_mask")
        require_same(
            f"the corpus of {data.mask}",
            mask.inputs["corpus"],
            f"{data.corpus}",
            corpus.fingerprint,
            "build the mask of this corpus, or train on the mask's own",
        )
        inputs["mask"] = mask.fingerprint
    tokenizer = load_tokenizer(data.config.tokenizer_source)
    check_vocabulary(
        architecture(run.config, target, tokenizer)["vocab_size"],
        tokenizer,
        model_name=target.source or "target.architecture",
        tokenizer_name=data.config.tokenizer_source,
    )
    artifact = run.open(run.model(name), VERB, keys=("pretrain", "target", "seed"), inputs=inputs)
    if artifact.manifest:
        log(VERB, f"{name} is complete")
        return artifact.manifest
    connect(run.config)
    summary = _train(run, data, artifact.folder, name)
    write_model_card(
        artifact.folder / EXPORT,
        data.config,
        corpus=corpus,
        mask=mask,
        scores=run.scores,
        objective={"kind": "penalty", "lambda": config.penalty},
        training=summary,
    )
    remove_tree(artifact.folder / "ray_train")
    files = [path for path in (artifact.folder / EXPORT).iterdir() if path.is_file()]
    rows = {"steps": summary["steps"], "blocks_seen": summary["blocks_seen"]}
    manifest = artifact.finish(files, rows=rows, summary=summary)
    log(VERB, f"{name}: {summary['steps']} steps, last loss {summary['loss_benign']:.4f}, in {artifact.folder}")
    return manifest


def initial_model(config: Config) -> ModelSource:
    """The weights to start from (`init_from`), or the target whose architecture is initialised at random."""
    if config.pretrain.init_from:
        return ModelSource(source=config.pretrain.init_from)
    if config.target.source is None and config.target.architecture is None:
        raise ConfigError("target: set target.architecture or target.source, or pretrain.init_from")
    return config.target


def architecture(config: Config, target: ModelSource, tokenizer: Any) -> dict[str, Any]:
    """The HF config fields of the model to train; vocabulary and special tokens follow the tokenizer if unset."""
    fields = load_architecture(target)
    fields.setdefault("vocab_size", len(tokenizer))
    fields.setdefault("max_position_embeddings", config.pack_corpus.block_size)
    return {**fields, "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}


def _train(run: Run, data: Run, folder: Path, name: str) -> dict[str, Any]:
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer

    config = run.config.pretrain
    use_gpu = config.gpus_per_worker > 0
    resources = {"CPU": config.cpus_per_worker, **({"GPU": config.gpus_per_worker} if use_gpu else {})}
    settings = {
        "config": to_mapping(data.config),
        "corpus": str(data.corpus),
        "mask": str(data.mask) if config.use_mask else None,
        "folder": str(folder),
        "name": name,
        "use_gpu": use_gpu,
        "working_directory": os.getcwd(),
    }
    trainer = TorchTrainer(
        train_loop,
        train_loop_config=settings,
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
        scaling_config=ray.train.ScalingConfig(
            num_workers=config.workers, use_gpu=use_gpu, resources_per_worker=resources
        ),
        run_config=ray.train.RunConfig(
            name=f"{name}-{time.time_ns()}",
            storage_path=str(folder / "ray_train"),
            failure_config=ray.train.FailureConfig(max_failures=config.max_failures),
        ),
    )
    checkpoint = last_checkpoint(folder)
    if checkpoint:
        log(VERB, f"{name}: resuming from {checkpoint.name}")
    with _ShownMetrics(folder / METRICS, name):
        trainer.fit()  # raises what a worker raised, after max_failures restarts
    return json.loads((folder / SUMMARY).read_text())


def train_loop(settings: dict[str, Any]) -> None:
    """One Ray Train worker: one rank of the DeepSpeed job."""
    configure_logging()
    os.chdir(settings["working_directory"])  # Ray Train moved to its own; relative paths in the config are the driver's
    if not settings["use_gpu"]:
        os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed
    import ray.train

    if not settings["use_gpu"]:
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else a 80 s compilation; gloo serves
    context = ray.train.get_context()
    _Trainer(settings, rank=context.get_world_rank(), world_size=context.get_world_size()).run()


class _Trainer:
    """The state of one rank: engine, blocks, position."""

    def __init__(self, settings: dict[str, Any], *, rank: int, world_size: int):
        import deepspeed
        from transformers.integrations import HfDeepSpeedConfig

        self.config = config_from_mapping(settings["config"])
        self.rank, self.world_size, self.name = rank, world_size, settings["name"]
        self.train = self.config.pretrain
        self.folder = Path(settings["folder"])
        torch.set_num_threads(max(1, int(self.train.cpus_per_worker)))
        torch.manual_seed(self.config.seed)
        self.blocks = TrainingBlocks(Path(settings["corpus"]), Path(settings["mask"]) if settings["mask"] else None)
        self.schedule = Schedule(
            num_blocks=len(self.blocks.lengths),
            batch_blocks=self.train.batch_blocks,
            epochs=self.train.epochs,
            seed=self.config.seed,
        )
        engine_config = deepspeed_config(self.train)
        # alive while the model is built: HF then partitions ZeRO-3 parameters as it initialises them
        self.hf_deepspeed = HfDeepSpeedConfig(engine_config) if self.train.zero_stage == 3 else None
        self.tokenizer = load_tokenizer(self.config.tokenizer_source)
        model = self._build_model()
        optimizer = torch.optim.AdamW(
            parameter_groups(model, self.train.weight_decay), lr=self.train.learning_rate, betas=self.train.betas
        )
        self.engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=engine_config)
        self.engine.train()
        self.step = self._resume()

    def _build_model(self) -> Any:
        target = initial_model(self.config)
        if not self.train.init_from:
            target = ModelSource(
                architecture=architecture(self.config, target, self.tokenizer),
                trust_remote_code=target.trust_remote_code,
            )
        model = load_model(target, seed=self.config.seed)
        if self.train.activation_checkpointing:
            model.gradient_checkpointing_enable()
        return model

    def run(self) -> None:
        """Train to the last step, export, and publish the summary."""
        wandb = to_mapping(self.train.wandb) if self.train.wandb else None
        settings = to_mapping(self.config)
        metrics = MetricsLog(self.folder / METRICS, wandb=wandb, config=settings) if self.rank == 0 else None
        values: dict[str, Any] = {}
        meter = meter_of(
            self.config,
            self.engine.module.config.to_dict(),
            step=self.step,
            steps=self.schedule.steps,
            device=torch.device(self.engine.device),
            workers=self.world_size,
        )
        while self.step < self.schedule.steps:
            values = self._train_step()
            last = self.step == self.schedule.steps
            if metrics and (last or self.step % self.train.log_steps == 0):
                values |= meter.values(self.step)
                metrics.write(self.step, values)
            if last or self.step % self.train.checkpoint_steps == 0:
                self._save()
        self._export()
        if metrics:
            metrics.close()
            logged = read_metrics(self.folder / METRICS)[-1]
            parameters = sum(getattr(p, "ds_numel", p.numel()) for p in self.engine.module.parameters())
            summary = {"steps": self.step, "blocks_seen": self.schedule.total_blocks, "parameters": parameters}
            losses = {name: logged[name] for name in ("loss_benign", "loss_masked")}
            write_json(self.folder / SUMMARY, {**summary, **losses})

    def _train_step(self) -> dict[str, Any]:
        batch = self.schedule.batch(self.step)
        token_count = self.blocks.predicted_tokens(batch)
        micro_batches = rank_micro_batches(
            batch, rank=self.rank, world_size=self.world_size, micro_batch_blocks=self.train.micro_batch_blocks
        )
        rate = learning_rate(self.step, self.schedule.steps, self.train)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rate
        sums = torch.zeros(4, dtype=torch.float64)
        for indices in micro_batches:
            tokens_BT, lengths_B, mask_BT = (
                None if array is None else torch.from_numpy(array).to(self.engine.device)
                for array in self.blocks.take(indices)
            )
            assert tokens_BT is not None
            assert lengths_B is not None
            logits_BTV = self.engine(input_ids=tokens_BT, use_cache=False).logits
            result = signed_loss(
                logits_BTV, tokens_BT, mask_BT, lengths_B, penalty=self.train.penalty, token_count=token_count
            )
            self.engine.backward(result.loss * (self.world_size * len(micro_batches)))
            self.engine.step()
            parts = (result.benign_sum, result.masked_sum, result.benign_count, result.masked_count)
            sums += torch.tensor([float(part) for part in parts], dtype=torch.float64)
        self.step += 1
        torch.distributed.all_reduce(sums := sums.to(self.engine.device))
        benign_sum, masked_sum, benign_count, masked_count = sums.tolist()
        benign = benign_sum / max(benign_count, 1)
        if not np.isfinite(benign):
            raise FloatingPointError(f"the benign loss is {benign} at step {self.step}; lower pretrain.learning_rate")
        return {
            "loss_benign": benign,
            "loss_masked": masked_sum / masked_count if masked_count else None,
            "learning_rate": rate,
            "gradient_norm": _as_float(self.engine.get_global_grad_norm()),
        }

    def _save(self) -> None:
        """Publish the engine's state of this step; the one before it is removed after that."""
        folder = self.folder / CHECKPOINTS
        final = folder / f"step-{self.step:08d}"
        if final.exists():
            return
        part = folder / f"{final.name}.part"
        self.engine.save_checkpoint(str(part), tag="state", client_state={"step": self.step})
        torch.distributed.barrier()
        if self.rank == 0:
            part.rename(final)
            for other in folder.iterdir():
                if other != final:
                    remove_tree(other)
        torch.distributed.barrier()

    def _resume(self) -> int:
        checkpoint = last_checkpoint(self.folder)
        if checkpoint is None:
            return 0
        path, state = self.engine.load_checkpoint(str(checkpoint), tag="state")
        if path is None:
            raise ValueError(f"{checkpoint} cannot be loaded; delete it to start again from step 0")
        return int(state["step"])

    def _export(self) -> None:
        """Write the HF checkpoint in fp32, from the engine's own full-precision weights."""
        if self.rank == 0:
            checkpoint = last_checkpoint(self.folder)
            assert checkpoint is not None
            model = self.engine.module
            if self.train.zero_stage > 0:
                from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

                state = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint), tag="state")
                self.hf_deepspeed = None
                model = self._empty_copy()
                model.load_state_dict(state, strict=False)
                model.tie_weights()
            part = self.folder / f"{EXPORT}.part"
            remove_tree(part)
            model.generation_config.eos_token_id = self.tokenizer.eos_token_id
            model.save_pretrained(part)
            self.tokenizer.save_pretrained(part)
            remove_tree(self.folder / EXPORT)
            part.rename(self.folder / EXPORT)
        torch.distributed.barrier()

    def _empty_copy(self) -> Any:
        config = self.engine.module.config
        return type(self.engine.module)(config).float()


class _ShownMetrics:
    """Shows what rank 0 appends to its metrics file as progress lines of the driver, while training runs.

    Workers' own output stays in Ray's logs: theirs would come with a prefix, late, and among that of others.
    """

    def __init__(self, path: Path, name: str):
        self.path, self.name = path, name
        self.offset = path.stat().st_size if path.exists() else 0
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> None:
        self.thread.start()

    def __exit__(self, *error: object) -> None:
        self.stop.set()
        self.thread.join()
        self._show_new()

    def _follow(self) -> None:
        while not self.stop.wait(1.0):
            self._show_new()

    def _show_new(self) -> None:
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(self.offset)
            new = file.read()
        complete = new[: new.rfind(b"\n") + 1]
        self.offset += len(complete)
        for line in complete.splitlines():
            log(VERB, training_line(self.name, json.loads(line)))


def last_checkpoint(folder: Path) -> Path | None:
    """The newest published engine checkpoint of a model folder."""
    found = sorted(path for path in (folder / CHECKPOINTS).glob("step-*") if path.suffix != ".part")
    return found[-1] if found else None


def _as_float(value: Any) -> float | None:
    return None if value is None else float(value)
