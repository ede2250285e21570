"""The config of the pipeline that `bench/gpu.py` runs, and its data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ifguide.demo.generate import SUMMARY, generate_demo

TINY = {"documents": 140, "vocab_size": 512, "queries": 40, "prompts": 20, "cloze": 10}
# The shape of Pythia-160M's layers, as on the first GPU run.
TARGET = {
    "model_type": "gpt_neox",
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "max_position_embeddings": 512,
}
TINY_TARGET = {
    **TARGET,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}


def data_of(folder: Path, *, small: bool) -> None:
    """The demo's documents, made once."""
    if not (folder / SUMMARY).exists():
        generate_demo(folder, seed=3, **(TINY if small else {}))


def pipeline_config(data: Path, run_dir: Path, *, small: bool) -> dict[str, Any]:
    """Everything in bfloat16 on one GPU, which two scoring actors share; `small`: float32 on a CPU, a few minutes."""
    gpu, half = ({"resources": {"gpus": 0 if small else share}} for share in (1, 0.5))
    dtype = "float32" if small else "bfloat16"
    return {
        "run_dir": str(run_dir),
        "tokenizer": str(data / "tokenizer"),
        "target": {"architecture": TINY_TARGET if small else TARGET},
        "cluster": {"num_cpus": 2} if small else {},
        "pack_corpus": {
            "inputs": [{"path": str(data / "corpus.jsonl"), "spans_column": "toxic_spans"}],
            "block_size": 64 if small else 512,
            "blocks_per_shard": 100,
        },
        "pretrain": {
            "epochs": 1 if small else 4,
            "batch_blocks": 16 if small else 32,
            "micro_batch_blocks": 4 if small else 32,
            "learning_rate": 0.003 if small else 6e-4,
            "dtype": dtype,
            "engine": "torch",
            "checkpoint_steps": 4 if small else 20,
            "log_steps": 4,
            **gpu,
        },
        "fit_factors": {"sample_blocks": 40 if small else 700, "data_partitions": 1 if small else 2, **half},
        "build_query": {
            "prompts": str(data / "queries.jsonl"),
            "classifier": "alt-profanity-check",
            "negative_threshold": 0.3,
            "partitions": 1 if small else 2,
            **half,
        },
        "score_corpus": {"min_actors": 1 if small else 2, "max_actors": 2, "fused": not small, **half},
        "build_mask": {"quantile": 0.97, "max_fraction": 0.02},
        "evaluate": {
            "prompts": str(data / "prompts.jsonl"),
            "max_prompts": 10 if small else 100,
            "classifier": "alt-profanity-check",
            "continuations": 3 if small else 25,
            "max_new_tokens": 6 if small else 20,
            "heldout": [str(data / "heldout.jsonl")],
            "cloze": str(data / "cloze.jsonl"),
            "actors": 1,
            **gpu,
        },
        "compare": {
            "methods": {"dpo": {"dpo": {"model": "baseline", "pairs_per_prompt": 2, "learning_rate": 1.0e-4}}},
            "samples": {"continuations": 4 if small else 16},
        },
    }
