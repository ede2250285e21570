"""Metadata that is empty, cut, no JSON, of another type, without a key, NaN or far too large: every verb that reads it
ends in one line with the file's name, or goes on without it and says so; never in a traceback."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from ifguide.architecture import load_architecture
from ifguide.artifacts import PLAN, read_manifest, write_manifest
from ifguide.cli import main
from ifguide.config import ModelSource, to_mapping
from ifguide.distributed.ledger import LEDGER, Attempts, read_attempts
from ifguide.influence.decision import METHOD, Decision
from ifguide.influence.query_file import QUERIES, QueryRow, read_queries, write_queries
from ifguide.models import load_model
from ifguide.report.data import _curve
from ifguide.run import Run
from ifguide.telemetry import PROGRESS, last_progress, read_metrics
from ifguide.tokenizer import load_tokenizer
from tests.stages.packed import packed_run

ARCHITECTURE = {"model_type": "gpt_neox", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
                "intermediate_size": 64, "max_position_embeddings": 64}  # fmt: skip
NUMBER = re.compile(rb"(?<=: )[0-9][0-9.e+-]*")


def first_key(content: bytes) -> bytes:
    tree = json.loads(content)
    del tree[next(iter(tree))]
    return json.dumps(tree).encode()


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "cut": lambda content: content[: len(content) // 2],
    "no JSON": lambda content: b"{oops" + content,
    "no text": lambda content: b"\xff\xfe\x00" + content,
    "null": lambda content: b"null",
    "a list": lambda content: b"[1]",
    "a number": lambda content: b"7",
    "a text": lambda content: b'"text"',
    "no keys": lambda content: b"{}",
    "a key less": first_key,
    "NaN": lambda content: NUMBER.sub(b"NaN", content),
    "too large": lambda content: NUMBER.sub(b"1e999", content),
    "zeros": lambda content: bytes(len(content)),
    "deep": lambda content: b"[" * 100_000,
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A corpus and a mask; no proxy, no model."""
    return packed_run(tmp_path_factory.mktemp("metadata"), {"engine": "torch"}, architecture=ARCHITECTURE)


@pytest.fixture
def run_dir(made: Run, tmp_path: Path) -> Path:
    shutil.copytree(made.folder, tmp_path / "run")
    tree = {**to_mapping(made.config), "run_dir": str(tmp_path / "run")}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    return tmp_path / "run"


VERBS = {
    "show": ["show", "RUN"],
    "status": ["status", "RUN"],
    "inspect": ["inspect", "RUN"],
    "pretrain": ["pretrain", "--config", "CONFIG"],
    "baseline": ["pretrain", "--config", "CONFIG", "--set", "pretrain.use_mask=false"],
    "fit_factors": ["fit_factors", "--config", "CONFIG", "--no-preflight"],
    "score_corpus": ["score_corpus", "--config", "CONFIG", "--no-preflight"],
    "build_mask": ["build_mask", "--config", "CONFIG"],
    "export-scores": ["export-scores", "RUN", "RUN/out"],
}
READERS = {
    "corpus/manifest.json": ["show", "status", "pretrain", "baseline", "fit_factors", "score_corpus", "build_mask"],
    "mask/manifest.json": ["show", "status", "inspect", "pretrain"],
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize(("name", "verb"), [(name, verb) for name, verbs in READERS.items() for verb in verbs])
def test_a_damaged_manifest_is_named_by_every_verb(
    name: str, verb: str, damage: str, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run_dir / name
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    places = {"RUN": str(run_dir), "CONFIG": str(run_dir.parent / "config.yaml")}
    command = [re.sub("RUN|CONFIG", lambda found: places[found[0]], part) for part in VERBS[verb]]
    assert main(command) == 1
    errors = capsys.readouterr().err.strip().splitlines()
    said = [line for line in errors if line.startswith("ifguide ")]
    assert len(said) == 1
    assert str(path) in said[0]
    assert "run " in said[0] or "another version" in said[0]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_plan_is_named(damage: str, run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest, path = read_manifest(run_dir / "mask"), run_dir / "mask" / PLAN
    write = json.dumps({"verb": "build_mask", "options": manifest.options, "inputs": manifest.inputs, "rest": 1})
    path.write_bytes(DAMAGES[damage](write.encode()))
    (run_dir / "mask" / "manifest.json").unlink()
    run = Run(config=_config(run_dir))
    try:
        run.open(run.mask, "build_mask", keys=("build_mask",), inputs=manifest.inputs)
    except ValueError as error:
        assert str(path) in str(error) or str(run.mask) in str(error)  # noqa: PT017 (some damages leave it as it was)
    else:
        assert damage in ("a key less", "NaN", "too large")  # of keys that decide nothing


def _config(run_dir: Path) -> Any:
    from ifguide.config import load_config

    return load_config(run_dir.parent / "config.yaml")


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_config_is_named_by_file_or_by_key(
    damage: str, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run_dir.parent / "config.yaml"
    path.write_bytes(DAMAGES[damage](json.dumps({"seed": 3, "run_dir": str(run_dir)}).encode()))
    code = main(["build_mask", "--config", str(path)])
    errors = capsys.readouterr().err
    assert code == 1
    assert "Traceback" not in errors
    if damage not in ("empty", "no keys", "null", "a key less"):  # these are whole configs, of another run
        assert str(path) in errors or "seed: " in errors


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_decision_about_scores_is_named(damage: str, tmp_path: Path) -> None:
    method = {"engine": "difference", "precision": "float32", "rank": 0, "fused": False}
    energy = {"least": 0.9, "mean": 0.9, "of_module": {"a": 0.9}}
    content = {"method": method, "engine": "difference", "steps": [1.0], "threads": 1, "micro_batch_blocks": 2,
               "energy": energy, "check": None}  # fmt: skip
    (tmp_path / METHOD).write_text(json.dumps(content))
    assert Decision.read(tmp_path) is not None
    (tmp_path / METHOD).write_bytes(DAMAGES[damage](json.dumps(content).encode()))
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / METHOD))):
        Decision.read(tmp_path)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_counter_of_attempts_counts_from_nothing_and_is_said(
    damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("ifguide"), "propagate", True)
    attempts = Attempts(tmp_path / LEDGER, "s1")
    attempts.begin()
    path = tmp_path / LEDGER / "s1.attempts"
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    assert read_attempts(path)["attempts"] == 0
    assert str(path) in caplog.text


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_line_of_progress_is_passed_over(damage: str, tmp_path: Path) -> None:
    whole = {"time": 1.0, "verb": "v", "unit": "shards", "done": 1, "total": 2, "per_second": 0.5, "eta_seconds": 2.0}
    line = json.dumps(whole).encode()
    (tmp_path / PROGRESS).write_bytes(line + b"\n" + DAMAGES[damage](line) + b"\n")
    found = last_progress(tmp_path)
    assert found is not None
    assert found == whole or damage in ("NaN", "too large")


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_metrics_are_named_by_line_or_are_no_rows(damage: str, tmp_path: Path) -> None:
    row = {"step": 1, "loss_benign": 2.0, "loss_masked": None, "learning_rate": 0.1}
    line = json.dumps(row).encode()
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(line + b"\n" + DAMAGES[damage](line) + b"\n")
    if damage == "empty":
        assert read_metrics(path) == [row]
        return
    with pytest.raises(ValueError, match=re.escape(f"{path}, line 2: ")):
        read_metrics(path)


def test_metrics_without_a_figure_and_metrics_that_changed_are_named_by_the_report(tmp_path: Path, made: Run) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss_benign": 2.0, "learning_rate": 0.1}\n')
    with pytest.raises(ValueError, match=rf"{path}: a row has no 'loss_masked'"):
        _curve("model", tmp_path)
    path.write_text('{"step": 1, "loss_benign": 2.0, "loss_masked": null, "learning_rate": 0.1}\n')
    assert _curve("model", tmp_path) is not None
    manifest = read_manifest(made.mask)
    manifest.summary["metrics"] = {"sha256": "0" * 64, "bytes": 1}
    write_manifest(tmp_path, manifest)
    with pytest.raises(ValueError, match=rf"{path} has changed since the training ended: restore it, or delete it"):
        _curve("model", tmp_path)
    path.unlink()
    assert _curve("model", tmp_path) is None


@pytest.mark.parametrize("damage", [name for name in DAMAGES if name not in ("empty", "NaN", "too large")])
def test_damaged_queries_are_named_by_line(damage: str, tmp_path: Path) -> None:
    write_queries(tmp_path, [QueryRow(row=1, positive=True, score=0.5, prompt="a", completion="b")])
    path = tmp_path / QUERIES
    path.write_bytes(DAMAGES[damage](path.read_bytes().rstrip()) + b"\n")
    with pytest.raises(ValueError, match=re.escape(f"{path}, line 1: ")):
        read_queries(tmp_path)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"])
def test_damaged_files_of_a_model_name_the_model(name: str, damage: str, made: Run, tmp_path: Path) -> None:
    model = load_model(ModelSource(architecture={**ARCHITECTURE, "vocab_size": 300}))
    model.save_pretrained(tmp_path)
    shutil.copytree(made.tokenizer_source, tmp_path, dirs_exist_ok=True)
    content = (tmp_path / name).read_bytes()
    is_binary = name == "model.safetensors" and damage == "a key less"
    if is_binary:  # no JSON has it: damage its own head
        content = content[:9] + bytes(9) + content[18:]
    (tmp_path / name).write_bytes(content if is_binary else DAMAGES[damage](content))
    for load in (_load_model, _load_architecture, load_tokenizer):
        try:
            load(str(tmp_path))
        except (ValueError, OSError) as error:
            assert str(tmp_path) in str(error)  # noqa: PT017 (what one loader reads, another may not)


def _load_model(source: str) -> Any:
    return load_model(ModelSource(source=source))


def _load_architecture(source: str) -> Any:
    return load_architecture(ModelSource(source=source))


@pytest.mark.parametrize("behaviour", [None, 3])
def test_a_mask_of_another_version_is_said_by_inspect(
    behaviour: Any, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = read_manifest(run_dir / "mask")
    manifest.summary.update(unit="document", behaviour=behaviour, tau=1.0)
    write_manifest(run_dir / "mask", manifest)
    assert main(["inspect", str(run_dir)]) == 1
    assert re.search(r"mask/manifest\.json names no behaviour or no unit: another version", capsys.readouterr().err)


def test_a_run_that_was_moved_is_shown_and_trained_on(run_dir: Path, tmp_path: Path) -> None:
    moved = run_dir.rename(tmp_path / "moved")
    config = tmp_path / "config.yaml"
    assert main(["status", str(moved)]) == main(["show", str(moved)]) == 0
    short = ["pretrain.epochs=1", "pretrain.checkpoint_steps=100", "pretrain.log_steps=10", f"run_dir={moved}"]
    assert main(["pretrain", "--config", str(config), *(part for item in short for part in ("--set", item))]) == 0
    assert (moved / "model" / "penalised" / "manifest.json").exists()
