"""What a report gathers: settings as they may be shown, and the artifacts that are there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ifguide.artifacts import open_artifact
from ifguide.config import config_from_mapping, to_yaml
from ifguide.report.data import ReportSources, comparison_data
from ifguide.report.page import write_report
from ifguide.student.said import audit_lines
from ifguide.training.choices import Choices, Compiled
from tests.unit.report.sample_report import row
from tests.unit.student.test_said import summary as student_summary

SECRET = "planted-s3cr3t"
METRICS: dict[str, Any] = {
    "threshold": 0.5, "confidence": 0.95, "bootstrap_samples": 1000, "grouped_by": {"label": 3, "classifier": 0},
}  # fmt: skip


def test_the_credentials_of_a_config_are_in_no_file_of_a_report(tmp_path: Path) -> None:
    url = f"s3://key:{SECRET}@bucket"
    evaluate = {
        "prompts": f"{url}/prompts.jsonl",
        "prompt_sets": {"bold": f"{url}/bold"},
        "classifier": {"name": f"words:{url}/words.txt", "checkpoint": None},
        "classifiers": {"implicit": {"name": f"hf:{url}/model", "label": "a"}},
        "heldout": [f"{url}/heldout.jsonl"],
        "cloze": f"https://host/cloze.jsonl?token={SECRET}",
        "models": {"given": f"{url}/given"},
    }
    config = config_from_mapping({"run_dir": f"{url}/run", "evaluate": evaluate})
    sources = ReportSources(
        title="t",
        options=config.evaluate,
        seed=0,
        config_yaml=to_yaml(config),
        artifacts={"corpus": tmp_path / "gone"},
        trained={},
    )
    data = comparison_data(sources, METRICS, (row("only", 0.5),))
    settings = dict(data.settings)
    assert settings["prompts"] == "s3://***@bucket/prompts.jsonl"
    assert settings["last words of"] == "https://host/cloze.jsonl?token=***"
    assert data.provenance == ()
    write_report(data, tmp_path)
    files = [path for path in tmp_path.iterdir() if path.is_file()]
    assert len(files) == 3
    assert not any(SECRET in path.read_text(encoding="utf-8") for path in files)


@pytest.mark.parametrize(
    ("summary", "shown"),
    [
        ({"reliability": 0.618}, "0.62 of 1"),
        (
            {"reliability": 0.618, "held_out": {"positive": 20, "negative": 9, "auroc": 0.7712}},
            "0.62 of 1, 29 held-out queries told apart with AUROC 0.77",
        ),
        ({"held_out": {"positive": 20, "negative": 0}}, None),
        ({}, None),
    ],
)
def test_the_reliability_of_the_queries_is_shown_where_it_was_measured(
    tmp_path: Path, summary: dict[str, Any], shown: str | None
) -> None:
    assert settings_beside(tmp_path / "query", "build_query", summary).get("reliability of the queries") == shown


def test_the_audit_of_scores_that_a_student_made_is_on_the_page(tmp_path: Path) -> None:
    said = student_summary()
    settings = settings_beside(tmp_path / "scores", "score_corpus", said)
    assert settings.items() >= audit_lines(said).items()
    assert "exact top 2% in rechecked blocks" in settings
    exact = settings_beside(tmp_path / "exact" / "scores", "score_corpus", {"attribution": "target"})
    assert settings.keys() - exact.keys() == audit_lines(said).keys()


def test_what_the_steps_of_a_training_ran_by_is_on_the_page(tmp_path: Path) -> None:
    chosen = Choices(layers=Compiled(True, "asked for"), loss=Compiled(False, "no compiler"), attention="sdpa")
    for name in ("chosen", "older"):
        (tmp_path / name).mkdir()
    chosen.write(tmp_path / "chosen")
    config = config_from_mapping({"evaluate": {"prompts": "prompts.jsonl"}})
    trained = {name: tmp_path / name for name in ("chosen", "older")}
    sources = ReportSources(title="t", options=config.evaluate, seed=0, config_yaml="", artifacts={}, trained=trained)
    settings = dict(comparison_data(sources, METRICS, (row("only", 0.5),)).settings)
    assert settings["training of chosen"] == (
        "layers compiled (asked for), loss not compiled (no compiler), attention by sdpa"
    )
    assert "training of older" not in settings


def settings_beside(folder: Path, verb: str, summary: dict[str, Any]) -> dict[str, str]:
    """The settings that a page shows of a run with this artifact."""
    open_artifact(folder, verb=verb, options={}, inputs={}, config_yaml="").finish([], rows={}, summary=summary)
    config = config_from_mapping({"evaluate": {"prompts": "prompts.jsonl"}})
    sources = ReportSources(
        title="t", options=config.evaluate, seed=0, config_yaml="", artifacts={folder.name: folder}, trained={}
    )
    return dict(comparison_data(sources, METRICS, (row("only", 0.5),)).settings)
