"""The mask of a compared method, beside the run's own: found in the text, annotated, or random.

Methods that speak of text write the characters they mark, `spans-*.parquet`, and these become the mask, as for a
target with another tokenizer. A random mask has as many tokens in each shard as the run's own: of any types, of the
same, or other uses of the same. All are made by shards, and resumed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ifguide.config import ClassifierSource, to_mapping
from ifguide.config.compare import CLASSIFIED, RANDOM, WORDS
from ifguide.config.resources import Resources
from ifguide.distributed.shards import Pool, run_shards
from ifguide.distributed.tasks import run_tasks
from ifguide.methods.marks import (
    Find,
    find_classified_words,
    find_documents,
    find_sentences,
    find_words,
    mark_annotated_documents,
    mark_texts,
    whole_documents,
)
from ifguide.methods.random_masks import random_of_types, random_tokens
from ifguide.spans.filling import MaskShards, fill_mask
from ifguide.spans.tables import PackedCorpus, shard_name, write_mask_shard, write_spans
from ifguide.tokenizer import load_tokenizer
from ifguide.toxicity import LabelClassifier, make_classifier


@dataclass(frozen=True, kw_only=True)
class Marking:
    """What marks a corpus: a kind of `Method.mask`, and what the kinds need.

    `tokenizer` is the corpus' own. `gpus` is what one worker has, for the classifier."""

    kind: str
    words: tuple[str, ...]
    classifier: ClassifierSource
    threshold: float
    tokenizer: str
    seed: int
    gpus: float = 0.0

    def result_options(self) -> dict[str, Any]:
        """What decides the mask, besides the corpus."""
        options: dict[str, Any] = {"mask": self.kind}
        if self.kind in WORDS:
            options["words"] = list(self.words)
        if self.kind in CLASSIFIED:
            options |= {"classifier": to_mapping(self.classifier), "threshold": self.threshold}
            options["classifier"].pop("batch_size")
        if self.kind in RANDOM:
            options["seed"] = self.seed
        return options

    def finder(self) -> Find:
        """Of the kinds that read text."""
        if self.kind in WORDS:
            find = find_words(self.words)
            return whole_documents(find) if self.kind == "word_documents" else find
        classifier = make_classifier(self.classifier, gpus=self.gpus)
        assert not isinstance(classifier, LabelClassifier)
        finders = {"classified_words": find_classified_words, "sentences": find_sentences, "documents": find_documents}
        return finders[self.kind](partial(_primary, classifier), self.threshold)


def _primary(classifier: Any, texts: list[str]) -> np.ndarray:
    scores = np.asarray(classifier.score(texts)[classifier.classes[0]])
    if len(broken := np.flatnonzero(~np.isfinite(scores))):
        raise ValueError(
            f"{classifier.name} gives {scores[broken[0]]} for {texts[broken[0]][:80]!r}; it must be finite"
        )
    return scores


def mark_corpus(
    marking: Marking, corpus: PackedCorpus, folder: Path, own_mask: Path, *, verb: str, resources: Resources
) -> MaskShards:
    """Write the mask's shards, and its spans, in `folder`.

    `own_mask`: the run's, by whose shards a random mask is measured.

    Raises:
        StageError: a shard failed.
    """
    needed = replace(resources, gpus=resources.gpus if marking.kind in CLASSIFIED else 0.0)
    pool = Pool.filling_cluster(needed)
    shards = [MarkTask(key=f"mark-{shard_name(i)}", shard=i) for i in range(corpus.num_shards)]
    settings = MarkSettings(marking=replace(marking, gpus=needed.gpus), corpus=corpus, folder=folder, own_mask=own_mask)
    results = run_shards(verb, shards, MarkShard, settings, folder=folder, pool=pool, unit="shards marked")
    if marking.kind in RANDOM:
        list(run_tasks(needed)(write_spans, ((corpus, folder, shard) for shard in range(corpus.num_shards))))
        shared = sum(result["shared"] for result in results.values())
        return replace(MaskShards.of(results, corpus, verb), shared=shared)
    filled = fill_mask(corpus, folder, folder, verb=verb, pool=pool)
    return replace(filled, files={**results.files, **filled.files})


@dataclass(frozen=True, kw_only=True)
class MarkTask:
    """One shard of the corpus, by its number."""

    key: str
    shard: int


@dataclass(frozen=True, kw_only=True)
class MarkSettings:
    """Of `MarkShard`: the folder it writes in, and the run's own mask."""

    marking: Marking
    corpus: PackedCorpus
    folder: Path
    own_mask: Path


class MarkShard:
    """Worker: one shard of the corpus -> the spans that the method marks, or a random mask."""

    def __init__(self, settings: MarkSettings):
        self.marking, self.corpus, self.folder = settings.marking, settings.corpus, settings.folder
        self.own_mask = settings.own_mask
        if self.marking.kind in WORDS + CLASSIFIED:
            self.tokenizer = load_tokenizer(self.marking.tokenizer)
            self.find = self.marking.finder()

    def process(self, task: MarkTask) -> dict[str, Any]:
        shard = task.shard
        if self.marking.kind in RANDOM:
            return self._random(shard)
        if self.marking.kind == "annotated":
            counts = write_spans(self.corpus, self.corpus.folder, shard, column="annotated", folder=self.folder)
        elif self.marking.kind == "annotated_documents":
            counts = mark_annotated_documents(self.corpus, self.folder, shard)
        else:
            counts = mark_texts(self.corpus, self.folder, shard, self.tokenizer, self.find)
        return {"documents": counts.documents, "spans": counts.spans}

    def _random(self, shard: int) -> dict[str, Any]:
        """As many tokens as the run's own mask has in this shard, of any types or of the same; `shared` are in both."""
        begin, end = self.corpus.extent(shard)
        own = self.corpus.read(self.own_mask, "shard", "masked", begin, end)
        predicted = np.arange(len(own)) % self.corpus.block_size > 0
        rng = np.random.default_rng([self.marking.seed, shard])
        if self.marking.kind == "random":
            masked = random_tokens(own, predicted, rng)
        else:
            tokens = self.corpus.read(self.corpus.folder, "shard", "tokens", begin, end)
            others_first = self.marking.kind == "other_uses"
            masked = random_of_types(tokens, own, predicted, rng, others_first=others_first)
        counts = write_mask_shard(self.corpus, self.folder, shard, masked)
        return {**counts, "shared": int(np.count_nonzero(masked & own))}
