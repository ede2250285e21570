"""What an evaluation is of: models by their files or commit, prompts and texts by content, and which model is first."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import GPTNeoXForCausalLM, PreTrainedTokenizerFast

from ifguide import models
from ifguide.artifacts import Manifest, write_json
from ifguide.config import ClassifierSource, ConfigError, Evaluate, PromptSet, config_from_mapping
from ifguide.evaluation.prompts import chosen_prompts, chosen_sets, prompt_label
from ifguide.evaluation.subjects import Model, measured_inputs, models_to_evaluate
from ifguide.evaluation.worker import EvaluateModel, Fluency, PromptGroups, WorkerSettings
from ifguide.models import source_fingerprint

# ---- models ----------------------------------------------------------------------------------------------


def model_folder(folder: Path, weights: bytes = b"abcd") -> str:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(weights)
    return str(folder)


def test_a_local_model_is_told_by_its_files(tmp_path: Path) -> None:
    found = source_fingerprint(model_folder(tmp_path / "a"))
    assert source_fingerprint(model_folder(tmp_path / "b")) == found
    (tmp_path / "b" / ".cache").mkdir()
    (tmp_path / "b" / ".cache" / "download.lock").write_text("now")
    assert source_fingerprint(str(tmp_path / "b")) == found
    assert source_fingerprint(model_folder(tmp_path / "a", weights=b"abce")) != found  # retrained in place
    (tmp_path / "b" / "model.safetensors").rename(tmp_path / "b" / "other.safetensors")
    assert source_fingerprint(str(tmp_path / "b")) != found
    gguf = tmp_path / "one.gguf"
    gguf.write_bytes(b"weights")
    before = source_fingerprint(str(gguf))
    gguf.write_bytes(b"weightz")
    assert source_fingerprint(str(gguf)) != before
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        source_fingerprint(str(tmp_path / "missing"))


def test_a_hub_model_is_told_by_its_commit_or_by_name_with_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def snapshot(source: str, name: str, revision: str | None) -> str:
        return f"/cache/models--{source.replace('/', '--')}/snapshots/{revision or commit}/{name}"

    monkeypatch.setattr(models, "hf_hub_download", snapshot)
    for commit in ("1" * 40, "2" * 40):
        assert source_fingerprint("owner/name") == commit
    assert source_fingerprint("owner/name", "3" * 40) == "3" * 40

    def unreachable(source: str, name: str, revision: str | None) -> str:
        raise OSError("no hub")

    monkeypatch.setattr(models, "hf_hub_download", unreachable)
    with caplog.at_level(logging.WARNING):
        assert source_fingerprint("owner/name") == source_fingerprint("owner/name") != source_fingerprint("owner/other")
        assert source_fingerprint("owner/name", "main") != source_fingerprint("owner/name", "step3")
    assert "owner/name is told by its name" in caplog.text


def finished_model(folder: Path, name: str) -> None:
    fields: dict[str, Any] = {"options": {}, "inputs": {}, "rows": {}, "summary": {}, "files": {}, "environment": {}}
    manifest = Manifest(verb="pretrain", fingerprint=f"of {name}", created="", seconds=0.0, **fields)
    folder.mkdir(parents=True)
    write_json(folder / "manifest.json", manifest.__dict__)


def test_the_baseline_is_first_and_without_one_what_is_given(tmp_path: Path) -> None:
    given = {"original": model_folder(tmp_path / "given")}
    own = {name: tmp_path / "model" / name for name in ("baseline", "penalised")}
    finished_model(own["penalised"], "penalised")
    assert list(models_to_evaluate(own, given)) == ["original", "penalised"]  # as in configs/finetune.yaml
    finished_model(own["baseline"], "baseline")
    assert list(models_to_evaluate(own, given)) == ["baseline", "penalised", "original"]
    assert models_to_evaluate(own, given)["penalised"] == (str(own["penalised"] / "hf"), "of penalised")
    with pytest.raises(ConfigError, match=r"evaluate.models.baseline: this run has a model of that name"):
        models_to_evaluate(own, {"baseline": given["original"]})


def test_no_model_at_all_names_the_verb_that_makes_one(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"model holds no finished model; run `ifguide pretrain` first"):
        models_to_evaluate({"baseline": tmp_path / "model" / "baseline"}, {})


# ---- prompts and texts -----------------------------------------------------------------------------------


@pytest.fixture
def evaluated(tmp_path: Path) -> Callable[..., Evaluate]:
    """Options whose prompts have the given labels; two are the words `pig` and `plum`."""

    def make(*labels: float | None, heldout: str = "some text") -> Evaluate:
        rows = [
            {"prompt": {"text": ["a pig", "a plum"][i % 2], "toxicity": label}, "continuation": {"text": ""}}
            for i, label in enumerate(labels)
        ]
        files = {"prompts": rows, "heldout": [{"text": heldout}], "cloze": [{"text": "a b"}]}
        for name, content in files.items():
            (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
        (tmp_path / "words.txt").write_text("pig\n")
        paths = {name: str(tmp_path / f"{name}.jsonl") for name in files}
        section = {**paths, "heldout": [paths["heldout"]], "classifier": {"name": f"words:{tmp_path / 'words.txt'}"}}
        options = {**section, "resources": {"gpus": 0}, "prompt_threshold": 0.5}
        return config_from_mapping({"evaluate": options}).evaluate

    return make


def test_a_report_is_of_the_content_of_its_prompts_and_texts(evaluated: Callable[..., Evaluate]) -> None:
    def inputs(options: Evaluate) -> dict[str, str]:
        return measured_inputs({"a": Model("source", "its fingerprint")}, chosen_sets(options, seed=0), options)

    found = inputs(evaluated(0.1, 0.9))
    assert set(found) == {"model/a", "prompts/prompts", "heldout[0]", "cloze", "evaluate.classifier.words"}
    assert found["model/a"] == "its fingerprint"
    assert inputs(evaluated(0.1, 0.9)) == found
    edited = inputs(evaluated(0.1, 0.9, heldout="other text"))
    assert {name for name in found if edited[name] != found[name]} == {"heldout[0]"}
    relabelled = inputs(evaluated(0.1, 0.8))  # a label moves a prompt from one group to the other
    assert {name for name in found if relabelled[name] != found[name]} == {"prompts/prompts"}


def worker_settings(options: Evaluate, report: Path, **sources: str) -> WorkerSettings:
    """What the actors of an evaluation that is begun now are told."""
    return WorkerSettings(
        options=options,
        seed=0,
        block_size=8,
        sources=sources,
        report=report,
        generations={},
        guides={},
        digests=measured_inputs({}, chosen_sets(options, seed=0), options),
    )


def test_an_actor_refuses_other_prompts_and_texts_than_the_evaluation_was_begun_with(
    evaluated: Callable[..., Evaluate],
    tmp_path: Path,
    random_model: GPTNeoXForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    random_model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    options = evaluated(0.1, 0.9)
    (tmp_path / "more.jsonl").write_text('{"prompt": "a plum"}\n')
    options = replace(options, prompt_sets={"more": PromptSet(path=str(tmp_path / "more.jsonl"))})
    settings = worker_settings(options, tmp_path, a=str(tmp_path / "model"))

    def refused(key: str) -> AbstractContextManager[object]:
        message = rf"^evaluate\.{key}: the texts on this node are not those that this evaluation was begun with; sync"
        return pytest.raises(ValueError, match=message)

    fluency = {kind: Fluency(model="a", kind=kind) for kind in ("heldout", "cloze")}
    worker = EvaluateModel(settings)
    for piece in fluency.values():
        worker.process(piece)
    edited = evaluated(0.1, 0.9, heldout="other text")
    assert (edited.heldout, edited.cloze) == (options.heldout, options.cloze)
    (tmp_path / "cloze.jsonl").write_text('{"text": "a c"}\n')
    worker.process(fluency["heldout"])  # it has read them already
    worker = EvaluateModel(settings)
    for key, kind in ((r"heldout\[0\]", "heldout"), ("cloze", "cloze")):
        with refused(key):
            worker.process(fluency[kind])
    (tmp_path / "more.jsonl").write_text('{"prompt": "a pig"}\n')
    with refused(r"prompt_sets\.more"):
        EvaluateModel(settings)
    evaluated(0.1, 0.8)
    with refused("prompts"):
        EvaluateModel(settings)


def test_the_classifier_groups_the_prompts_without_a_label_alone(
    evaluated: Callable[..., Evaluate], tmp_path: Path
) -> None:
    for labels, flagged, by_classifier in (
        ((0.1, 0.9, 0.2, 0.6), [False, True, False, True], 0),
        ((0.1, 0.9, None, None, 0.2), [False, True, True, False, False], 2),
        ((None, None), [True, False], 2),
    ):
        worker = EvaluateModel(worker_settings(evaluated(*labels), tmp_path))
        told = {"label": len(labels) - by_classifier, "classifier": by_classifier}
        assert worker.process(PromptGroups()) == {"flagged": flagged, "grouped_by": told}


@pytest.fixture
def praised(tmp_path: Path) -> Callable[..., Evaluate]:
    """Prompts that are toxic or praise by their scores, and a classifier by whose words `plum` is praise."""

    def make(*scores: dict[str, float], **options: Any) -> Evaluate:
        texts = {"training": [{"text": "a plum", "praise": 1}, {"text": "a pig", "praise": 0}] * 9}
        texts["prompts"] = [{"prompt": {"text": "a pig", **score}, "continuation": {"text": ""}} for score in scores]
        for name, rows in texts.items():
            (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        training = {"path": str(tmp_path / "training.jsonl"), "label_column": "praise"}
        classifier = {"name": "fitted", "label": "praise", "training": [training]}
        section = {"prompts": str(tmp_path / "prompts.jsonl"), "classifier": classifier, "resources": {"gpus": 0}}
        return config_from_mapping({"evaluate": section | options}).evaluate

    return make


def test_prompts_are_balanced_by_the_classifier_s_own_label(praised: Callable[..., Evaluate]) -> None:
    rows = [{"praise": i % 2, "toxicity": 0.9 if i < 4 else 0.0} for i in range(8)]
    drawn = chosen_prompts(praised(*rows, balanced=True, max_prompts=6), seed=0)
    assert [row.prompt_scores["praise"] for row in drawn].count(1.0) == 3
    with pytest.raises(ConfigError, match=r"has 0 by their label 'praise'"):
        chosen_prompts(praised({"toxicity": 0.9}, {"toxicity": 0.1}, balanced=True, max_prompts=2), seed=0)


def test_prompts_are_not_grouped_by_the_label_of_another_behaviour(
    praised: Callable[..., Evaluate], tmp_path: Path
) -> None:
    options = praised({"toxicity": 0.9}, {"praise": 0.9, "toxicity": 0.1}, {"praise": 0.1, "toxicity": 0.9})
    groups = EvaluateModel(worker_settings(options, tmp_path)).process(PromptGroups())
    assert groups == {"flagged": [False, True, False], "grouped_by": {"label": 2, "classifier": 1}}


@pytest.mark.parametrize(("label", "name"), [(None, "toxicity"), ("praise", "praise"), ("LABEL_1", "toxicity")])
def test_a_prompt_s_score_is_named_as_the_classifier_s_label(label: str | None, name: str) -> None:
    assert prompt_label(ClassifierSource(name="hf:x", label=label)) == name
