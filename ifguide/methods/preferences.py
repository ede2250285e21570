"""What `compare` makes for DPO and RAD: scored continuations in `compare/samples`, one reward model in
`compare/reward`, and a model for each DPO method in `compare/<name>/model/dpo`.

Continuations are sampled as `evaluate` samples them, on as many actors, from the prompts of `build_query`; a prompt
that is evaluated too teaches nothing. A training is one task; DPO goes on from its last checkpoint.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch

from ifguide import schemas
from ifguide.artifacts import Artifact, Manifest, data_files, json_digest, open_artifact, publish_folder, remove_tree
from ifguide.config import Config, ConfigError, ModelSource, config_from_mapping, result_options, to_mapping, to_yaml
from ifguide.config.compare import Dpo, Rad
from ifguide.config.typed_yaml import result_part
from ifguide.distributed.session import connect, require_resources
from ifguide.distributed.shards import LEDGER
from ifguide.evaluation.figures import measured_files, scored_file
from ifguide.evaluation.generation import encode_prompts
from ifguide.evaluation.generations import OPTIONS, prompts_digest
from ifguide.evaluation.prompts import PROMPTS, chosen_sets
from ifguide.methods.dpo import dpo_trainer, train_dpo
from ifguide.methods.masks import VERB, compared_classifier
from ifguide.methods.pairs import ScoredPrompt, make_pairs, rate_continuations
from ifguide.methods.reward_model import RatedText, RewardModel, rate_texts, train_reward_model
from ifguide.models import load_model
from ifguide.run import BASELINE, Run
from ifguide.stages.evaluate import continue_prompts
from ifguide.storage import file_sizes, is_remote, location, work_folder
from ifguide.telemetry import configure_logging, log
from ifguide.tokenizer import load_tokenizer

DPO, HF, SCRATCH = "dpo", "hf", "checkpoints"
HELDOUT = 10  # one prompt in so many says how good the reward model is

Model = tuple[str, str]  # source, fingerprint


def check_preferences(config: Config, key: str) -> None:
    """Refuse a DPO or RAD method that this run cannot have.

    Raises:
        ConfigError: no prompts to sample from, or a classifier that cannot score text.
    """
    if config.build_query.prompts is None:
        raise ConfigError(f"{key} learns from continuations of other prompts; set build_query.prompts")
    if compared_classifier(config).name == "labels":
        raise ConfigError(f"{key} needs a classifier that scores text; set compare.classifier")


def make_samples(run: Run, baseline: Model) -> Manifest:
    """Make `compare/samples`: continuations of the training prompts by the baseline, with their scores.

    Raises:
        ConfigError: every training prompt is evaluated too, so nothing would be left to learn from.
    """
    training_prompts(run)
    sampler = samples_run(run)
    sets = chosen_sets(sampler.config)
    evaluate = sampler.config.evaluate
    options = {name: getattr(evaluate, name) for name in OPTIONS} | {"classifier": result_part(evaluate.classifier)}
    inputs = {f"model/{BASELINE}": baseline[1], "prompts": prompts_digest(sets[PROMPTS])}
    artifact = sampler.open(sampler.report, VERB, keys=("seed",), inputs=inputs, extra={"samples": options})
    if artifact.manifest:
        return artifact.manifest
    continue_prompts(sampler, {BASELINE: baseline}, sets)
    count = len(sets[PROMPTS]) * evaluate.continuations
    rows = {"continuations": count, "prompts": len(sets[PROMPTS])}
    manifest = artifact.finish(measured_files(sampler.report), rows=rows, summary={}, remove=(LEDGER,))
    log(VERB, f"{count:,} continuations of {len(sets[PROMPTS]):,} training prompts sampled and scored")
    return manifest


def samples_run(run: Run) -> Run:
    """The run that samples: `evaluate` of training prompts alone, with other random numbers than the evaluation's."""
    config = run.config
    evaluate = replace(
        config.evaluate,
        prompts=config.build_query.prompts,
        continuations=config.compare.samples.continuations,
        max_prompts=config.compare.samples.max_prompts,
        balanced=False,
        prompt_sets={},
        classifier=compared_classifier(config),
        classifiers={},
        heldout=(),
        cloze=None,
        models={},
        report="scores",
    )
    return Run(
        config=replace(config, run_dir=str(run.folder / VERB / "samples"), seed=config.seed + 1, evaluate=evaluate)
    )


def training_prompts(run: Run) -> list[Any]:
    """The sampled prompts that are not evaluated too, in the order of their rows.

    Raises:
        ConfigError: there are none.
    """
    evaluated = {prompt.prompt for prompts in chosen_sets(run.config).values() for prompt in prompts}
    kept = [prompt for prompt in chosen_sets(samples_run(run).config)[PROMPTS] if prompt.prompt not in evaluated]
    if not kept:
        raise ConfigError("build_query.prompts: all of them are evaluated too; DPO and RAD need others to learn from")
    return kept


def read_samples(run: Run, tokenizer: Any, model: Any) -> tuple[list[ScoredPrompt], int]:
    """The scored training prompts, and how many prompts were sampled but are evaluated too."""
    sampler = samples_run(run)
    rows: dict[int, tuple[list[tuple[int, ...]], list[float]]] = {}
    for number, path in enumerate(data_files(sampler.generations(BASELINE) / PROMPTS)):
        generated = schemas.read_table(path, schemas.GENERATIONS).to_pylist()
        scored = schemas.read_table(scored_file(sampler.report, BASELINE, PROMPTS, number), schemas.CONTINUATIONS)
        for row, scores in zip(generated, scored.column("scores").to_pylist(), strict=True):
            continuations, values = rows.setdefault(row["prompt_row"], ([], []))
            continuations.append(tuple(row["tokens"]))
            values.append(float(scores[0][1]))  # of the classifier's primary class
    kept = training_prompts(run)
    encoded = encode_prompts(model, tokenizer, [row.prompt for row in kept], run.config.evaluate.max_new_tokens)
    prompts = [
        ScoredPrompt(
            row=row.row, prompt=tuple(ids), continuations=tuple(rows[row.row][0]), scores=tuple(rows[row.row][1])
        )
        for row, ids in zip(kept, encoded, strict=True)
    ]
    return prompts, len(rows) - len(kept)


def make_reward_model(run: Run, baseline: Model, samples: Manifest) -> tuple[Path, Manifest]:
    """Make `compare/reward`: its folder in HF form, and the manifest.

    Raises:
        ConfigError: `compare.reward.source` reads other tokens than the run's models.
    """
    folder = run.folder / VERB / "reward"
    options = {"reward": result_part(run.config.compare.reward), **result_options(run.config, ("seed",))}
    inputs = {"samples": samples.fingerprint, f"model/{BASELINE}": baseline[1]}
    artifact = _open(run, folder, options, inputs)
    if artifact.manifest:
        return folder / HF, artifact.manifest
    summary = _on_a_worker(run, _train_reward, baseline[0], str(folder))
    manifest = artifact.finish(_files(folder), rows={"texts": summary["texts"]}, summary=summary)
    log(
        VERB,
        f"reward model: squared error {summary['heldout_error']:.4f} on held-out prompts, where their mean has"
        f" {summary['heldout_variance']:.4f}",
    )
    return folder / HF, manifest


def make_dpo_model(run: Run, name: str, method: Dpo, start: Model, samples: Manifest) -> tuple[Path, Manifest]:
    """Make `compare/<name>/model/dpo` from the model `start`: its folder in HF form, and the manifest.

    Raises:
        ConfigError: no prompt has two continuations whose scores differ enough.
    """
    folder = run.folder / VERB / name / "model" / DPO
    options = {"dpo": result_part(method), **result_options(run.config, ("seed",))}
    artifact = _open(run, folder, options, {"samples": samples.fingerprint, f"model/{method.model}": start[1]})
    if artifact.manifest:
        return folder / HF, artifact.manifest
    summary = _on_a_worker(run, _train_dpo, name, start[0], str(folder))
    manifest = artifact.finish(_files(folder), rows={"pairs": summary["pairs"]}, summary=summary)
    log(
        VERB,
        f"{name}: {summary['pairs']} pairs of {summary['prompts']} prompts, {summary['steps']} steps, the chosen"
        f" preferred in {summary['accuracy']:.1%} at the end",
    )
    return folder / HF, manifest


def rad_fingerprint(method: Rad, start: Model, reward: Manifest) -> str:
    """What decides the text that a RAD method samples, besides sampling."""
    return json_digest([start[1], reward.fingerprint, method.beta, method.top_k])


def _open(run: Run, folder: Path, options: dict[str, Any], inputs: dict[str, str]) -> Artifact:
    inputs = {**inputs, "prompts": prompts_digest(training_prompts(run))}
    return open_artifact(folder, verb=VERB, options=options, inputs=inputs, config_yaml=to_yaml(run.config))


def _files(folder: Path) -> list[Path]:
    return [folder / HF / name for name in file_sizes(folder / HF)]


def _on_a_worker(run: Run, train: Any, *arguments: str) -> dict[str, Any]:
    connect(run.config.cluster)
    config = run.config.compare
    require_resources(run.config.cluster, VERB, config.resources)
    task = ray.remote(
        num_cpus=config.resources.cpus, num_gpus=config.resources.gpus, max_retries=config.resources.attempts - 1
    )(train)
    return ray.get(task.remote(to_mapping(run.config), *arguments))


def _prepare(config: dict[str, Any]) -> tuple[Run, str]:
    configure_logging()
    run = Run(config=config_from_mapping(config))
    torch.set_num_threads(max(1, int(run.config.compare.resources.cpus)))
    return run, "cuda" if run.config.compare.resources.gpus else "cpu"


def _train_reward(config: dict[str, Any], baseline: str, folder: str) -> dict[str, Any]:
    run, device = _prepare(config)
    options = run.config.compare.reward
    tokenizer = load_tokenizer(baseline)
    source = options.source or baseline
    if options.source and load_tokenizer(source).get_vocab() != tokenizer.get_vocab():
        raise ConfigError(f"compare.reward.source: {source} reads other tokens than this run's baseline; name another")
    trunk = load_model(ModelSource(source=source), device=device)
    prompts, left_out = read_samples(run, tokenizer, trunk)
    sampled = {"max_new_tokens": run.config.evaluate.max_new_tokens, "eos": tokenizer.eos_token_id}
    drawn = np.random.default_rng(run.config.seed).permutation(len(prompts))
    heldout = set(drawn[: max(1, len(prompts) // HELDOUT)].tolist()) if len(prompts) > 1 else set()
    split: dict[bool, list[RatedText]] = {
        held: rate_continuations([p for i, p in enumerate(prompts) if (i in heldout) == held], **sampled)
        for held in (False, True)
    }
    model = RewardModel(trunk).to(device)
    losses = train_reward_model(model, split[False], options, seed=run.config.seed)
    _publish(location(folder), model.save, tokenizer)
    wanted = np.array([text.reward for text in split[True]])
    rates = rate_texts(model, split[True], batch_size=options.batch_size) if heldout else wanted
    return {
        "texts": len(split[False]),
        "prompts_left_out": left_out,
        "loss": losses,
        "heldout_texts": len(wanted),
        "heldout_error": float(np.mean((rates - wanted) ** 2)) if heldout else None,
        "heldout_variance": float(np.var(wanted)) if heldout else None,
    }


def _train_dpo(config: dict[str, Any], name: str, start: str, folder: str) -> dict[str, Any]:
    run, device = _prepare(config)
    options = run.config.compare.methods[name].dpo
    assert options is not None
    tokenizer = load_tokenizer(start)
    model, reference = (load_model(ModelSource(source=start), device=device) for _ in range(2))
    prompts, left_out = read_samples(run, tokenizer, model)
    pairs = make_pairs(
        prompts,
        per_prompt=options.pairs_per_prompt,
        min_difference=options.min_difference,
        max_new_tokens=run.config.evaluate.max_new_tokens,
        eos=tokenizer.eos_token_id,
    )
    if not pairs:
        raise ConfigError(
            f"compare.methods.{name}.dpo.min_difference: no two continuations of one of the {len(prompts)} prompts have"
            f" scores {options.min_difference} apart; lower it, or raise compare.samples.continuations"
        )
    scratch = _scratch(location(folder))
    trainer = dpo_trainer(
        model, reference, tokenizer, pairs, options, folder=scratch, seed=run.config.seed, use_cpu=device == "cpu"
    )
    trained = train_dpo(trainer, scratch)
    _publish(location(folder), _with_weights(model, start).save_pretrained, load_tokenizer(start))
    remove_tree(scratch)
    return {"pairs": len(pairs), "prompts": len(prompts), "prompts_left_out": left_out, **trained}


def _with_weights(model: Any, start: str) -> Any:
    """The weights of `model` in one as `start` is saved: the trainer leaves marks on a model's config."""
    plain = load_model(ModelSource(source=start))
    plain.load_state_dict({name: values.cpu() for name, values in model.state_dict().items()})
    return plain


def _scratch(folder: Path) -> Path:
    """Where a training's checkpoints lie: a disk. With a remote artifact they are this machine's, and end with it."""
    return work_folder(DPO, folder) if is_remote(folder) else folder / SCRATCH


def _publish(folder: Path, save: Any, tokenizer: Any) -> None:
    with publish_folder(folder / HF) as part:
        save(part)
        tokenizer.save_pretrained(part)
