"""A run with a corpus and a mask alone: what `export-mask` reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ifguide.artifacts import Manifest, open_artifact
from tests.sharded import write_corpus, write_mask_shards


def finish(
    folder: Path,
    verb: str,
    inputs: Mapping[str, str],
    *,
    rows: Mapping[str, int],
    options: Mapping[str, Any] = {},
    summary: Mapping[str, Any] = {},
    config_yaml: str = "seed: 0\n",
) -> Manifest:
    """A manifest over the files that lie in a folder."""
    files = sorted(folder.glob("*.parquet"))
    moved = [path.rename(folder.parent / path.name) for path in files]
    artifact = open_artifact(_emptied(folder), verb=verb, options=options, inputs=inputs, config_yaml=config_yaml)
    for path in moved:
        path.rename(folder / path.name)
    return artifact.finish(files, rows=rows, summary=summary)


def _emptied(folder: Path) -> Path:
    for path in folder.iterdir():
        path.unlink()
    return folder


def make_run(
    run_dir: Path,
    texts: Sequence[str],
    tokenizer: Any,
    *,
    block_size: int,
    blocks_per_shard: int,
    share: float = 0.1,
    config_yaml: str = "seed: 0\n",
) -> Path:
    """The run of these texts; a random `share` of their tokens is masked, the first of a block never."""
    shape = {"block_size": block_size, "blocks_per_shard": blocks_per_shard}
    packed, _ = write_corpus(run_dir / "corpus", texts, tokenizer, **shape)
    corpus = finish(
        run_dir / "corpus",
        "pack_corpus",
        {},
        rows={"blocks": packed.num_blocks, "documents": len(texts), "tokens": packed.num_tokens},
        options={"pack_corpus": {"inputs": [{"path": "texts.jsonl", "tokens_column": None}], **shape}},
        summary={"block_size": block_size, "tokenizer": "a tokenizer", "annotated": False},
    )
    masked = np.random.default_rng(0).random(packed.num_tokens) < share
    masked[::block_size] = False
    write_mask_shards(packed, run_dir / "mask", masked)
    rows = {"blocks": packed.num_blocks, "tokens": int(masked.sum())}
    inputs = {"corpus": corpus.fingerprint}
    finish(run_dir / "mask", "build_mask", inputs, rows=rows, config_yaml=config_yaml)
    return run_dir
