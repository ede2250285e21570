"""`evaluate`: continuations, perplexity and last-word accuracy of every model, and the report page.

Work is cut into (model, prompt range) pieces over a pool of actors; every continuation is kept with its scores
in `report/continuations/`, so that figures can be computed again without generating.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ifguide import schemas
from ifguide.artifacts import MANIFEST, Manifest, publish, read_manifest
from ifguide.config import Config, ConfigError, Input, ModelSource, config_from_mapping, to_mapping
from ifguide.corpus import list_chunks, pack, read_documents, tokenise
from ifguide.evaluation import last_word_accuracy, perplexity, sample_continuations
from ifguide.models import load_model, load_tokenizer
from ifguide.report import write_report
from ifguide.stages.build_query import make_classifier, read_prompt_rows
from ifguide.stages.report_data import report_data
from ifguide.stages.run import BASELINE, PENALISED, Run, connect
from ifguide.stages.shards import LEDGER, Pool, StageError, run_shards
from ifguide.telemetry import log
from ifguide.toxicity import LabelClassifier, PromptRow

VERB = "evaluate"
CONTINUATIONS = "continuations"


def evaluate(run: Run, *, dry_run: bool = False) -> Manifest | None:
    """Make `report/`.

    Raises:
        ConfigError: no prompts. FileNotFoundError: no model, or a missing input.
    """
    config = run.config.evaluate
    if config.prompts is None:
        raise ConfigError("evaluate.prompts: name a JSONL or Parquet file in RealToxicityPrompts' schema")
    if dry_run:
        log(
            VERB,
            f"would sample {config.continuations} x {config.max_new_tokens} tokens per prompt of {config.prompts.path}"
            f" and classify them with {config.classifier.name}",
        )
        return None
    models = models_to_evaluate(run)
    rows = chosen_prompts(run.config)
    inputs = {f"model/{name}": fingerprint for name, (_, fingerprint) in models.items()}
    for name, folder in (("mask", run.mask), ("scores", run.scores)):
        if (folder / MANIFEST).exists():
            inputs[name] = read_manifest(folder).fingerprint
    artifact = run.open(run.report, VERB, keys=("evaluate", "seed"), inputs=inputs)
    if artifact.manifest:
        log(VERB, f"complete: {run.report / 'index.html'}")
        return artifact.manifest
    connect(run.config)
    descriptors = _descriptors(run.config, list(models), len(rows))
    results = run_shards(
        VERB,
        descriptors,
        EvaluateModel,
        {
            "config": to_mapping(run.config),
            "models": {name: source for name, (source, _) in models.items()},
            "folder": str(run.report),
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
    generated = sum(result.get("continuations", 0) for result in results.values())
    expected = len(rows) * config.continuations * len(models)
    if generated != expected:
        raise StageError(f"{VERB}: {generated} continuations where {expected} were asked for")
    data, figures = report_data(run, list(models), rows, results)
    write_report(data, run.report)
    files = [run.report / "index.html", run.report / "report.json", *(run.report / CONTINUATIONS).glob("*.parquet")]
    manifest = artifact.finish(
        files, rows={"continuations": generated, "prompts": len(rows)}, summary=figures, remove=(LEDGER,)
    )
    log(VERB, f"{len(models)} models on {len(rows)} prompts; report: {run.report / 'index.html'}")
    return manifest


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


def chosen_prompts(config: Config) -> list[PromptRow]:
    """The prompts to use: all, or `max_prompts` drawn by seed; ascending by row."""
    assert config.evaluate.prompts is not None
    rows = read_prompt_rows(config.evaluate.prompts, "evaluate.prompts")
    limit = config.evaluate.max_prompts
    if limit is None or limit >= len(rows):
        return rows
    chosen = np.sort(np.random.default_rng(config.seed).choice(len(rows), size=limit, replace=False))
    return [rows[i] for i in chosen]


def _descriptors(config: Config, models: list[str], num_prompts: int) -> list[dict[str, Any]]:
    """All pieces of work, model by model, so that an actor seldom changes its model."""
    size = config.evaluate.prompts_per_shard
    pieces: list[dict[str, Any]] = []
    for model in models:
        if config.evaluate.heldout:
            pieces.append({"key": f"{model}-heldout", "model": model, "kind": "heldout"})
        if config.evaluate.cloze:
            pieces.append({"key": f"{model}-cloze", "model": model, "kind": "cloze"})
        for start in range(0, num_prompts, size):
            piece = {"kind": "prompts", "start": start, "stop": min(start + size, num_prompts)}
            pieces.append({"key": f"{model}-{start:07d}", "model": model, **piece})
    pieces.append({"key": "prompt-groups", "model": None, "kind": "groups"})
    return pieces


class EvaluateModel:
    """Worker: one piece of the evaluation; keeps the last model it used."""

    def __init__(self, config: dict[str, Any], models: dict[str, str], folder: str):
        self.config = config_from_mapping(config)
        self.options = self.config.evaluate
        self.models, self.folder = models, Path(folder)
        self.rows = chosen_prompts(self.config)
        self.classifier = make_classifier(self.options.classifier, gpus=self.options.gpus_per_actor)
        self.loaded: tuple[str, Any, Any] | None = None

    def process(self, descriptor: dict[str, Any]) -> dict[str, Any]:
        if descriptor["kind"] == "groups":
            return {"flagged": self._flag_prompts()}
        model, tokenizer = self._load(descriptor["model"])
        if descriptor["kind"] == "prompts":
            return self._continue_prompts(descriptor, model, tokenizer)
        if descriptor["kind"] == "heldout":
            blocks_NT, lengths_N = self._heldout_blocks(tokenizer, model)
            held_out = perplexity(model, blocks_NT, lengths_N, batch_size=self.options.batch_size)
            return {"perplexity": held_out.perplexity, "tokens": held_out.tokens}
        assert self.options.cloze is not None
        texts = read_texts(self.options.cloze, "evaluate.cloze")
        result = last_word_accuracy(model, tokenizer, texts, batch_size=self.options.batch_size)
        return {"accuracy": result.accuracy, "total": result.total, "unusable": result.unusable}

    def _load(self, name: str) -> tuple[Any, Any]:
        if self.loaded is None or self.loaded[0] != name:
            self.loaded = None  # frees the old model before the new one is read
            source = self.models[name]
            device = "cuda" if self.options.gpus_per_actor else "cpu"
            model = load_model(ModelSource(source=source), device=device)
            self.loaded = (name, model, load_tokenizer(source))
        return self.loaded[1], self.loaded[2]

    def _flag_prompts(self) -> list[bool]:
        """Which prompts show the behaviour themselves: by their labels if all have one, else by the classifier."""
        primary = self.classifier.classes[0]
        labels = [row.prompt_scores.get(primary, row.prompt_scores.get("toxicity")) for row in self.rows]
        if all(label is not None for label in labels) or isinstance(self.classifier, LabelClassifier):
            scores = np.array([0.0 if label is None else label for label in labels])
        else:
            scores = self.classifier.score([row.prompt for row in self.rows])[primary]
        return (scores >= self.options.prompt_threshold).tolist()

    def _continue_prompts(self, descriptor: dict[str, Any], model: Any, tokenizer: Any) -> dict[str, Any]:
        rows = self.rows[descriptor["start"] : descriptor["stop"]]
        texts = sample_continuations(
            model,
            tokenizer,
            [row.prompt for row in rows],
            continuations=self.options.continuations,
            max_new_tokens=self.options.max_new_tokens,
            top_p=self.options.top_p,
            temperature=self.options.temperature,
            seed=self.config.seed,
            batch_size=self.options.batch_size * self.options.continuations,
            prompt_ids=[row.row for row in rows],
        )
        flat = [text for group in texts for text in group]
        scores = self.classifier.score(flat)
        names = self.classifier.classes
        repeat = np.repeat(np.arange(len(rows)), self.options.continuations)
        table = pa.Table.from_arrays(
            [
                pa.array([descriptor["model"]] * len(flat)),
                pa.array([rows[i].row for i in repeat], pa.int64()),
                pa.array(np.tile(np.arange(self.options.continuations), len(rows)), pa.int32()),
                pa.array([rows[i].prompt for i in repeat]),
                pa.array(flat, pa.string()),
                pa.array(
                    [[(name, float(scores[name][i])) for name in names] for i in range(len(flat))],
                    type=schemas.CONTINUATIONS.field("scores").type,
                ),
            ],
            schema=schemas.CONTINUATIONS,
        )
        with publish(self.folder / CONTINUATIONS / f"{descriptor['key']}.parquet") as part:
            pq.write_table(table, part)
        return {"continuations": len(flat)}

    def _heldout_blocks(self, tokenizer: Any, model: Any) -> tuple[np.ndarray, np.ndarray]:
        tokens = []
        for index, source in enumerate(self.options.heldout):
            documents = read_rows(source, f"evaluate.heldout[{index}]")
            tokens += [ids for ids, *_ in tokenise(documents, tokenizer, annotate=False)]
        positions = getattr(model.config, "max_position_embeddings", None) or self.config.pack_corpus.block_size
        total = sum(len(ids) for ids in tokens)
        if total < 2:
            raise ValueError("evaluate.heldout: the held-out documents have fewer than two tokens")
        return pack(
            tokens,
            skip=0,
            num_tokens=total,
            block_size=min(self.config.pack_corpus.block_size, positions),
            fill=tokenizer.eos_token_id,
        )


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
