"""The model card of a trained model: README.md beside its weights, with where it comes from.

The front matter is what the Hugging Face hub reads, and under `ifguide:` every fingerprint and setting again, for
programs. The body says the same in a table. Only manifests are read. Names of models and inputs stand there without
credentials: a card is published.

It says nothing of quality or licence, which training does not know.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from ifguide.artifacts import MANIFEST, Manifest, read_manifest, write_text
from ifguide.config import Pretrain, redact, to_mapping
from ifguide.config.sources import HUB_PREFIX
from ifguide.display import markdown_table, plain_markdown
from ifguide.training.settings import TrainingSettings

CARD = "README.md"


def write_model_card(
    folder: Path,
    settings: TrainingSettings,
    *,
    sources: Sequence[str],
    corpus: Manifest,
    mask: Manifest | None,
    scores: Path,
    training: Mapping[str, Any],
) -> None:
    """Write `folder`/README.md.

    settings, corpus: what was trained, on what; sources: the names of the corpus' inputs. mask: None for a model
    without. scores: the folder of the run's scores, which name the proxy; it may be missing. training: steps, losses,
    parameters.
    """
    train = settings.train
    provenance = {
        "corpus": _corpus(corpus),
        **({"mask": _mask(mask, scores)} if mask else {}),
        "objective": _objective(train) if mask else {"kind": "none"},
        "training": {**_settings(settings), **training},
        "software": corpus.environment,
    }
    write_text(folder / CARD, card_text(settings, sources, provenance))


def card_text(settings: TrainingSettings, sources: Sequence[str], provenance: Mapping[str, Any]) -> str:
    """The card: YAML front matter, then Markdown."""
    sources, provenance = redact(sources), redact(provenance)
    datasets = [
        source.removeprefix(HUB_PREFIX).partition(":")[0] for source in sources if source.startswith(HUB_PREFIX)
    ]
    start = redact(settings.train.init_from)
    front: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["ifguide", "influence-functions", "penalised" if "mask" in provenance else "baseline"],
    }
    if datasets:
        front["datasets"] = datasets
    if start is not None and _is_hub_id(start):
        front["base_model"] = start
    front["ifguide"] = provenance
    header = yaml.safe_dump(front, sort_keys=False, allow_unicode=True)
    return f"---\n{header}---\n\n{_body(settings, provenance)}"


def _body(settings: TrainingSettings, provenance: Mapping[str, Any]) -> str:
    masked, target, start = provenance.get("mask"), settings.target, redact(settings.train.init_from)
    model = plain_markdown(redact(target.source) or (target.architecture or {}).get("model_type", "a model"))
    origin = f"fine-tuned from {plain_markdown(start)}" if start else "trained from scratch"
    what = (
        f"{masked['tokens_masked']:,} of its tokens, chosen by influence functions of a proxy, were penalised."
        if masked
        else "No token was penalised: this is the baseline."
    )
    return (
        f"# {model}, {'penalised' if masked else 'baseline'}\n\n"
        f"{model}, {origin} on {provenance['corpus']['tokens']:,} tokens by ifguide"
        f" (IF-Guide, [arXiv 2506.01790](https://arxiv.org/abs/2506.01790)). {what}\n\n"
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'model = AutoModelForCausalLM.from_pretrained("path/of/this/folder")\n'
        'tokenizer = AutoTokenizer.from_pretrained("path/of/this/folder")\n```\n\n'
        f"## Provenance\n\n{markdown_table(('', ''), _flat(provenance))}"
    )


def _corpus(corpus: Manifest) -> dict[str, Any]:
    return {
        "fingerprint": corpus.fingerprint,
        "tokenizer": corpus.summary["tokenizer"],
        **{name: corpus.rows[name] for name in ("documents", "tokens", "blocks")},
    }


def _mask(mask: Manifest, scores: Path) -> dict[str, Any]:
    entries: dict[str, Any] = {"fingerprint": mask.fingerprint, "inputs": mask.inputs}
    entries |= {key: mask.summary[key] for key in ("tokens_masked", "predicted_tokens", "behaviour", "tau", "unit")
              if key in mask.summary}  # fmt: skip
    entries |= {"options": mask.options["build_mask"]} if "build_mask" in mask.options else {}
    if (scores / MANIFEST).exists():
        scored = read_manifest(scores)
        if scored.fingerprint == mask.inputs.get("scores"):
            entries["proxy"] = scored.inputs.get("proxy")
            entries["query"] = scored.inputs.get("query")
    return entries


def _objective(train: Pretrain) -> dict[str, Any]:
    floor = {"floor_probability": train.objective.floor_probability} if train.objective.kind == "clipped" else {}
    return {"kind": train.objective.kind, "lambda": train.penalty, **floor}


def _settings(settings: TrainingSettings) -> dict[str, Any]:
    train = settings.train
    return {
        "initial_weights": train.init_from or "random",
        **({"lora": to_mapping(train.lora)} if train.lora else {}),
        "epochs": train.epochs,
        "tokens_per_step": train.batch_blocks * settings.block_size,
        "learning_rate": train.learning_rate,
        "weight_decay": train.weight_decay,
        "betas": list(train.betas),
        "dtype": train.dtype,
        "document_attention": train.document_attention,
        "seed": settings.seed,
    }


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        name = f"{prefix}.{key}" if prefix else key
        if isinstance(value, Mapping):
            yield from _flat(value, name)
        else:
            yield name, value if isinstance(value, int) else plain_markdown(str(value))


def _is_hub_id(source: str) -> bool:
    """owner/name, and no folder of that name here."""
    return source.count("/") == 1 and not source.startswith((".", "/", "~")) and not Path(source).exists()
