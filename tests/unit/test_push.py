"""What goes to the hub: the files of the manifest and a card with the figures, in one commit; a dry run sends none."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import CommitOperationAdd, ModelCard
from huggingface_hub.errors import HTTPError

from ifguide.artifacts import MismatchError, open_artifact, remove_tree
from ifguide.cli import main
from ifguide.push import planned_upload, send

CARD = """---
library_name: transformers
ifguide:
  training: {steps: 10}
---

# a model

AutoModelForCausalLM.from_pretrained("path/of/this/folder")
"""
CONFIG = """evaluate:
  prompts: {path: /data/prompts.jsonl.gz}
  prompt_sets: {bold: {path: "hf://AlexaAI/bold:train"}}
  heldout: [{path: texts.parquet}, {path: "hf://Salesforce/wikitext"}]
  cloze: null
"""


def figure(value: float | None) -> dict[str, Any]:
    return {"value": value, "low": 0.1, "high": 0.4, "n": 50}


def groups(*names: str) -> dict[str, Any]:
    of_class = {"toxicity": figure(0.25), "insult": figure(0.2)}
    return {"groups": {name: {"emt": of_class, "tp": of_class} for name in names}, "gaps": {}}


METRICS = {
    "confidence": 0.95,
    "evaluators": ["toxicity"],
    "models": {
        "penalised": {
            "sets": {"prompts": groups("all", "with toxicity"), "bold": groups("gender/women")},
            "perplexity": figure(31.5),
            "benign_perplexity": None,
            "last_word_accuracy": None,
            "last_token_accuracy": figure(None),
            "lm_eval": {"arc_easy": {"acc": figure(0.5)}},
        }
    },
}


def artifact(folder: Path, files: dict[str, str], inputs: Mapping[str, str] = {}, config: str = "") -> str:
    made = open_artifact(folder, verb="made", options={}, inputs=inputs, config_yaml=config)
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return made.finish([folder / name for name in files], rows={}, summary={}).fingerprint


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    files = {"hf/README.md": CARD, "hf/config.json": "{}", "hf/model.safetensors": "w" * 1000, "hf/tokenizer.json": "t"}
    model = artifact(tmp_path / "run" / "model" / "penalised", files)
    report = {"metrics.json": json.dumps(METRICS), "model_card.md": "## Evaluation: toxicity\n"}
    artifact(tmp_path / "run" / "report", report, {"model/penalised": model}, CONFIG)
    return tmp_path / "run"


class Hub:
    """The methods of the hub's API that are used."""

    def __init__(self, public: bool = False) -> None:
        self.private = not public
        self.made: list[tuple[str, bool]] = []
        self.commits: list[tuple[str, dict[str, bytes]]] = []

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> str:
        assert exist_ok
        self.made.append((repo_id, private))
        return f"https://huggingface.co/{repo_id}"

    def repo_info(self, repo_id: str) -> Hub:
        return self

    def create_commit(self, repo_id: str, operations: list[CommitOperationAdd], *, commit_message: str) -> None:
        assert commit_message
        contents = {}
        for each in operations:
            with each.as_file() as file:
                contents[each.path_in_repo] = file.read()
        self.commits.append((repo_id, contents))


def test_everything_goes_in_one_commit_with_the_figures_on_the_card(run_dir: Path) -> None:
    hub = Hub()
    upload = planned_upload(run_dir, "owner/calm", model="penalised", report="report")
    assert send(upload, private=True, api=hub) == "https://huggingface.co/owner/calm"
    assert hub.made == [("owner/calm", True)]
    ((repo, contents),) = hub.commits
    assert repo == "owner/calm"
    assert contents.keys() == {"README.md", "config.json", "model.safetensors", "tokenizer.json"}
    assert contents["model.safetensors"] == b"w" * 1000
    card = ModelCard(contents["README.md"].decode())
    assert 'from_pretrained("owner/calm")' in card.text
    assert card.text.rstrip().endswith("## Evaluation: toxicity")
    assert card.data.model_name == "calm"
    assert card.data.to_dict()["ifguide"] == {"training": {"steps": 10}}
    found = {(each.dataset_type, each.metric_type, each.metric_name): each for each in card.data.eval_results}
    assert found.keys() == {
        *(
            ("prompts", kind, f"{kind.upper()}, toxicity{of}")
            for kind in ("emt", "tp")
            for of in ("", ", with toxicity")
        ),
        *(("AlexaAI/bold", kind, f"{kind.upper()}, toxicity, gender/women") for kind in ("emt", "tp")),
        ("texts + Salesforce/wikitext", "perplexity", "perplexity"),
        ("arc_easy", "acc", "acc"),
    }
    emt = found["prompts", "emt", "EMT, toxicity"]
    assert (emt.metric_value, emt.metric_args) == (0.25, {"low": 0.1, "high": 0.4, "confidence": 0.95})


def test_a_public_repository_that_is_there_gets_nothing_unless_that_is_said(run_dir: Path) -> None:
    hub = Hub(public=True)
    upload = planned_upload(run_dir, "owner/calm", model="penalised", report="report")
    with pytest.raises(ValueError, match=r"owner/calm is there already and is public, .* push with --public"):
        send(upload, private=True, api=hub)
    assert hub.commits == []
    send(upload, private=False, api=hub)
    assert len(hub.commits) == 1


def test_a_dry_run_prints_what_would_be_sent(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["push", str(run_dir), "owner/calm", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("would make https://huggingface.co/owner/calm of 4 files:\n")
    assert "  model.safetensors (1,000 bytes)\n" in out
    assert "model-index:" in out


def test_a_model_that_was_not_evaluated_has_no_figures(run_dir: Path) -> None:
    remove_tree(run_dir / "report")
    upload = planned_upload(run_dir, "owner/calm", model="penalised", report="report")
    assert "model-index" not in upload.card


def test_a_card_that_was_written_with_credentials_is_sent_without(run_dir: Path) -> None:
    files = {"hf/README.md": CARD.replace("# a model", "# https://me:HUNTER2@host/a model")}
    artifact(run_dir / "model" / "baseline", files)
    sent = planned_upload(run_dir, "owner/calm", model="baseline", report="none").card
    assert "@host/a model" in sent
    assert "HUNTER" not in sent


def test_what_cannot_be_sent_is_refused(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["push", str(run_dir), "calm", "--dry-run"]) == 1
    assert capsys.readouterr().err == "ifguide push: calm: a repository is named owner/name\n"
    assert main(["push", str(run_dir), "owner/calm", "--model", "baseline", "--dry-run"]) == 1
    assert "run `ifguide pretrain` first" in capsys.readouterr().err
    (run_dir / "model" / "penalised" / "hf" / "tokenizer.json").write_text("T")
    with pytest.raises(ValueError, match="has changed since it was made"):
        planned_upload(run_dir, "owner/calm", model="penalised", report="report")


def test_figures_of_another_model_are_refused(run_dir: Path) -> None:
    remove_tree(run_dir / "report")
    artifact(run_dir / "report", {"metrics.json": "{}", "model_card.md": ""}, {"model/penalised": "another"}, CONFIG)
    with pytest.raises(MismatchError, match="evaluate this model again"):
        planned_upload(run_dir, "owner/calm", model="penalised", report="report")


def test_a_hub_that_is_not_reached_is_one_line(run_dir: Path) -> None:
    class Away(Hub):
        def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> str:
            raise HTTPError("no route to host")

    upload = planned_upload(run_dir, "owner/calm", model="penalised", report="report")
    with pytest.raises(OSError, match=r"owner/calm: the hub did not take it \(no route to host\)"):
        send(upload, private=True, api=Away())
