"""Continuations on disk, `generations/<model>/<prompt set>/`: an artifact for each, made once, scored at will.

Its plan holds what decides the text (sampling, seed, the model's fingerprint, the digest of the prompts) and nothing
of classifiers, so another classifier, or one model more, leaves it as it is. Shards are cut along the prompts' token
lengths, because prompts of one length share batches. A shard's file is published whole: it is there, or made again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ifguide import schemas
from ifguide.artifacts import (
    MANIFEST,
    Artifact,
    MismatchError,
    data_files,
    json_digest,
    open_artifact,
    publish,
    require,
)
from ifguide.artifacts.reading import is_trained
from ifguide.config import Evaluate
from ifguide.config.typed_yaml import result_part
from ifguide.distributed.shards import StageError
from ifguide.evaluation.generation import Guide, Sampling, decode, sample_tokens, token_lengths
from ifguide.evaluation.prompts import PROMPTS
from ifguide.evaluation.subjects import OF_MODEL, VERB, Evaluation, Prompts
from ifguide.storage import readable
from ifguide.tokenizer import load_tokenizer

OPTIONS = ("continuations", "max_new_tokens", "top_p", "temperature", "prompts_per_shard", "batch_size", "dtype")


@dataclass(frozen=True, kw_only=True)
class GenerationShard:
    """A piece of work: one file of a model's continuations of a prompt set, and their scores.

    `prompts` are the places in the set that it holds; a shard of a complete artifact has none, and the `sha256` that
    it must have."""

    model: str
    prompt_set: str
    number: int
    file: str
    prompts: tuple[int, ...] = ()
    sha256: str | None = None

    @property
    def key(self) -> str:
        own = f"{self.model}-{self.number:07d}"
        return own if self.prompt_set == PROMPTS else f"{own}-{self.prompt_set}"


def open_generations(evaluation: Evaluation) -> dict[tuple[str, str], Artifact]:
    """The artifact of each (model, prompt set).

    Raises:
        MismatchError: one was made with other sampling, another model or other prompts; names what differs.
        ValueError: a file of a complete one is missing or has another size.
    """
    return {(model, name): _open(evaluation, model, name) for model in evaluation.models for name in evaluation.sets}


def _open(evaluation: Evaluation, model: str, name: str) -> Artifact:
    folder = evaluation.generations[model] / name
    artifact = open_artifact(
        folder,
        verb=VERB,
        options={"seed": evaluation.seed, VERB: sampled_options(evaluation.options)},
        inputs={
            f"{OF_MODEL}{model}": evaluation.models[model].fingerprint,
            "prompts": prompts_digest(evaluation.sets[name]),
        },
        config_yaml=evaluation.config_yaml,
    )
    if artifact.manifest:
        require(folder, VERB)
    return artifact


def sampled_options(options: Evaluate) -> dict[str, Any]:
    """What decides the text of the continuations."""
    settings = result_part(options)
    return {name: settings[name] for name in OPTIONS if name in settings}


def has_generations(evaluation: Evaluation, model: str) -> bool:
    """Whether all continuations of a model are there, of these prompts and sampled as the options say."""
    if not all((evaluation.generations[model] / name / MANIFEST).exists() for name in evaluation.sets):
        return False
    try:
        for name in evaluation.sets:
            _open(evaluation, model, name)
    except MismatchError:
        return False
    return True


def takes_special_tokens(config: Evaluate, model: str) -> bool:
    """Whether a model's texts get its tokenizer's special tokens, as those that `evaluate.models` were trained on did.
    The run's own models, and those that another run trained, have read documents joined by EOS."""
    source = config.models.get(model)
    return source is not None and not is_trained(source)


def prompts_digest(prompts: Prompts) -> str:
    return json_digest([(row.row, row.prompt) for row in prompts])


def generation_shards(evaluation: Evaluation, artifacts: Mapping[tuple[str, str], Artifact]) -> list[GenerationShard]:
    """The shards of all artifacts, those of a complete one as its manifest lists them."""
    shards: list[GenerationShard] = []
    cuts: dict[tuple[str, bool, str], list[tuple[int, ...]]] = {}
    for (model, name), artifact in artifacts.items():
        if artifact.manifest:
            files = sorted(artifact.manifest.files.items())
            shards += [
                GenerationShard(model=model, prompt_set=name, number=number, file=file, sha256=entry["sha256"])
                for number, (file, entry) in enumerate(files)
            ]
            continue
        special = takes_special_tokens(evaluation.options, model)
        source = evaluation.models[model].source
        if (source, special, name) not in cuts:
            cuts[source, special, name] = _cut(evaluation, source, special, name)
        shards += [
            GenerationShard(
                model=model, prompt_set=name, number=number, file=f"shard-{number:05d}.parquet", prompts=prompts
            )
            for number, prompts in enumerate(cuts[source, special, name])
        ]
    return shards


def _cut(evaluation: Evaluation, source: str, special_tokens: bool, name: str) -> list[tuple[int, ...]]:
    """The places in a prompt set, by the number of the prompts' tokens, cut into shards."""
    prompts = [row.prompt for row in evaluation.sets[name]]
    lengths = token_lengths(load_tokenizer(source), prompts, special_tokens=special_tokens)
    order, size = np.argsort(lengths, kind="stable").tolist(), evaluation.options.prompts_per_shard
    return [tuple(order[start : start + size]) for start in range(0, len(order), size)]


def generate_shard(
    path: Path,
    model_name: str,
    model: Any,
    tokenizer: Any,
    prompts: Prompts,
    options: Evaluate,
    seed: int,
    guide: Guide | None = None,
) -> None:
    """Sample the continuations of `prompts`, under a guide or none, and publish them as `path`."""
    sampling = Sampling(
        continuations=options.continuations,
        max_new_tokens=options.max_new_tokens,
        top_p=options.top_p,
        temperature=options.temperature,
        seed=seed,
    )
    sampled = sample_tokens(
        model,
        tokenizer,
        [row.prompt for row in prompts],
        sampling,
        batch_size=options.batch_size * options.continuations,
        prompt_ids=[row.row for row in prompts],
        guide=guide,
        special_tokens=takes_special_tokens(options, model_name),
    )
    tokens = [row for rows in sampled for row in rows]
    repeat = np.repeat(np.arange(len(prompts)), options.continuations).tolist()
    table = pa.Table.from_arrays(
        [
            pa.array([model_name] * len(tokens), pa.string()),
            pa.array([prompts[i].row for i in repeat], pa.int64()),
            pa.array(np.tile(np.arange(options.continuations), len(prompts)), pa.int32()),
            pa.array([prompts[i].prompt for i in repeat], pa.string()),
            pa.array(decode(tokenizer, tokens), pa.string()),
            pa.array(tokens, schemas.GENERATIONS.field("tokens").type),
        ],
        schema=schemas.GENERATIONS,
    )
    with publish(path) as part:
        pq.write_table(table, part)


def finish_generations(evaluation: Evaluation, artifacts: Mapping[tuple[str, str], Artifact]) -> None:
    """Publish the manifests of those that are not complete yet.

    Raises:
        StageError: one holds another number of continuations than was asked for.
    """
    for (model, name), artifact in artifacts.items():
        if artifact.manifest:
            continue
        files = data_files(artifact.folder)
        count = sum(pq.read_metadata(readable(file)).num_rows for file in files)
        prompts = len(evaluation.sets[name])
        expected = prompts * evaluation.options.continuations
        if count != expected:
            raise StageError(
                f"{VERB}: {artifact.folder} holds {count} continuations where {expected} were asked for: delete it and"
                f" run {VERB} again"
            )
        artifact.finish(files, rows={"continuations": count, "prompts": prompts}, summary={"model": model})
