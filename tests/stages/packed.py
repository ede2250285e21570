"""A run directory with a corpus and a mask and nothing else, made without Ray in a tenth of a second."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ifguide import schemas
from ifguide.artifacts import open_artifact
from ifguide.config import config_from_mapping, result_options, to_mapping
from ifguide.run import Run
from ifguide.tokenizer import train_tokenizer
from ifguide.training.settings import TrainingSettings

BLOCK_SIZE, BLOCKS = 32, 168
WORDS = ("the", "pig", "saw", "a", "calm", "clown", "and", "said", "that", "all", "was", "well")


def packed_run(
    folder: Path, pretrain: dict[str, Any], *, architecture: dict[str, Any], masked_share: float | None = None
) -> Run:
    """A corpus of sentences of random words, and the config to train on it on a CPU. The word `clown` is masked, or any
    token with a chance of `masked_share`."""
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, size=12, p=_zipf(len(WORDS)))) for _ in range(BLOCKS * 4)]
    tokenizer = train_tokenizer(texts, vocab_size=300)
    tokenizer.save_pretrained(folder / "tokenizer")
    documents = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in texts]
    stream = [token for document in documents for token in document]
    tokens_NT = np.array(stream[: BLOCKS * BLOCK_SIZE], dtype=np.int32).reshape(BLOCKS, BLOCK_SIZE)
    lengths_N = np.full(BLOCKS, BLOCK_SIZE, dtype=np.int32)
    lengths_N[-1] = BLOCK_SIZE // 2
    config = config_from_mapping(
        {
            "run_dir": str(folder / "run"),
            "tokenizer": str(folder / "tokenizer"),
            "target": {"architecture": architecture},
            "cluster": {"num_cpus": 2},
            "pack_corpus": {"block_size": BLOCK_SIZE},
            "pretrain": {
                "batch_blocks": 16,
                "micro_batch_blocks": 4,
                "learning_rate": 0.01,
                "dtype": "float32",
                "resources": {"gpus": 0},
                "log_steps": 1,
                **pretrain,
            },
        }
    )
    run = Run(config=config)
    clown = tokenizer(" clown")["input_ids"][-1]
    chosen_NT = tokens_NT == clown if masked_share is None else rng.random(tokens_NT.shape) < masked_share
    masked_NT = chosen_NT & (np.arange(BLOCK_SIZE) >= 1) & (np.arange(BLOCK_SIZE) < lengths_N[:, None])
    columns = {
        "length": pa.array(lengths_N),
        "tokens": schemas.per_token_column(tokens_NT, schemas.blocks(BLOCK_SIZE, annotated=False), "tokens"),
    }
    extra = {"documents-00000.parquet": _documents([len(document) for document in documents])}
    corpus = _publish(
        run, run.corpus, "pack_corpus", schemas.blocks(BLOCK_SIZE, annotated=False), columns, {}, {}, extra
    )
    column = schemas.per_token_column(masked_NT, schemas.mask(BLOCK_SIZE), "masked")
    counts = {"tokens_masked": int(masked_NT.sum()), "predicted_tokens": int(lengths_N.sum()) - BLOCKS}
    _publish(run, run.mask, "build_mask", schemas.mask(BLOCK_SIZE), {"masked": column}, {"corpus": corpus}, counts, {})
    return run


def _publish(
    run: Run,
    folder: Path,
    verb: str,
    schema: pa.Schema,
    columns: dict[str, pa.Array],
    inputs: dict[str, str],
    counts: dict[str, int],
    extra: dict[str, pa.Table],
) -> str:
    artifact = open_artifact(
        folder, verb=verb, options=result_options(run.config, (verb,)), inputs=inputs, config_yaml=""
    )
    whole = pa.table({"block_id": pa.array(np.arange(BLOCKS)), **columns}, schema=schema)
    files = [folder / "shard-00000.parquet", folder / "shard-00001.parquet"]
    pq.write_table(whole.slice(0, 100), files[0])
    pq.write_table(whole.slice(100), files[1])
    for name, table in extra.items():
        pq.write_table(table, folder / name)
        files.append(folder / name)
    summary = {"block_size": BLOCK_SIZE, "tokenizer": run.config.tokenizer, **counts}
    rows = {"blocks": BLOCKS, "documents": 4 * BLOCKS, "tokens": BLOCKS * BLOCK_SIZE}
    return artifact.finish(files, rows=rows, summary=summary).fingerprint


def _documents(lengths: list[int]) -> pa.Table:
    """The table of documents of so many tokens, end to end."""
    starts = np.cumsum([0, *lengths[:-1]])
    columns = {
        "doc_id": np.arange(len(lengths)),
        "source": ["text"] * len(lengths),
        "row": np.arange(len(lengths)),
        "num_chars": np.array(lengths),
        "num_tokens": np.array(lengths),
        "token_start": starts,
        "block_id": starts // BLOCK_SIZE,
        "offset": (starts % BLOCK_SIZE).astype(np.int32),
    }
    return pa.table({name: pa.array(values) for name, values in columns.items()}, schema=schemas.DOCUMENTS)


def settings_of(run: Run, folder: Path, **changes: Any) -> TrainingSettings:
    """What a rank is given to train into `folder`, with `changes` of `pretrain`, or of the target's `architecture`."""
    tree = to_mapping(run.config)
    tree["target"]["architecture"] |= changes.pop("architecture", {})
    tree["pretrain"] |= changes
    config = config_from_mapping(tree)
    return TrainingSettings(
        name=folder.name,
        folder=str(folder),
        corpus=str(run.corpus),
        mask=str(run.mask),
        tokenizer=run.tokenizer_source,
        block_size=BLOCK_SIZE,
        target=config.target,
        train=config.pretrain,
        seed=config.seed,
    )


def _zipf(size: int) -> np.ndarray:
    weights = 1 / np.arange(1, size + 1)
    return weights / weights.sum()
