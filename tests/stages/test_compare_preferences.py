"""`compare` with DPO and RAD: they learn from other prompts, stand beside the models and resume."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from ifguide import schemas
from ifguide.artifacts import MismatchError, data_files, read_manifest
from ifguide.config import ClassifierSource, Config, ConfigError
from ifguide.config.compare import Compare, Dpo, Method, Rad, Reward, Samples
from ifguide.models import source_fingerprint
from ifguide.run import Run
from ifguide.stages.compare import compare


@pytest.fixture
def preferring(copied: Callable[..., Config]) -> Config:
    """A finished run with DPO and RAD methods, alone and together."""
    methods = {
        "dpo": Method(dpo=Dpo(min_difference=0.02, learning_rate=1e-4, batch_size=4, micro_batch_size=4)),
        "rad": Method(rad=Rad(top_k=5)),
        "both": Method(rad=Rad(model="dpo", top_k=5)),
    }
    samples, reward = Samples(continuations=4, max_prompts=12), Reward(learning_rate=1e-3)
    comparison = Compare(methods=methods, threshold=0.5, samples=samples, reward=reward)
    return replace(copied(), compare=comparison)


def sampled(run: Run, model: str) -> dict[tuple[int, int], list[int]]:
    own = (
        run.generations(model) if model in ("baseline", "penalised") else run.folder / "compare" / "generations" / model
    )
    folder = own / "prompts"
    rows = [row for path in data_files(folder) for row in schemas.read_table(path, schemas.GENERATIONS).to_pylist()]
    return {(row["prompt_row"], row["sample"]): row["tokens"] for row in rows}


def test_dpo_and_rad_learn_from_other_prompts_and_stand_beside_the_models(preferring: Config) -> None:
    run = Run(config=preferring)
    manifest = compare(run)
    assert manifest is not None
    rows = {row["model"]: row for row in json.loads((run.folder / "compare/report/comparison.json").read_text())}
    assert list(rows) == ["baseline", "penalised", "dpo", "rad", "both"]
    assert [rows[name]["made_by"] for name in ("dpo", "rad", "both")] == [
        "DPO of baseline",
        "RAD of baseline",
        "RAD of dpo",
    ]
    # Trained weights have a perplexity of their own; decoding has that of the model it decodes, and says so.
    assert rows["dpo"]["ratio"] not in (1, rows["penalised"]["ratio"])
    for name, decoded in (("rad", "baseline"), ("both", "dpo")):
        assert rows[name]["fluency_of"] == decoded
        assert rows[name]["perplexity"] == rows[decoded]["perplexity"]
        assert sampled(run, name) != sampled(run, decoded)
        assert not list((run.folder / "compare/report/fluency").glob(f"{name}-*"))
    assert r"\* of the model that is decoded (rad: baseline, both: dpo)" in (
        run.folder / "compare/report/comparison.md"
    ).read_text(encoding="utf-8")
    reward = read_manifest(run.folder / "compare" / "reward")
    pairs = read_manifest(run.folder / "compare" / "dpo" / "model" / "dpo")
    left_out = reward.summary["prompts_left_out"]
    assert reward.summary["texts"] + reward.summary["heldout_texts"] == 4 * (12 - left_out)
    assert pairs.rows["pairs"] == pairs.summary["pairs"] <= pairs.summary["prompts"] == 12 - left_out
    assert not (run.folder / "compare/dpo/model/dpo/checkpoints").exists()
    assert set(reward.inputs) == {"samples", "model/baseline", "prompts"}

    # Resumed: nothing is made again. Guided text is the same on another number of actors.
    before = sampled(run, "both")
    assert compare(run) == manifest
    shutil.rmtree(run.folder / "compare" / "generations")
    shutil.rmtree(run.folder / "compare" / "report")
    other = replace(preferring, evaluate=replace(preferring.evaluate, actors=1))
    compare(Run(config=other))
    assert sampled(run, "both") == before


def test_the_weights_that_a_reward_model_starts_from_are_an_input_of_it(
    preferring: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ifguide.stages.compare._measure", lambda run, grid: None)
    source, run = tmp_path / "source", Run(config=preferring)
    shutil.copytree(run.model("baseline") / "hf", source)
    comparison = replace(
        preferring.compare,
        methods={"rad": preferring.compare.methods["rad"]},
        reward=replace(preferring.compare.reward, source=str(source)),
    )
    run = Run(config=replace(preferring, compare=comparison))
    compare(run)
    made = read_manifest(run.folder / "compare" / "reward")
    assert made.inputs["reward.source"] == source_fingerprint(str(source))
    (source / "added.json").write_text("{}")
    with pytest.raises(MismatchError, match=r"reward\.source"):
        compare(run)


def test_prompts_that_are_evaluated_teach_nothing(preferring: Config) -> None:
    evaluate = replace(preferring.evaluate, prompts=preferring.build_query.prompts, max_prompts=None)
    comparison = replace(preferring.compare, methods={"random": Method(mask="random"), **preferring.compare.methods})
    run = Run(config=replace(preferring, evaluate=evaluate, compare=comparison))
    with pytest.raises(ConfigError, match="all of them are evaluated too"):
        compare(run)
    assert not run.comparison.exists()  # nothing was masked or trained
    labels = ClassifierSource(name="labels")
    for options in (replace(evaluate, prompts=None), replace(evaluate, classifiers={"own": labels})):
        with pytest.raises(ConfigError, match=r"^evaluate\.(prompts|classifiers\.own): "):
            compare(Run(config=replace(preferring, evaluate=options)))


def test_a_dry_run_lists_the_methods(preferring: Config, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="ifguide"):
        assert compare(Run(config=preferring), dry_run=True) is None
    text = caplog.text
    assert "would train dpo: DPO of baseline" in text
    assert "would sample with both: RAD of dpo" in text
