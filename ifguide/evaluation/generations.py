"""Continuations on disk, `generations/<model>/<prompt set>/`: an artifact for each, made once, scored at will.

Its plan holds what decides the text (sampling, seed, the model's fingerprint, the digest of the prompts) and nothing
of classifiers, so another classifier, or one model more, leaves it as it is. Shards are cut along the prompts' token
lengths, because prompts of one length share batches. A shard's file is published whole: it is there, or made again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ifguide import schemas
from ifguide.artifacts import MANIFEST, Artifact, MismatchError, data_files, json_digest, publish, require
from ifguide.config import Evaluate
from ifguide.distributed.shards import StageError
from ifguide.evaluation.generation import Guide, Sampling, decode, sample_tokens, token_lengths
from ifguide.run import Run
from ifguide.storage import readable
from ifguide.tokenizer import load_tokenizer

VERB = "evaluate"
OPTIONS = ("continuations", "max_new_tokens", "top_p", "temperature", "prompts_per_shard", "batch_size")

Prompts = Sequence[Any]  # with `row` and `prompt`


def open_generations(
    run: Run, models: Mapping[str, tuple[str, str]], sets: Mapping[str, Prompts]
) -> dict[tuple[str, str], Artifact]:
    """The artifact of each (model, prompt set).

    Raises:
        MismatchError: one was made with other sampling, another model or other prompts; names what differs.
        ValueError: a file of a complete one is missing or has another size.
    """
    options = {name: getattr(run.config.evaluate, name) for name in OPTIONS}
    found = {}
    for model, (_, fingerprint) in models.items():
        for name, prompts in sets.items():
            folder = run.generations(model) / name
            artifact = run.open(
                folder,
                VERB,
                keys=("seed",),
                inputs={f"model/{model}": fingerprint, "prompts": prompts_digest(prompts)},
                extra={"evaluate": options},
            )
            if artifact.manifest:
                require(folder, VERB)
            found[model, name] = artifact
    return found


def has_generations(run: Run, model: str, fingerprint: str, sets: Mapping[str, Prompts]) -> bool:
    """Whether the run has all continuations of a model, of these prompts and sampled as its config says."""
    if not all((run.generations(model) / name / MANIFEST).exists() for name in sets):
        return False
    try:
        open_generations(run, {model: ("", fingerprint)}, sets)
    except MismatchError:
        return False
    return True


def takes_special_tokens(config: Evaluate, model: str) -> bool:
    """Whether a model's texts get its tokenizer's special tokens, as those that `evaluate.models` were trained on did.
    The run's own models have read documents joined by EOS."""
    return model in config.models


def prompts_digest(prompts: Prompts) -> str:
    return json_digest([(row.row, row.prompt) for row in prompts])


def generation_pieces(
    artifacts: Mapping[tuple[str, str], Artifact],
    sources: Mapping[str, str],
    sets: Mapping[str, Prompts],
    config: Evaluate,
) -> list[dict[str, Any]]:
    """A descriptor for each shard: `model`, `set`, `file`, `number`, and the `prompts` (places in the set) it holds.

    Shards of a complete artifact have the `sha256` to be verified instead, and no prompts."""
    pieces: list[dict[str, Any]] = []
    lengths: dict[tuple[str, bool, str], list[int]] = {}
    for (model, name), artifact in artifacts.items():
        shards: list[dict[str, Any]]
        if artifact.manifest:
            files = sorted(artifact.manifest.files.items())
            shards = [{"file": file, "sha256": entry["sha256"], "prompts": None} for file, entry in files]
        else:
            special = takes_special_tokens(config, model)
            key = (sources[model], special, name)
            if key not in lengths:
                tokenizer = load_tokenizer(sources[model])
                prompts = [row.prompt for row in sets[name]]
                lengths[key] = token_lengths(tokenizer, prompts, special_tokens=special)
            order, size = np.argsort(lengths[key], kind="stable").tolist(), config.prompts_per_shard
            cuts = [order[start : start + size] for start in range(0, len(order), size)]
            shards = [
                {"file": f"shard-{number:05d}.parquet", "sha256": None, "prompts": cut}
                for number, cut in enumerate(cuts)
            ]
        pieces += [{"model": model, "set": name, "number": number, **shard} for number, shard in enumerate(shards)]
    return pieces


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


def finish_generations(
    artifacts: Mapping[tuple[str, str], Artifact], sets: Mapping[str, Prompts], continuations: int
) -> None:
    """Publish the manifests of those that are not complete yet.

    Raises:
        StageError: one holds another number of continuations than was asked for.
    """
    for (model, name), artifact in artifacts.items():
        if artifact.manifest:
            continue
        files = data_files(artifact.folder)
        count = sum(pq.read_metadata(readable(file)).num_rows for file in files)
        expected = len(sets[name]) * continuations
        if count != expected:
            raise StageError(
                f"{VERB}: {artifact.folder} holds {count} continuations where {expected} were asked for: delete it and"
                f" run {VERB} again"
            )
        artifact.finish(files, rows={"continuations": count, "prompts": len(sets[name])}, summary={"model": model})
