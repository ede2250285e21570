"""What an evaluation is of: models by their files or commit, prompts and texts by content, and which model is first."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from ifguide.artifacts import Manifest, write_json
from ifguide.config import config_from_mapping, to_mapping
from ifguide.evaluation import Bootstrap
from ifguide.evaluation.figures import _gaps
from ifguide.evaluation.prompts import chosen_sets
from ifguide.evaluation.worker import EvaluateModel
from ifguide.report import data as report_data
from ifguide.report.data import _sampled_documents
from ifguide.run import Run
from ifguide.stages import evaluate
from ifguide.stages.evaluate import measured_inputs, models_to_evaluate, source_fingerprint

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
    def snapshot(source: str, name: str) -> str:
        return f"/cache/models--{source.replace('/', '--')}/snapshots/{commit}/{name}"

    monkeypatch.setattr(evaluate, "hf_hub_download", snapshot)
    for commit in ("1" * 40, "2" * 40):
        assert source_fingerprint("owner/name") == commit

    def unreachable(source: str, name: str) -> str:
        raise OSError("no hub")

    monkeypatch.setattr(evaluate, "hf_hub_download", unreachable)
    with caplog.at_level(logging.WARNING):
        assert source_fingerprint("owner/name") == source_fingerprint("owner/name") != source_fingerprint("owner/other")
    assert "owner/name is told by its name" in caplog.text


def finished_model(run: Run, name: str) -> None:
    fields: dict[str, Any] = {"options": {}, "inputs": {}, "rows": {}, "summary": {}, "files": {}, "environment": {}}
    manifest = Manifest(verb="pretrain", fingerprint=f"of {name}", created="", seconds=0.0, **fields)
    run.model(name).mkdir(parents=True)
    write_json(run.model(name) / "manifest.json", manifest.__dict__)


def test_the_baseline_is_first_and_without_one_what_is_given(tmp_path: Path) -> None:
    models = {"original": model_folder(tmp_path / "given")}
    run = Run(config=config_from_mapping({"run_dir": str(tmp_path / "run"), "evaluate": {"models": models}}))
    finished_model(run, "penalised")
    assert list(models_to_evaluate(run)) == ["original", "penalised"]  # as in configs/finetune.yaml
    finished_model(run, "baseline")
    assert list(models_to_evaluate(run)) == ["baseline", "penalised", "original"]
    assert models_to_evaluate(run)["penalised"] == (str(run.model("penalised") / "hf"), "of penalised")


# ---- prompts and texts -----------------------------------------------------------------------------------


@pytest.fixture
def evaluated(tmp_path: Path) -> Callable[..., Run]:
    """A run whose prompts have the given labels; two are the words `pig` and `plum`."""

    def make(*labels: float | None, heldout: str = "some text") -> Run:
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
        return Run(
            config=config_from_mapping(
                {"run_dir": str(tmp_path), "evaluate": {**section, "resources": {"gpus": 0}, "prompt_threshold": 0.5}}
            )
        )

    return make


def test_a_report_is_of_the_content_of_its_prompts_and_texts(evaluated: Callable[..., Run]) -> None:
    def inputs(run: Run) -> dict[str, str]:
        return measured_inputs(run, {"a": ("source", "its fingerprint")}, chosen_sets(run.config))

    found = inputs(evaluated(0.1, 0.9))
    assert set(found) == {"model/a", "prompts/prompts", "heldout[0]", "cloze"}
    assert found["model/a"] == "its fingerprint"
    assert inputs(evaluated(0.1, 0.9)) == found
    edited = inputs(evaluated(0.1, 0.9, heldout="other text"))
    assert {name for name in found if edited[name] != found[name]} == {"heldout[0]"}
    relabelled = inputs(evaluated(0.1, 0.8))  # a label moves a prompt from one group to the other
    assert {name for name in found if relabelled[name] != found[name]} == {"prompts/prompts"}


def test_the_classifier_groups_the_prompts_without_a_label_alone(evaluated: Callable[..., Run]) -> None:
    for labels, flagged, by_classifier in (
        ((0.1, 0.9, 0.2, 0.6), [False, True, False, True], 0),
        ((0.1, 0.9, None, None, 0.2), [False, True, True, False, False], 2),
        ((None, None), [True, False], 2),
    ):
        run = evaluated(*labels)
        worker = EvaluateModel(to_mapping(run.config), {}, str(run.folder), {}, {})
        told = {"label": len(labels) - by_classifier, "classifier": by_classifier}
        assert worker.process({"kind": "groups"}) == {"flagged": flagged, "grouped_by": told}


# ---- gaps and samples ------------------------------------------------------------------------------------


def test_groups_of_one_size_do_not_share_their_draws() -> None:
    values = np.random.default_rng(0).random(40)
    part = {"emt/x": (values, np.ones(40)), "rep_4": (values, np.ones(40))}
    groups = {"all": part, "race/a": part, "race/b": part, "gender/c": part}
    bootstrap = Bootstrap(samples=200, seed=0)
    gaps = _gaps(groups, bootstrap)
    assert {domain: set(found) for domain, found in gaps.items()} == {"race": {"emt/x"}}
    found = gaps["race"]["emt/x"]
    assert (found.value, found.n) == (0, 80)
    assert found.samples.min() > 0  # with the same draws of the same values it would be zero in every replicate
    # models stay paired: the same groups have the same draws
    np.testing.assert_array_equal(_gaps(groups, bootstrap)["race"]["emt/x"].samples, found.samples)


def test_a_large_corpus_is_compared_in_documents_of_drawn_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = np.random.default_rng(0).integers(5, 60, 400)
    stops = np.cumsum(lengths)
    starts = stops - lengths
    block, blocks_per_shard = 16, 40
    first_blocks = list(range(0, -(-int(stops[-1]) // block), blocks_per_shard))
    view: Any = SimpleNamespace(block_size=block, first_blocks=first_blocks, files=first_blocks)

    def sampled(limit: int, seed: int = 0) -> list[range]:
        monkeypatch.setattr(report_data, "AGREEMENT_TOKENS", limit)
        return _sampled_documents(view, starts, stops, seed)

    assert sampled(int(stops[-1])) == [range(400)]
    shard = block * blocks_per_shard
    for limit in (int(stops[-1]) - 1, 5 * shard + 300, 200):
        parts = sampled(limit)
        documents = [i for part in parts for i in part]
        assert len(set(documents)) == len(documents)
        assert all(starts[i] // shard == (stops[i] - 1) // shard for i in documents)
        # but for what is cut off at the ends of the shards, the limit is used up
        assert limit - 60 * 2 * (limit // shard + 1) <= lengths[documents].sum() <= limit
    assert sampled(5 * shard) != sampled(5 * shard, seed=1)
    assert sampled(5 * shard) == sampled(5 * shard)
