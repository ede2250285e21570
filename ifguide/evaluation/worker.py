"""What an actor of `evaluate` does: one piece after the other, of continuations, or of the probabilities of texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from ifguide import schemas
from ifguide.artifacts import publish, verify_digest
from ifguide.config import ConfigError, Evaluate, Input, ModelSource
from ifguide.corpus.packing import tokenise
from ifguide.evaluation import last_word_accuracy, perplexity, token_nll
from ifguide.evaluation.figures import fluency_file, scored_file
from ifguide.evaluation.generations import GenerationShard, generate_shard, takes_special_tokens
from ifguide.evaluation.harness import benchmarks
from ifguide.evaluation.metrics import THRESHOLD
from ifguide.evaluation.prompts import PROMPTS, chosen_sets, prompt_label
from ifguide.evaluation.reward_decoding import Guidance, RewardGuide
from ifguide.evaluation.reward_model import load_reward_model
from ifguide.evaluation.subjects import VERB, prompt_digests, require_same_texts, text_digests
from ifguide.evaluation.texts import heldout_blocks, read_rows, read_texts
from ifguide.models import load_model, max_positions
from ifguide.storage import local_copy
from ifguide.tokenizer import beginning_token, load_tokenizer
from ifguide.toxicity import make_classifier


@dataclass(frozen=True, kw_only=True)
class Fluency:
    """A piece of work: a model's perplexity of the held-out documents, its NLL of every token of the annotated ones, or
    its last words of the cloze texts."""

    model: str
    kind: Literal["heldout", "annotated", "cloze"]

    @property
    def key(self) -> str:
        return f"{self.model}-{self.kind}"


@dataclass(frozen=True, kw_only=True)
class PromptGroups:
    """A piece of work: which of `evaluate.prompts` show the behaviour themselves."""

    key: str = "prompt-groups"


@dataclass(frozen=True, kw_only=True)
class Harness:
    """A piece of work: a model's figures by lm-evaluation-harness."""

    model: str

    @property
    def key(self) -> str:
        return f"{self.model}-lm_eval"


Piece = GenerationShard | Fluency | PromptGroups | Harness


@dataclass(frozen=True, kw_only=True)
class WorkerSettings:
    """What every actor is told: `Evaluation` without its prompts, which an actor reads from their files, as it does
    documents and texts; their `digests` say whether they are the same."""

    options: Evaluate
    sources: Mapping[str, str]
    seed: int
    block_size: int
    digests: Mapping[str, str]
    report: Path
    generations: Mapping[str, Path]
    guides: Mapping[str, Guidance]


class EvaluateModel:
    """Worker: one piece of the evaluation; keeps the last model it used.

    Raises:
        ValueError: prompts or texts are not those that the evaluation was begun with; names the key.
    """

    def __init__(self, settings: WorkerSettings):
        self.settings, self.options = settings, settings.options
        self.sets = chosen_sets(settings.options, settings.seed)
        require_same_texts(prompt_digests(self.sets), settings.digests)
        gpus = self.options.resources.gpus
        self.classifier = make_classifier(self.options.classifier, gpus=gpus, dotted_key="evaluate.classifier")
        self.further = {
            name: make_classifier(source, gpus=gpus, dotted_key=f"evaluate.classifiers.{name}")
            for name, source in self.options.classifiers.items()
        }
        if both := set(self.classifier.classes) & set(self.further):
            name = min(both)
            raise ConfigError(
                f"evaluate.classifiers.{name}: is a class of evaluate.classifier too; choose another name"
            )
        self.loaded: tuple[str, Any, Any] | None = None
        self.reward: tuple[str, Any] | None = None

    def process(self, piece: Piece) -> dict[str, Any]:
        if isinstance(piece, PromptGroups):
            return self._flag_prompts()
        if isinstance(piece, GenerationShard):
            return self._continue_prompts(piece)
        if isinstance(piece, Harness):
            return self._benchmarks(piece)
        measures = {"heldout": self._heldout, "annotated": self._annotated, "cloze": self._cloze}
        return measures[piece.kind](piece)

    def _load(self, name: str) -> tuple[Any, Any]:
        if self.loaded is None or self.loaded[0] != name:
            self.loaded = None  # frees the old model before the new one is read
            source = self.settings.sources[name]
            dtype = getattr(torch, self.options.dtype)
            model = load_model(ModelSource(source=source), dtype=dtype, device=self._device)
            self.loaded = (name, model, load_tokenizer(source))
        return self.loaded[1], self.loaded[2]

    def _guide(self, name: str) -> RewardGuide | None:
        if name not in self.settings.guides:
            return None
        guidance = self.settings.guides[name]
        if self.reward is None or self.reward[0] != guidance.reward:
            self.reward = (guidance.reward, load_reward_model(local_copy(guidance.reward), device=self._device))
        return RewardGuide(model=self.reward[1], beta=guidance.beta, top_k=guidance.top_k)

    @property
    def _device(self) -> str:
        return "cuda" if self.options.resources.gpus else "cpu"

    def _flag_prompts(self) -> dict[str, Any]:
        """Which prompts show the behaviour themselves: by their label, or those that have none by the classifier; and
        how many each of the two has told."""
        primary, threshold = self.classifier.classes[0], self.options.prompt_threshold
        rows: list[Any] = list(self.sets[PROMPTS])
        name = prompt_label(self.options.classifier)
        labels = [row.prompt_scores.get(primary, row.prompt_scores.get(name)) for row in rows]
        flagged = np.array([label is not None and label >= threshold for label in labels])
        unlabelled = [i for i, label in enumerate(labels) if label is None]
        if unlabelled:
            flagged[unlabelled] = self.classifier.score([rows[i].prompt for i in unlabelled])[primary] >= threshold
        told = {"label": len(rows) - len(unlabelled), "classifier": len(unlabelled)}
        return {"flagged": flagged.tolist(), "grouped_by": told}

    def _continue_prompts(self, shard: GenerationShard) -> dict[str, Any]:
        """Generate a shard unless it is there, and publish it with its scores."""
        path = self.settings.generations[shard.model] / shard.prompt_set / shard.file
        if shard.sha256 is not None:
            verify_digest(path, shard.sha256, VERB)
        elif not path.exists():
            prompts = [self.sets[shard.prompt_set][i] for i in shard.prompts]
            model, tokenizer = self._load(shard.model)
            guide = self._guide(shard.model)
            generate_shard(path, shard.model, model, tokenizer, prompts, self.options, self.settings.seed, guide)
        table = schemas.read_table(path, schemas.GENERATIONS)
        scores = self._score(table.column("continuation").to_pylist())
        kind = schemas.CONTINUATIONS.field("scores").type
        maps = pa.MapArray.from_arrays(
            pa.array(np.arange(len(table) + 1, dtype=np.int32) * len(scores)),
            pa.array(list(scores) * len(table), kind.key_type),
            pa.array(np.stack(list(scores.values()), axis=1).reshape(-1), kind.item_type),
        ).cast(kind)
        scored = table.drop_columns(["tokens"]).append_column(schemas.CONTINUATIONS.field("scores"), maps)
        place = scored_file(self.settings.report, shard.model, shard.prompt_set, shard.number)
        with publish(place) as part:
            pq.write_table(scored.cast(schemas.CONTINUATIONS), part)
        return {"continuations": len(table)}

    def _score(self, texts: list[str]) -> dict[str, np.ndarray]:
        """Every class of the main classifier, then those of the further ones: by their name, or name:class."""
        scores = dict(self.classifier.score(texts))
        for name, classifier in self.further.items():
            for i, (label, values) in enumerate(classifier.score(texts).items()):
                scores[name if i == 0 else f"{name}:{label}"] = values
        return scores

    def _heldout(self, piece: Fluency) -> dict[str, Any]:
        model, _ = self._load(piece.model)
        tokenizer = load_tokenizer(self.settings.sources[piece.model], special_text=False)  # documents, as a corpus'
        width = self._width(model)
        blocks_NT, lengths_N, flagged_N = heldout_blocks(
            self._heldout_documents,
            tokenizer,
            width,
            special_tokens=takes_special_tokens(self.options, piece.model),
        )
        result = perplexity(model, blocks_NT, lengths_N, batch_size=self.options.batch_size)
        columns = [result.block_nll, result.block_tokens, flagged_N.astype(bool)]
        self._publish(piece, pa.table(columns, schema=schemas.HELDOUT))
        return {"perplexity": result.perplexity, "tokens": result.tokens}

    def _annotated(self, piece: Fluency) -> dict[str, Any]:
        model, _ = self._load(piece.model)
        tokenizer = load_tokenizer(self.settings.sources[piece.model], special_text=False)
        start = beginning_token(tokenizer) if takes_special_tokens(self.options, piece.model) else None
        encoded = tokenise(self._annotated_documents, tokenizer, annotate=True)
        documents = [tokens[:-1] for tokens, *_ in encoded]  # without the EOS, which no span can hold
        flags = [np.asarray(annotated)[:-1] for *_, annotated in encoded]
        annotated, total = int(sum(map(np.sum, flags))), sum(map(len, flags))
        if not 0 < annotated < total:
            raise ValueError(
                f"{VERB}.annotated: {annotated:,} of {total:,} tokens lie in a span; some must, and some must not: name"
                " the documents' spans_column, or add documents without spans"
            )
        nll = token_nll(
            model,
            documents,
            start=tokenizer.eos_token_id if start is None else start,
            width=self._width(model),
            batch_size=self.options.batch_size,
        )
        self._publish(piece, pa.table([documents, flags, nll], schema=schemas.ANNOTATED))
        return {"tokens": total, "annotated": annotated}

    def _width(self, model: Any) -> int:
        """Of blocks and pieces of documents, in tokens."""
        return min(self.settings.block_size, max_positions(model))

    def _cloze(self, piece: Fluency) -> dict[str, Any]:
        model, tokenizer = self._load(piece.model)
        special_tokens = takes_special_tokens(self.options, piece.model)
        result = last_word_accuracy(
            model, tokenizer, self._cloze_texts, batch_size=self.options.batch_size, special_tokens=special_tokens
        )
        self._publish(piece, pa.table([result.word_correct, result.token_correct], schema=schemas.CLOZE))
        return {"accuracy": result.accuracy, "total": result.total, "unusable": result.unusable}

    def _benchmarks(self, piece: Harness) -> dict[str, Any]:
        model, _ = self._load(piece.model)
        return benchmarks(
            model,
            load_tokenizer(self.settings.sources[piece.model]),  # one of its own: the harness may change it
            self.options.lm_eval,
            batch_size=self.options.batch_size,
            seed=self.settings.seed,
            special_tokens=takes_special_tokens(self.options, piece.model),
        )

    def _publish(self, piece: Fluency, table: pa.Table) -> None:
        with publish(fluency_file(self.settings.report, piece.model, piece.kind)) as part:
            pq.write_table(table, part)

    @cached_property
    def _heldout_documents(self) -> tuple[list[Any], list[Any]]:
        """The held-out documents that the classifier does not flag, and those it does, each in order."""
        documents = self._documents("heldout", self.options.heldout)
        texts = [document.text for document in documents]
        flagged = self.classifier.score(texts)[self.classifier.classes[0]] >= THRESHOLD
        kinds: tuple[list[Any], list[Any]] = ([], [])
        for document, kind in zip(documents, flagged, strict=True):
            kinds[int(kind)].append(document)
        return kinds

    @cached_property
    def _annotated_documents(self) -> list[Any]:
        return self._documents("annotated", self.options.annotated)

    def _documents(self, kind: str, sources: Sequence[Input]) -> list[Any]:
        documents = [row for i, source in enumerate(sources) for row in read_rows(source, f"evaluate.{kind}[{i}]")]
        require_same_texts(text_digests(self.options, kind), self.settings.digests)
        return documents

    @cached_property
    def _cloze_texts(self) -> list[str]:
        assert self.options.cloze is not None
        texts = read_texts(self.options.cloze, "evaluate.cloze")
        require_same_texts(text_digests(self.options, "cloze"), self.settings.digests)
        return texts
