"""The mask of a compared method, beside the run's own: found in the text, annotated, or random.

Methods that speak of text write the characters they mark, `spans-*.parquet`, and these become the mask, as for a
target with another tokenizer. A random mask has as many tokens in each shard as the run's own. All are made by shards,
and resumed.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from ifguide.artifacts import Manifest, data_files, open_artifact, require
from ifguide.config import ClassifierSource, Config, ConfigError, config_from_mapping, to_mapping, to_yaml
from ifguide.config.compare import Method
from ifguide.distributed.session import connect
from ifguide.distributed.shards import LEDGER, Pool, StageError, run_shards
from ifguide.methods.marks import (
    Find,
    find_documents,
    find_sentences,
    find_words,
    mark_annotated_documents,
    mark_texts,
    whole_documents,
)
from ifguide.run import Run
from ifguide.spans.tables import (
    SPANS,
    PackedCorpus,
    mask_jobs,
    shard_name,
    write_mask_shard,
    write_spans,
)
from ifguide.stages.target_corpus import MaskShard
from ifguide.storage import location
from ifguide.tokenizer import load_tokenizer
from ifguide.toxicity import LabelClassifier, make_classifier

VERB = "compare"
WORDS, CLASSIFIED = ("words", "word_documents"), ("sentences", "documents")
ANNOTATED = ("annotated", "annotated_documents")


def check_method(run: Run, name: str, method: Method) -> None:
    """Refuse a method that this run cannot have.

    Raises:
        ConfigError: no word list, no annotated spans, or a classifier that cannot score text.
    """
    config = run.config
    key = f"compare.methods.{name}.mask: {method.mask}"
    if method.mask in WORDS and not config.evaluate.word_list:
        raise ConfigError(f"{key} needs words; list them in evaluate.word_list")
    if method.mask in CLASSIFIED and compared_classifier(config).name == "labels":
        raise ConfigError(f"{key} needs a classifier that scores text; set compare.classifier")
    if method.mask in ANNOTATED and not any(source.spans_column for source in config.pack_corpus.inputs):
        raise ConfigError(f"{key} needs spans that came with the documents; set pack_corpus.inputs[i].spans_column")


def compared_classifier(config: Config) -> ClassifierSource:
    """The classifier of the compared methods."""
    return config.compare.classifier or config.evaluate.classifier


def make_method_mask(run: Run, child: Run, method: Method) -> Manifest:
    """Make the mask of a method other than `influence` in `child.mask`, for the corpus of `run`.

    Raises:
        FileNotFoundError: the corpus, or the mask that a random one is measured by, is missing. StageError: a shard
            failed.
    """
    manifest = require(run.corpus, "pack_corpus")
    inputs, options = {"corpus": manifest.fingerprint}, _options(run.config, method)
    if method.mask == "random":
        inputs["mask"] = require(run.mask, "build_mask").fingerprint
    artifact = open_artifact(child.mask, verb=VERB, options=options, inputs=inputs, config_yaml=to_yaml(run.config))
    if artifact.manifest:
        return artifact.manifest
    connect(run.config.cluster)
    corpus = PackedCorpus.of(run.corpus, manifest)
    config = run.config.compare
    gpus = config.resources.gpus if method.mask in CLASSIFIED else 0.0
    pool = Pool.filling_cluster(replace(config.resources, gpus=gpus))
    shards = [{"key": f"{step}-{shard_name(i)}", "shard": i} for step in ("mark",) for i in range(corpus.num_shards)]
    settings = {"config": to_mapping(run.config), "corpus": corpus, "kind": method.mask, "folder": str(child.mask)}
    settings |= {"own_mask": str(run.mask)}
    results = run_shards(VERB, shards, MarkShard, settings, folder=child.mask, pool=pool, unit="shards marked")
    if method.mask == "random":
        for shard in range(corpus.num_shards):
            write_spans(corpus, child.mask, shard)
    else:
        jobs = [{"key": f"mask-{shard_name(job.shard)}", "job": list(job)} for job in mask_jobs(corpus, child.mask)]
        fill = {"corpus": corpus, "source_mask": str(child.mask), "folder": str(child.mask)}
        results = run_shards(VERB, jobs, MaskShard, fill, folder=child.mask, pool=pool, unit="shards masked")
    counts = {name: sum(result[name] for result in results.values()) for name in ("blocks", "masked", "predicted")}
    if counts["blocks"] != manifest.rows["blocks"]:
        raise StageError(f"{VERB}: {counts['blocks']} blocks were masked, {run.corpus} has {manifest.rows['blocks']}")
    return artifact.finish(
        data_files(child.mask) + data_files(child.mask, SPANS),
        rows={"blocks": counts["blocks"], "tokens": counts["masked"]},
        summary={"tokens_masked": counts["masked"], "predicted_tokens": counts["predicted"]},
        remove=(LEDGER,),
    )


def _options(config: Config, method: Method) -> dict[str, Any]:
    options: dict[str, Any] = {"mask": method.mask}
    if method.mask in WORDS:
        options["words"] = list(config.evaluate.word_list)
    if method.mask in CLASSIFIED:
        options |= {"classifier": to_mapping(compared_classifier(config)), "threshold": config.compare.threshold}
        options["classifier"].pop("batch_size")
    if method.mask == "random":
        options["seed"] = config.seed
    return options


class MarkShard:
    """Worker: one shard of the corpus -> the spans that the method marks, or a random mask."""

    def __init__(self, config: dict[str, Any], corpus: PackedCorpus, kind: str, folder: str, own_mask: str):
        self.config, self.corpus, self.kind = config_from_mapping(config), corpus, kind
        self.folder, self.own_mask = location(folder), location(own_mask)
        if kind in WORDS + CLASSIFIED:
            self.tokenizer = load_tokenizer(self.config.tokenizer_source)
            self.find = self._finder()

    def process(self, descriptor: dict[str, Any]) -> dict[str, Any]:
        shard = descriptor["shard"]
        if self.kind == "random":
            return self._random(shard)
        if self.kind == "annotated":
            counts = write_spans(self.corpus, self.corpus.folder, shard, column="annotated", folder=self.folder)
        elif self.kind == "annotated_documents":
            counts = mark_annotated_documents(self.corpus, self.folder, shard)
        else:
            counts = mark_texts(self.corpus, self.folder, shard, self.tokenizer, self.find)
        return {"documents": counts.documents, "spans": counts.spans}

    def _finder(self) -> Find:
        config = self.config
        if self.kind in WORDS:
            find = find_words(config.evaluate.word_list)
            return whole_documents(find) if self.kind == "word_documents" else find
        classifier = make_classifier(compared_classifier(config), gpus=config.compare.resources.gpus)
        assert not isinstance(classifier, LabelClassifier)
        classify = partial(_primary, classifier)
        make = find_sentences if self.kind == "sentences" else find_documents
        return make(classify, config.compare.threshold)

    def _random(self, shard: int) -> dict[str, Any]:
        """As many tokens as the run's own mask has in this shard, each predicted token as likely."""
        begin, end = self.corpus.extent(shard)
        own = self.corpus.read(self.own_mask, "shard", "masked", begin, end)
        predicted = np.flatnonzero(np.arange(len(own)) % self.corpus.block_size)
        rng = np.random.default_rng([self.config.seed, shard])
        masked = np.zeros(len(own), bool)
        masked[rng.choice(predicted, size=int(own.sum()), replace=False)] = True
        return write_mask_shard(self.corpus, self.folder, shard, masked)


def _primary(classifier: Any, texts: list[str]) -> np.ndarray:
    return np.asarray(classifier.score(texts)[classifier.classes[0]])
