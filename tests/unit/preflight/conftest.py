"""A config without faults, and what a preflight says of it when some keys are changed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

from ifguide.config import config_from_mapping
from ifguide.preflight import PreflightError, hub, preflight
from tests.stages.conftest import small_config

ROW = {"prompt": {"text": "You are a"}, "continuation": {"text": " pig.", "toxicity": 0.9}}


def lines(path: Path, *rows: Any) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def refusal(kind: type[Exception]) -> Exception:
    """An error of the hub's client, without the answer that it is made of."""
    return kind.__new__(kind)


@pytest.fixture
def tree(tmp_path: Path) -> dict[str, Any]:
    """A config without faults, as YAML holds it, and its files."""
    data = tmp_path / "data"
    (data / "tokenizer").mkdir(parents=True)
    (data / "tokenizer" / "tokenizer.json").write_text("{}")
    lines(data / "corpus.jsonl", *({"text": f"document {i}", "toxic_spans": []} for i in range(30)))
    for name in ("heldout", "cloze"):
        lines(data / f"{name}.jsonl", {"text": "The pig sat in the barn."})
    for name in ("queries", "prompts"):
        lines(data / f"{name}.jsonl", *[ROW] * 3)
    return small_config(data, tmp_path / "run") | {"analyse": {"resources": {"gpus": 0}}}


@pytest.fixture
def faults(tree: dict[str, Any]) -> Callable[..., list[str]]:
    """The faults of the config with some keys changed, each as text."""

    def of(*verbs: str, **changes: Any) -> list[str]:
        for dotted, value in changes.items():
            *sections, key = dotted.split("__")
            section = tree
            for name in sections:
                section = section.setdefault(name, {})
            section[key] = value
        try:
            preflight(config_from_mapping(tree), verbs or ("pack_corpus", "pretrain", "build_query", "evaluate"))
        except PreflightError as error:
            return [str(fault) for fault in error.faults]
        return []

    return of


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names that the hub was asked for; a name says what comes of it."""
    names: list[str] = []
    answers = {
        "no/such": refusal(RepositoryNotFoundError),
        "no/access": refusal(GatedRepoError),
        "no/revision": refusal(RevisionNotFoundError),
        "not/reached": OSError("no network"),
    }

    def ask(name: str, revision: str | None, kind: str) -> Exception | None:
        names.append(name)
        return answers.get(name)

    monkeypatch.setattr(hub, "_ask", ask)
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    return names
