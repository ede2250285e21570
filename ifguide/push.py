"""A trained model to the Hugging Face hub: `ifguide push RUN owner/name`.

What is sent is `model/<name>/hf` as its manifest lists it, each file by its digest, in one commit, so that nobody finds
half of it. Its card is the trained model's with the figures of the run's report: as `model-index` in its front matter,
which the hub shows and other programs read, and as the fragment that `evaluate` writes for it.

It says nothing of licence, which nobody told this program. Cost: files are streamed, none is copied.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import yaml
from huggingface_hub import CommitOperationAdd, EvalResult, HfApi
from huggingface_hub.errors import HTTPError
from huggingface_hub.repocard_data import eval_results_to_model_index

from ifguide.artifacts import MANIFEST, require, require_same, verified
from ifguide.artifacts.manifest import CONFIG
from ifguide.config import redact
from ifguide.config.sources import HUB_PREFIX
from ifguide.evaluation.figures import ANNOTATED_TITLES, FLUENCY_TITLES, METRICS, PERPLEXITIES
from ifguide.evaluation.prompts import PROMPTS
from ifguide.evaluation.subjects import OF_MODEL
from ifguide.folders import EXPORT, MODEL
from ifguide.storage import local_copy
from ifguide.telemetry import log
from ifguide.toxicity import WHOLE
from ifguide.training.model_card import CARD

VERB = "push"
PLACE = "path/of/this/folder"  # in a card: where its example loads the model from
FENCE = "---\n"  # around a card's front matter
FRAGMENT = "model_card.md"  # of the report


@dataclass(frozen=True, kw_only=True)
class Upload:
    """What a repository is to hold: `files` by their names in it, and its `card`."""

    repo: str
    files: Mapping[str, Path]
    card: str

    def lines(self) -> list[str]:
        """What a dry run prints."""
        sizes = {name: path.stat().st_size for name, path in self.files.items()}
        sizes[CARD] = len(self.card.encode())
        shown = [f"  {name} ({size:,} bytes)" for name, size in sorted(sizes.items())]
        return [f"would make https://huggingface.co/{self.repo} of {len(sizes)} files:", *shown, "", self.card]


def planned_upload(run_dir: Path, repo: str, *, model: str, report: str) -> Upload:
    """The upload of a model of a run; the figures are those of the folder `report`, where that is there.

    Raises:
        ValueError: `repo` is not owner/name; a file has changed since it was made. FileNotFoundError: there is no such
            finished model. MismatchError: the report is of another model.
    """
    owner, _, name = repo.partition("/")
    if not owner or not name or "/" in name:
        raise ValueError(f"{repo}: a repository is named owner/name")
    folder = run_dir / MODEL / model
    manifest = require(folder, "pretrain")
    files = {
        str(PurePosixPath(path).relative_to(EXPORT)): local_copy(verified(folder, path))
        for path in manifest.names(f"{EXPORT}/*")
    }
    card = redact(files.pop(CARD).read_text(encoding="utf-8"))  # those of before may hold credentials
    evaluated = run_dir / report
    if (evaluated / MANIFEST).exists():
        require_same(
            f"the model {model} of {evaluated}",
            require(evaluated, "evaluate").inputs.get(f"{OF_MODEL}{model}", "which it has not"),
            str(folder),
            manifest.fingerprint,
            "evaluate this model again, or name the folder of its report by --report",
        )
        card = _with_figures(card, evaluated, model, name)
    else:
        log(VERB, f"{evaluated} does not exist, so the card has no figures: `ifguide evaluate`", level=logging.WARNING)
    return Upload(repo=repo, files=files, card=card.replace(PLACE, repo))


def send(upload: Upload, *, private: bool, api: Any = None) -> str:
    """Make the repository, if there is none, and commit everything at once; returns its address.

    `api`: of `huggingface_hub.HfApi`'s methods `create_repo`, `repo_info` and `create_commit`; None: the hub's own.

    Raises:
        OSError: the hub cannot be reached, or refuses. ValueError: a `private` one is wanted, and one that is there
            already is not; nothing is sent then.
    """
    api = api or HfApi()
    operations = [
        CommitOperationAdd(path_in_repo=name, path_or_fileobj=path) for name, path in sorted(upload.files.items())
    ]
    operations.append(CommitOperationAdd(path_in_repo=CARD, path_or_fileobj=upload.card.encode()))
    try:
        address = api.create_repo(upload.repo, private=private, exist_ok=True)
        if private and not api.repo_info(upload.repo).private:  # one that was there stays as it was
            raise ValueError(
                f"{upload.repo} is there already and is public, so nothing was sent: name another repository, make that"
                " one private on its page, or push with --public"
            )
        api.create_commit(upload.repo, operations, commit_message="Upload a model trained by ifguide")
    except HTTPError as error:
        raise OSError(
            f"{upload.repo}: the hub did not take it ({error}); log in by `hf auth login`, or retry"
        ) from error
    return str(address)


def _with_figures(card: str, report: Path, model: str, name: str) -> str:
    _, front, body = card.split(FENCE, 2)
    metrics = json.loads(verified(report, METRICS).read_text(encoding="utf-8"))
    options = yaml.safe_load((report / CONFIG).read_text(encoding="utf-8"))["evaluate"]
    fields = yaml.safe_load(front) | {
        "model-index": eval_results_to_model_index(name, list(_results(metrics, options, model)))
    }
    header = yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)
    fragment = verified(report, FRAGMENT).read_text(encoding="utf-8")
    return f"{FENCE}{header}{FENCE}{body.rstrip()}\n\n{fragment}"


def _results(metrics: Mapping[str, Any], options: Mapping[str, Any], model: str) -> Iterator[EvalResult]:
    """A model's figures with intervals: of each set of prompts EMT and TP by each evaluator; benchmarks; of texts."""
    figures = metrics["models"][model]
    paths = {PROMPTS: options["prompts"]} | options.get("prompt_sets", {})
    for prompts, results in figures["sets"].items():
        for group, values in results["groups"].items():
            for kind in ("emt", "tp"):
                for label in metrics["evaluators"]:
                    title = f"{kind.upper()}, {label}" + ("" if group == WHOLE else f", {group}")
                    yield from _result(_dataset(paths[prompts]), kind, title, values[kind][label], metrics)
    for task, results in figures.get("lm_eval", {}).items():
        for metric, figure in results.items():
            yield from _result(task, metric, metric, figure, metrics)
    cloze, heldout = options.get("cloze"), options.get("heldout") or ()  # the perplexity is of all held-out texts
    annotated = options.get("annotated") or ()
    texts = {
        "accuracy": _dataset(cloze) if cloze else None,
        "perplexity": " + ".join(map(_dataset, heldout)) or None,
        "nats": " + ".join(map(_dataset, annotated)) or None,
    }
    for key, title in FLUENCY_TITLES.items():
        kind = "perplexity" if key in PERPLEXITIES else "nats" if key in ANNOTATED_TITLES else "accuracy"
        yield from _result(texts[kind], kind, title, figures.get(key), metrics)


def _dataset(source: Mapping[str, Any]) -> str:
    """How the card names a source: by its name on the hub, or its file's."""
    path = str(source["path"])
    if path.startswith(HUB_PREFIX):
        return path.removeprefix(HUB_PREFIX).partition(":")[0]
    return Path(path).name.partition(".")[0]


def _result(
    dataset: str | None,
    kind: str,
    title: str,
    figure: Mapping[str, Any] | None,
    metrics: Mapping[str, Any],
) -> Iterator[EvalResult]:
    """One figure; none where it was not measured."""
    value = (figure or {}).get("value")
    if dataset is None or figure is None or value is None or not math.isfinite(value):
        return
    yield EvalResult(
        task_type="text-generation",
        dataset_type=dataset,
        dataset_name=dataset,
        metric_type=kind,
        metric_value=value,
        metric_name=title,
        metric_args={"low": figure["low"], "high": figure["high"], "confidence": metrics["confidence"]},
    )
