"""A dry run says what is there already, and refuses what was made with other options."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from ifguide.artifacts import MismatchError, open_artifact, standing
from ifguide.config import config_from_mapping, result_options
from ifguide.pipeline import run_stage
from ifguide.run import Run


def config_of(folder: Path, block_size: int = 16):
    tree = {"run_dir": str(folder), "tokenizer": "t", "pack_corpus": {"block_size": block_size, "inputs": ["a.jsonl"]}}
    return config_from_mapping(tree)


def test_a_folder_is_complete_begun_or_not_there(tmp_path: Path) -> None:
    folder, options = tmp_path / "corpus", result_options(config_of(tmp_path), ["pack_corpus"])
    assert standing(folder, options) is None
    given = {**options, "files": {"a.jsonl": "digest"}}
    artifact = open_artifact(folder, verb="pack_corpus", options=given, inputs={"x": "y"}, config_yaml="")
    assert standing(folder, options) == "begun"
    artifact.finish([], rows={}, summary={})
    assert standing(folder, options) == "complete"
    with pytest.raises(MismatchError, match=r"pack_corpus\.block_size was 16, now 32"):
        standing(folder, result_options(config_of(tmp_path, 32), ["pack_corpus"]))


def test_a_dry_run_leaves_out_what_is_complete(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    options = result_options(config, ["pack_corpus"])
    artifact = open_artifact(tmp_path / "corpus", verb="pack_corpus", options=options, inputs={}, config_yaml="")
    artifact.finish([], rows={}, summary={})
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("ifguide").addHandler(handler)
    try:
        run_stage("pack_corpus", Run(config=config), dry_run=True)
    finally:
        logging.getLogger("ifguide").removeHandler(handler)
    (line,) = lines
    assert f"{tmp_path / 'corpus'} is complete" in line
    with pytest.raises(MismatchError, match="block_size was 16, now 32"):
        run_stage("pack_corpus", Run(config=config_of(tmp_path, 32)), dry_run=True)
