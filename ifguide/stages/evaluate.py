"""`evaluate`: continuations, perplexity and last-word accuracy of every model, their figures, and the report page.

Work is cut into (model, prompt set, shard) pieces over a pool of actors. Continuations are kept in `generations/`, an
artifact of their own, and with their scores in `report/continuations/`, so that another classifier needs no other
generation: delete `report/`, or name another folder with `evaluate.report`. `report/metrics.json` holds every figure
with its interval, and what differs between the models.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ifguide import schemas
from ifguide.artifacts import MANIFEST, Manifest, publish, read_manifest, verify_digest, write_json
from ifguide.config import Config, ConfigError, Input, ModelSource, config_from_mapping, to_mapping
from ifguide.corpus import list_chunks, pack, read_documents, tokenise
from ifguide.evaluation import last_word_accuracy, perplexity
from ifguide.evaluation.reward_decoding import RewardGuide
from ifguide.models import load_model
from ifguide.preferences.reward_model import load_reward_model
from ifguide.report.page import REPORT_FILES, write_report
from ifguide.stages.build_query import make_classifier
from ifguide.stages.evaluation_figures import FLUENCY, THRESHOLD, headline, measure, measured_files, scored_file
from ifguide.stages.evaluation_prompts import PROMPTS, chosen_sets
from ifguide.stages.generations import (
    VERB,
    finish_generations,
    generate_shard,
    generation_pieces,
    open_generations,
)
from ifguide.stages.report_data import report_data
from ifguide.stages.run import BASELINE, PENALISED, Run, connect
from ifguide.stages.shards import LEDGER, Pool, StageError, run_shards
from ifguide.storage import local_copy, location
from ifguide.telemetry import log
from ifguide.tokenizer import load_tokenizer
from ifguide.toxicity import LabelClassifier

METRICS = "metrics.json"


def evaluate(run: Run, *, dry_run: bool = False) -> Manifest | None:
    """Make `generations/` and `report/`.

    Raises:
        ConfigError: no prompts, or a classifier that cannot score text. FileNotFoundError: no model, or a missing
            input. MismatchError: a folder was made with other options, models or prompts.
    """
    config = run.config.evaluate
    _check(config)
    if dry_run:
        assert config.prompts is not None
        log(
            VERB,
            f"would sample {config.continuations} x {config.max_new_tokens} tokens per prompt of"
            f" {', '.join([config.prompts.path, *config.prompt_sets])} and classify them with"
            f" {', '.join([config.classifier.name, *config.classifiers])}",
        )
        return None
    models = models_to_evaluate(run)
    sets = chosen_sets(run.config)
    inputs = {f"model/{name}": fingerprint for name, (_, fingerprint) in models.items()}
    for name, folder in (("mask", run.mask), ("scores", run.scores)):
        if (folder / MANIFEST).exists():
            inputs[name] = read_manifest(folder).fingerprint
    artifact = run.open(run.report, VERB, keys=("evaluate", "seed"), inputs=inputs)
    if artifact.manifest:
        log(VERB, f"complete: {run.report / 'index.html'}")
        return artifact.manifest
    _, metrics = measure_models(run, models, sets)
    write_json(run.report / METRICS, metrics)
    data, figures = report_data(run, list(models), metrics)
    for name, further in headline(metrics).items():
        figures[name] |= further
    write_report(data, run.report)
    files = [run.report / name for name in (*REPORT_FILES, METRICS)] + measured_files(run.report)
    prompts = sum(map(len, sets.values()))
    manifest = artifact.finish(
        files,
        rows={"continuations": prompts * config.continuations * len(models), "prompts": prompts},
        summary=figures,
        remove=(LEDGER,),
    )
    log(VERB, f"{len(models)} models on {manifest.rows['prompts']} prompts; report: {run.report / 'index.html'}")
    return manifest


def measure_models(
    run: Run,
    models: dict[str, tuple[str, str]],
    sets: Mapping[str, Sequence[Any]],
    guides: Mapping[str, Mapping[str, Any]] = {},
) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Generate, classify and measure, in the folders `run.generations` and `run.report`: the pieces' results by key,
    and the figures of `evaluation_figures.measure`. `models`: name -> (source, fingerprint), the first is the base.
    `guides`: as in `continue_prompts`.

    Raises:
        StageError: a piece failed, or continuations are missing.
    """
    results = continue_prompts(run, models, sets, guides)
    metrics = measure(run, list(models), sets, np.array(results["prompt-groups"]["flagged"], dtype=bool))
    return results, metrics


def continue_prompts(
    run: Run,
    models: dict[str, tuple[str, str]],
    sets: Mapping[str, Sequence[Any]],
    guides: Mapping[str, Mapping[str, Any]] = {},
) -> dict[str, dict[str, Any]]:
    """The part of `measure_models` that is done by workers: the pieces' results by key.

    `guides`: model -> `reward` (folder), `beta` and `top_k` of reward-augmented decoding. Decoding changes neither
    perplexity nor last words, so of those models they are not measured.
    """
    config = run.config.evaluate
    sources = {name: source for name, (source, _) in models.items()}
    generations = open_generations(run, models, sets)
    pieces = generation_pieces(generations, sources, sets, prompts_per_shard=config.prompts_per_shard)
    connect(run.config)
    results = run_shards(
        VERB,
        _descriptors(run.config, pieces, list(models), guides),
        EvaluateModel,
        {
            "config": to_mapping(run.config),
            "models": sources,
            "folder": str(run.report),
            "generations": str(run.generations),
            "guides": dict(guides),
        },
        folder=run.report,
        pool=Pool(
            size=config.actors,
            cpus=config.cpus_per_actor,
            gpus=config.gpus_per_actor,
            max_attempts=config.max_attempts,
        ),
        unit="pieces",
    )
    finish_generations(generations, sets, config.continuations)
    scored = sum(result.get("continuations", 0) for result in results.values())
    expected = sum(map(len, sets.values())) * config.continuations * len(models)
    if scored != expected:
        raise StageError(f"{VERB}: {scored} continuations where {expected} were asked for")
    return results


def _check(config: Any) -> None:
    if config.prompts is None:
        raise ConfigError("evaluate.prompts: name a JSONL or Parquet file in RealToxicityPrompts' schema")
    for key, source in {"classifier": config.classifier, **config.classifiers}.items():
        if source.name == "labels":
            where = key if key == "classifier" else f"classifiers.{key}"
            raise ConfigError(f"evaluate.{where}: labels cannot score new text; choose another classifier")


def models_to_evaluate(run: Run) -> dict[str, tuple[str, str]]:
    """name -> (source, fingerprint): the models this run has trained, then those of `evaluate.models`."""
    models = {}
    for name in (BASELINE, PENALISED):
        if (run.model(name) / MANIFEST).exists():
            models[name] = (str(run.model(name) / "hf"), read_manifest(run.model(name)).fingerprint)
    for name, source in run.config.evaluate.models.items():
        if name in models:
            raise ConfigError(f"evaluate.models.{name}: this run has a model of that name; choose another")
        models[name] = (source, hashlib.sha256(source.encode()).hexdigest())
    if not models:
        raise FileNotFoundError(f"{run.folder / 'model'} holds no finished model; run `ifguide pretrain` first")
    return models


def _descriptors(
    config: Config, pieces: list[dict[str, Any]], models: list[str], guides: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """All pieces of work, model by model, so that an actor seldom changes its model."""
    descriptors: list[dict[str, Any]] = []
    for model in models:
        if config.evaluate.heldout and model not in guides:
            descriptors.append({"key": f"{model}-heldout", "model": model, "kind": "heldout"})
        if config.evaluate.cloze and model not in guides:
            descriptors.append({"key": f"{model}-cloze", "model": model, "kind": "cloze"})
        for piece in pieces:
            if piece["model"] == model:
                key = f"{model}-{piece['number']:07d}"
                key = key if piece["set"] == PROMPTS else f"{key}-{piece['set']}"
                descriptors.append({"key": key, "kind": "prompts", **piece})
    descriptors.append({"key": "prompt-groups", "model": None, "kind": "groups"})
    return descriptors


class EvaluateModel:
    """Worker: one piece of the evaluation; keeps the last model it used."""

    def __init__(
        self,
        config: dict[str, Any],
        models: dict[str, str],
        folder: str,
        generations: str,
        guides: dict[str, dict[str, Any]],
    ):
        self.config = config_from_mapping(config)
        self.options = self.config.evaluate
        self.models, self.folder, self.generations = models, location(folder), location(generations)
        self.guides = guides
        self.sets = chosen_sets(self.config)
        gpus = self.options.gpus_per_actor
        self.classifier = make_classifier(self.options.classifier, gpus=gpus)
        self.further = {name: make_classifier(source, gpus=gpus) for name, source in self.options.classifiers.items()}
        self.loaded: tuple[str, Any, Any] | None = None
        self.reward: tuple[str, Any] | None = None

    def process(self, descriptor: dict[str, Any]) -> dict[str, Any]:
        kind = descriptor["kind"]
        if kind == "groups":
            return {"flagged": self._flag_prompts()}
        if kind == "prompts":
            return self._continue_prompts(descriptor)
        model, tokenizer = self._load(descriptor["model"])
        return (self._heldout if kind == "heldout" else self._cloze)(descriptor["key"], model, tokenizer)

    def _load(self, name: str) -> tuple[Any, Any]:
        if self.loaded is None or self.loaded[0] != name:
            self.loaded = None  # frees the old model before the new one is read
            source = self.models[name]
            model = load_model(ModelSource(source=source), device=self._device())
            self.loaded = (name, model, load_tokenizer(source))
        return self.loaded[1], self.loaded[2]

    def _guide(self, name: str) -> RewardGuide | None:
        if name not in self.guides:
            return None
        options = self.guides[name]
        if self.reward is None or self.reward[0] != options["reward"]:
            self.reward = (options["reward"], load_reward_model(local_copy(options["reward"]), device=self._device()))
        return RewardGuide(model=self.reward[1], beta=options["beta"], top_k=options["top_k"])

    def _device(self) -> str:
        return "cuda" if self.options.gpus_per_actor else "cpu"

    def _flag_prompts(self) -> list[bool]:
        """Which prompts show the behaviour themselves: by their labels if all have one, else by the classifier."""
        primary = self.classifier.classes[0]
        rows: list[Any] = list(self.sets[PROMPTS])
        labels = [row.prompt_scores.get(primary, row.prompt_scores.get("toxicity")) for row in rows]
        if all(label is not None for label in labels) or isinstance(self.classifier, LabelClassifier):
            scores = np.array([0.0 if label is None else label for label in labels])
        else:
            scores = self.classifier.score([row.prompt for row in rows])[primary]
        return (scores >= self.options.prompt_threshold).tolist()

    def _continue_prompts(self, descriptor: dict[str, Any]) -> dict[str, Any]:
        """Generate a shard unless it is there, and publish it with its scores."""
        path = self.generations / descriptor["model"] / descriptor["set"] / descriptor["file"]
        if descriptor["sha256"] is not None:
            verify_digest(path, descriptor["sha256"], VERB)
        elif not path.exists():
            prompts = [self.sets[descriptor["set"]][i] for i in descriptor["prompts"]]
            name = descriptor["model"]
            model, tokenizer = self._load(name)
            guide = self._guide(name)
            generate_shard(path, name, model, tokenizer, prompts, self.options, self.config.seed, guide)
        table = schemas.read_table(path, schemas.GENERATIONS)
        scores = self._score(table.column("continuation").to_pylist())
        kind = schemas.CONTINUATIONS.field("scores").type
        maps = pa.MapArray.from_arrays(
            pa.array(np.arange(len(table) + 1, dtype=np.int32) * len(scores)),
            pa.array(list(scores) * len(table), kind.key_type),
            pa.array(np.stack(list(scores.values()), axis=1).reshape(-1), kind.item_type),
        ).cast(kind)
        scored = table.drop_columns(["tokens"]).append_column(schemas.CONTINUATIONS.field("scores"), maps)
        with publish(scored_file(self.folder, descriptor["model"], descriptor["set"], descriptor["number"])) as part:
            pq.write_table(scored.cast(schemas.CONTINUATIONS), part)
        return {"continuations": len(table)}

    def _score(self, texts: list[str]) -> dict[str, np.ndarray]:
        """Every class of the main classifier, then those of the further ones: by their name, or name:class."""
        scores = dict(self.classifier.score(texts))
        for name, classifier in self.further.items():
            for i, (label, values) in enumerate(classifier.score(texts).items()):
                scores[name if i == 0 else f"{name}:{label}"] = values
        return scores

    def _heldout(self, key: str, model: Any, tokenizer: Any) -> dict[str, Any]:
        blocks_NT, lengths_N, flagged_N = self._heldout_blocks(tokenizer, model)
        result = perplexity(model, blocks_NT, lengths_N, batch_size=self.options.batch_size)
        table = pa.table([result.block_nll, result.block_tokens, flagged_N], schema=schemas.HELDOUT)
        with publish(self.folder / FLUENCY / f"{key}.parquet") as part:
            pq.write_table(table, part)
        return {"perplexity": result.perplexity, "tokens": result.tokens}

    def _cloze(self, key: str, model: Any, tokenizer: Any) -> dict[str, Any]:
        assert self.options.cloze is not None
        texts = read_texts(self.options.cloze, "evaluate.cloze")
        result = last_word_accuracy(model, tokenizer, texts, batch_size=self.options.batch_size)
        table = pa.table([result.word_correct, result.token_correct], schema=schemas.CLOZE)
        with publish(self.folder / FLUENCY / f"{key}.parquet") as part:
            pq.write_table(table, part)
        return {"accuracy": result.accuracy, "total": result.total, "unusable": result.unusable}

    @cached_property
    def _heldout_documents(self) -> tuple[list[Any], list[Any]]:
        """The held-out documents that the classifier does not flag, and those it does, each in order."""
        inputs = enumerate(self.options.heldout)
        documents = [row for i, source in inputs for row in read_rows(source, f"evaluate.heldout[{i}]")]
        texts = [document.text for document in documents]
        flagged = self.classifier.score(texts)[self.classifier.classes[0]] >= THRESHOLD
        kinds: tuple[list[Any], list[Any]] = ([], [])
        for document, kind in zip(documents, flagged, strict=True):
            kinds[int(kind)].append(document)
        return kinds

    def _heldout_blocks(self, tokenizer: Any, model: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokens (N, T), lengths (N,) and whether the block is of flagged documents (N,): no block holds both kinds."""
        positions = getattr(model.config, "max_position_embeddings", None) or self.config.pack_corpus.block_size
        width = min(self.config.pack_corpus.block_size, positions)
        parts = []
        for flagged, documents in enumerate(self._heldout_documents):
            tokens = [ids for ids, *_ in tokenise(documents, tokenizer, annotate=False)]
            count = sum(map(len, tokens))
            if count:
                blocks = pack(tokens, skip=0, num_tokens=count, block_size=width, fill=tokenizer.eos_token_id)
                parts.append((*blocks, np.full(len(blocks[0]), bool(flagged))))
        if sum(lengths_N.sum() for _, lengths_N, _ in parts) < 2:
            raise ValueError("evaluate.heldout: the held-out documents have fewer than two tokens")
        blocks_NT, lengths_N, flagged_N = map(np.concatenate, zip(*parts, strict=True))
        return blocks_NT, lengths_N, flagged_N


def read_rows(source: Input, dotted_key: str) -> list[Any]:
    """All good documents of an input, in order.

    Raises:
        ValueError: a bad row, naming file and row; none is left out.
    """
    documents: list[Any] = []
    start, stop = source.rows or (0, np.iinfo(np.int64).max)
    counted = 0
    for chunk in list_chunks(source, 0, chunk_bytes=2**62, dotted_key=f"{dotted_key}.path"):
        for document in read_documents(chunk, source, first_row=0):
            if counted >= stop:  # a hub dataset would go on for all its rows
                return documents
            if start <= counted < stop:
                if document.reason:
                    raise ValueError(f"{dotted_key}: {chunk.name} row {document.row}: {document.reason}")
                documents.append(document)
            counted += 1
    if not documents:
        raise ValueError(f"{dotted_key}: no documents in {source.path}")
    return documents


def read_texts(source: Input, dotted_key: str) -> list[str]:
    """The texts of `read_rows`."""
    return [document.text for document in read_rows(source, dotted_key)]
