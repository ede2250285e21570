"""`analyse` on the small finished run: what it writes, that it resumes, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ifguide.artifacts import MismatchError
from ifguide.cli import main
from ifguide.config import ClassifierSource, Config, ConfigError, LabelledTexts, to_yaml
from ifguide.config.analyse import Analyse, Gcg
from ifguide.config.resources import Resources
from ifguide.run import Run
from ifguide.stages.analyse import analyse

SMALL = Analyse(
    max_prompts=6,
    folds=2,
    max_texts=20,
    actors=2,
    resources=Resources(gpus=0),
    gcg=Gcg(targets=2, target_tokens=2, suffix_tokens=3, steps=2, candidates=8, top_k=8),
)


def test_the_analyses_of_a_finished_run(copied: Callable[..., Config], capsys: pytest.CaptureFixture[str]) -> None:
    config = replace(copied(), analyse=SMALL)
    run = Run(config=config)
    path = run.folder / "analyse.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    assert main(["analyse", "--config", str(path)]) == 0
    assert "| baseline |" in capsys.readouterr().out
    content: dict[str, Any] = json.loads((run.analyses / "analyses.json").read_text())
    assert list(content["models"]) == ["baseline", "penalised"]
    for found in content["models"].values():
        assert [figure["n"] for figure in found["lens"]["layers"]] == [6] * 3
        assert all(0 < figure["low"] <= figure["value"] <= figure["high"] < 1 for figure in found["lens"]["layers"])
        assert len(found["probes"]["layers"]) == 3
        assert len(found["probes"]["chosen"]["depths"]) == SMALL.folds
        assert found["gcg"]["exact"]["n"] == len(found["gcg"]["attacks"]) == 2
        assert all(each["loss"] <= each["first_loss"] for each in found["gcg"]["attacks"])
    words = content["models"]["baseline"]["lens"]["tokens"]
    assert sorted(words) == [" clown", " pig", "clown", "pig"]  # whole words, whatever the tokenizer cuts them into
    both = [content["models"][name]["lens"]["layers"][-1]["value"] for name in ("penalised", "baseline")]
    assert content["paired"]["penalised"]["lens"]["difference"] == pytest.approx(both[0] - both[1])
    for name in ("lens", "probes", "gcg"):
        assert (run.analyses / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    manifest = analyse(run)
    assert manifest is not None
    assert manifest.rows == {"models": 2, "pieces": 2 * (1 + 1 + 2)}
    again = replace(config, analyse=replace(SMALL, max_prompts=5))
    with pytest.raises(ValueError, match=r"analyse\.max_prompts"):
        analyse(Run(config=again))


def test_prompts_and_texts_that_were_edited_are_another_analysis(copied: Callable[..., Config], tmp_path: Path) -> None:
    config = copied()
    prompts, texts = tmp_path / "prompts.jsonl", tmp_path / "texts.jsonl"
    assert config.evaluate.prompts is not None
    prompts.write_text(Path(config.evaluate.prompts.path).read_text())
    texts.write_text("".join(json.dumps({"text": f"t{i}", "toxic": i < 8}) + "\n" for i in range(16)))
    config = replace(
        config,
        evaluate=replace(config.evaluate, prompts=replace(config.evaluate.prompts, path=str(prompts))),
        analyse=replace(SMALL, methods=("lens", "probes"), max_prompts=4, texts=(LabelledTexts(path=str(texts)),)),
    )
    assert analyse(Run(config=config)) is not None
    for path, named in ((prompts, "prompts"), (texts, "texts")):
        before = path.read_text()
        path.write_text(before.replace("t1", "other").replace("You", "They").replace("The", "A"))
        with pytest.raises(MismatchError, match=named):
            analyse(Run(config=config))
        path.write_text(before)
    assert analyse(Run(config=config)) is not None


def test_what_cannot_be_analysed_is_refused(copied: Callable[..., Config]) -> None:
    config = copied(drop=("query",))
    with pytest.raises(FileNotFoundError, match="build_query"):
        analyse(Run(config=config))
    labels = replace(config, evaluate=replace(config.evaluate, classifier=ClassifierSource(name="labels")))
    with pytest.raises(ConfigError, match=r"evaluate\.classifier"):
        analyse(Run(config=labels), dry_run=True)
    with pytest.raises(ConfigError, match=r"evaluate\.prompts"):
        analyse(Run(config=replace(config, evaluate=replace(config.evaluate, prompts=None))), dry_run=True)
