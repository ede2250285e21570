"""What an actor of `evaluate` does: one piece after the other, of continuations, perplexity or last words."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ifguide import schemas
from ifguide.artifacts import publish, verify_digest
from ifguide.config import Input, ModelSource, config_from_mapping
from ifguide.corpus.packing import pack, tokenise
from ifguide.corpus.reading import list_chunks, read_documents
from ifguide.evaluation import last_word_accuracy, perplexity
from ifguide.evaluation.figures import FLUENCY, THRESHOLD, scored_file
from ifguide.evaluation.generations import VERB, generate_shard, takes_special_tokens
from ifguide.evaluation.prompts import PROMPTS, chosen_sets
from ifguide.evaluation.reward_decoding import RewardGuide
from ifguide.methods.reward_model import load_reward_model
from ifguide.models import load_model
from ifguide.storage import local_copy, location
from ifguide.tokenizer import load_tokenizer
from ifguide.toxicity import make_classifier


class EvaluateModel:
    """Worker: one piece of the evaluation; keeps the last model it used."""

    def __init__(
        self,
        config: dict[str, Any],
        models: dict[str, str],
        folder: str,
        generations: dict[str, str],
        guides: dict[str, dict[str, Any]],
    ):
        self.config = config_from_mapping(config)
        self.options = self.config.evaluate
        self.models, self.folder = models, location(folder)
        self.generations = {name: location(place) for name, place in generations.items()}
        self.guides = guides
        self.sets = chosen_sets(self.config)
        gpus = self.options.resources.gpus
        self.classifier = make_classifier(self.options.classifier, gpus=gpus)
        self.further = {name: make_classifier(source, gpus=gpus) for name, source in self.options.classifiers.items()}
        self.loaded: tuple[str, Any, Any] | None = None
        self.reward: tuple[str, Any] | None = None

    def process(self, descriptor: dict[str, Any]) -> dict[str, Any]:
        kind = descriptor["kind"]
        if kind == "groups":
            return self._flag_prompts()
        if kind == "prompts":
            return self._continue_prompts(descriptor)
        model, tokenizer = self._load(descriptor["model"])
        return (self._heldout if kind == "heldout" else self._cloze)(descriptor, model, tokenizer)

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
        return "cuda" if self.options.resources.gpus else "cpu"

    def _flag_prompts(self) -> dict[str, Any]:
        """Which prompts show the behaviour themselves: by their label, or those that have none by the classifier; and
        how many each of the two has told."""
        primary, threshold = self.classifier.classes[0], self.options.prompt_threshold
        rows: list[Any] = list(self.sets[PROMPTS])
        labels = [row.prompt_scores.get(primary, row.prompt_scores.get("toxicity")) for row in rows]
        flagged = np.array([label is not None and label >= threshold for label in labels])
        unlabelled = [i for i, label in enumerate(labels) if label is None]
        if unlabelled:
            flagged[unlabelled] = self.classifier.score([rows[i].prompt for i in unlabelled])[primary] >= threshold
        told = {"label": len(rows) - len(unlabelled), "classifier": len(unlabelled)}
        return {"flagged": flagged.tolist(), "grouped_by": told}

    def _continue_prompts(self, descriptor: dict[str, Any]) -> dict[str, Any]:
        """Generate a shard unless it is there, and publish it with its scores."""
        path = self.generations[descriptor["model"]] / descriptor["set"] / descriptor["file"]
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

    def _heldout(self, descriptor: dict[str, Any], model: Any, tokenizer: Any) -> dict[str, Any]:
        blocks_NT, lengths_N, flagged_N = self._heldout_blocks(tokenizer, model)
        result = perplexity(model, blocks_NT, lengths_N, batch_size=self.options.batch_size)
        table = pa.table([result.block_nll, result.block_tokens, flagged_N], schema=schemas.HELDOUT)
        with publish(self.folder / FLUENCY / f"{descriptor['key']}.parquet") as part:
            pq.write_table(table, part)
        return {"perplexity": result.perplexity, "tokens": result.tokens}

    def _cloze(self, descriptor: dict[str, Any], model: Any, tokenizer: Any) -> dict[str, Any]:
        assert self.options.cloze is not None
        texts = read_texts(self.options.cloze, "evaluate.cloze")
        special_tokens = takes_special_tokens(self.options, descriptor["model"])
        result = last_word_accuracy(
            model, tokenizer, texts, batch_size=self.options.batch_size, special_tokens=special_tokens
        )
        table = pa.table([result.word_correct, result.token_correct], schema=schemas.CLOZE)
        with publish(self.folder / FLUENCY / f"{descriptor['key']}.parquet") as part:
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
