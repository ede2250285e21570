"""Generations are made once, on any number of actors, and scored by any classifier; figures are those of the files."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from transformers import BertConfig, BertForSequenceClassification, BertTokenizer

from ifguide import schemas
from ifguide.artifacts import MANIFEST, PLAN, MismatchError, data_files, read_manifest, write_json
from ifguide.cli import main
from ifguide.config import Config, ConfigError, to_mapping
from ifguide.evaluation.generations import has_generations
from ifguide.evaluation.prompts import chosen_prompts, chosen_sets
from ifguide.evaluation.subjects import Model
from ifguide.pipeline import stage
from ifguide.run import Run
from ifguide.stages.evaluate import evaluation_of

PLAIN = {"evaluate__heldout": [], "evaluate__cloze": None}  # so that nothing but generation loads a model


def texts_of(config: Config, model: str, prompt_set: str = "prompts") -> dict[tuple[int, int], str]:
    """(prompt row, sample) -> continuation."""
    found = {}
    for path in data_files(Run(config=config).generations(model) / prompt_set):
        for row in schemas.read_table(path, schemas.GENERATIONS).to_pylist():
            found[row["prompt_row"], row["sample"]] = row["continuation"]
    return found


def scores_of(config: Config, model: str, prompt_set: str = "") -> dict[str, np.ndarray]:
    """class -> (prompts, continuations), prompts ascending by row."""
    rows: dict[int, dict[int, dict[str, float]]] = {}
    folder = Run(config=config).report / "continuations" / prompt_set
    for path in sorted(folder.glob(f"{model}-*.parquet")):
        for record in schemas.read_table(path, schemas.CONTINUATIONS).to_pylist():
            rows.setdefault(record["prompt_row"], {})[record["sample"]] = dict(record["scores"])
    names = next(iter(next(iter(rows.values())).values()))
    return {name: np.array([[rows[row][k][name] for k in sorted(rows[row])] for row in sorted(rows)]) for name in names}


def metrics_of(config: Config) -> dict:
    return json.loads((Run(config=config).report / "metrics.json").read_text())


def words(folder: Path, *listed: str) -> str:
    path = folder / "words.txt"
    path.write_text("\n".join(listed))
    return f"words:{path}"


def test_another_classifier_takes_the_same_generations_without_the_models(
    copied: Callable[..., Config], tmp_path: Path
) -> None:
    classifier = {"name": words(tmp_path, "the", "a")}
    config = copied(evaluate__classifier=classifier, evaluate__report="report-words", **PLAIN)
    run = Run(config=config)
    before = {path: path.stat().st_mtime_ns for path in (run.folder / "generations").rglob("*") if path.is_file()}
    assert len(before) >= 8
    for name in ("baseline", "penalised"):
        (run.model(name) / "hf" / "model.safetensors").unlink()  # whoever generates fails
    manifest = stage("evaluate")(run)
    assert {
        path: path.stat().st_mtime_ns for path in (run.folder / "generations").rglob("*") if path.is_file()
    } == before
    assert (run.folder / "report" / MANIFEST).exists()
    assert set(np.unique(scores_of(config, "baseline")["toxicity"])) <= {0.0, 1.0}
    assert manifest.rows["continuations"] == 2 * 10 * 3
    shard = data_files(run.generations("baseline") / "prompts")[0]
    shard.write_bytes(shard.read_bytes()[:-1] + b"\0")
    again = replace(config, evaluate=replace(config.evaluate, report="third"))
    with pytest.raises(Exception, match=f"{shard.name} has changed since it was made"):
        stage("evaluate")(Run(config=again))


def test_other_sampling_or_other_prompts_are_refused_not_mixed(finished: Config, copied: Callable[..., Config]) -> None:
    config = copied(evaluate__top_p=0.5, evaluate__report="again")
    with pytest.raises(MismatchError, match=r"generations/baseline/prompts.*evaluate.top_p was 0.9, now 0.5"):
        stage("evaluate")(Run(config=config))
    fewer = copied(evaluate__max_prompts=9, evaluate__report="again")
    with pytest.raises(MismatchError, match=r"inputs|prompts was"):
        stage("evaluate")(Run(config=fewer))
    for each, same in ((finished, True), (config, False), (fewer, False)):
        run, sets = Run(config=each), chosen_sets(each.evaluate, each.seed)
        model = Model("", read_manifest(run.model("baseline")).fingerprint)
        models = {"baseline": model, "absent": model}
        assert has_generations(evaluation_of(run, models, sets), "baseline") == same
        assert not has_generations(evaluation_of(run, models, sets), "absent")
        assert not has_generations(evaluation_of(run, {"baseline": Model("", "another's")}, sets), "baseline")


def test_generations_have_the_same_bytes_on_another_number_of_actors(
    finished: Config, copied: Callable[..., Config]
) -> None:
    config = copied(drop=("report", "generations"), evaluate__actors=2, **PLAIN)
    stage("evaluate")(Run(config=config))
    for model in ("baseline", "penalised"):
        found, expected = (
            read_manifest(Run(config=each).generations(model) / "prompts") for each in (config, finished)
        )
        assert found.fingerprint == expected.fingerprint
        assert found.rows == {"continuations": 30, "prompts": 10}


def test_shards_of_another_size_hold_the_same_texts(finished: Config, copied: Callable[..., Config]) -> None:
    config = copied(drop=("report", "generations"), evaluate__prompts_per_shard=7, **PLAIN)
    stage("evaluate")(Run(config=config))
    assert len(data_files(Run(config=config).generations("baseline") / "prompts")) == 2
    assert texts_of(config, "baseline") == texts_of(finished, "baseline")
    assert texts_of(config, "baseline") != texts_of(finished, "penalised")


def test_what_was_generated_before_an_interruption_is_kept(finished: Config, copied: Callable[..., Config]) -> None:
    config = copied(drop=("report",), **PLAIN)
    folder = Run(config=config).generations("penalised") / "prompts"
    manifest = read_manifest(folder)
    (folder / MANIFEST).unlink()
    write_json(folder / PLAN, {"verb": manifest.verb, "options": manifest.options, "inputs": manifest.inputs})
    first, second, *_ = data_files(folder)
    second.unlink()
    (folder / f"{second.name}.0123.part").write_bytes(b"half a shard")
    kept = first.stat().st_mtime_ns
    stage("evaluate")(Run(config=config))
    assert first.stat().st_mtime_ns == kept
    assert read_manifest(folder).fingerprint == manifest.fingerprint
    assert texts_of(config, "penalised") == texts_of(finished, "penalised")


def test_figures_are_those_of_the_stored_scores_with_intervals_and_pairs(finished: Config) -> None:
    metrics = metrics_of(finished)
    for model in ("baseline", "penalised"):
        scores = scores_of(finished, model)["toxicity"]
        groups = metrics["models"][model]["sets"]["prompts"]["groups"]
        assert groups["all"]["emt"]["toxicity"]["value"] == pytest.approx(scores.max(axis=1).mean())
        assert groups["all"]["tp"]["toxicity"]["value"] == pytest.approx((scores.max(axis=1) >= 0.5).mean())
        assert groups["all"]["mean"]["toxicity"]["value"] == pytest.approx(scores.mean())
        parts = [groups["with toxicity"], groups["without toxicity"]]
        assert sum(part["prompts"] for part in parts) == groups["all"]["prompts"] == 10
        for name in ("rep_2", "rep_4", "distinct_1", "distinct_3", "tokens", "empty"):
            figure = groups["all"][name]
            assert figure["low"] <= figure["value"] <= figure["high"]
        summary = read_manifest(Run(config=finished).report).summary[model]
        fluent = metrics["models"][model]
        assert fluent["perplexity"]["value"] == pytest.approx(summary["perplexity"])
        assert fluent["perplexity"]["low"] < summary["perplexity"] < fluent["perplexity"]["high"]
        assert fluent["last_word_accuracy"]["value"] == pytest.approx(summary["last_word_accuracy"])
        assert fluent["last_token_accuracy"]["value"] >= fluent["last_word_accuracy"]["value"]
        assert summary["emt_interval"][0] <= summary["emt"] <= summary["emt_interval"][1]
    paired = metrics["paired"]["penalised"]
    assert paired["against"] == "baseline"
    for name in ("perplexity", "last_word_accuracy"):
        values = [metrics["models"][model][name]["value"] for model in ("penalised", "baseline")]
        assert paired[name]["difference"] == pytest.approx(values[0] - values[1])
    emt = paired["sets"]["prompts"]["groups"]["all"]["emt"]["toxicity"]
    values = [scores_of(finished, model)["toxicity"].max(1) for model in ("penalised", "baseline")]
    assert emt["difference"] == pytest.approx((values[0] - values[1]).mean())
    assert emt["low"] <= emt["difference"] <= emt["high"]
    assert 0 < emt["p_value"] <= 1


def test_flagged_held_out_documents_are_outside_the_benign_perplexity(
    finished: Config, copied: Callable[..., Config], tmp_path: Path
) -> None:
    flagged = tmp_path / "flagged.jsonl"
    flagged.write_text("".join(json.dumps({"text": f"you stupid idiot, number {i}"}) + "\n" for i in range(9)))
    config = copied(drop=("report",), evaluate__heldout=[*to_mapping(finished)["evaluate"]["heldout"], str(flagged)])
    summary = stage("evaluate")(Run(config=config)).summary["baseline"]
    table = schemas.read_table(Run(config=config).report / "fluency" / "baseline-heldout.parquet", schemas.HELDOUT)
    nll, tokens, kind = (table.column(name).to_numpy() for name in ("nll", "tokens", "flagged"))
    assert 0 < kind.sum() < len(kind)
    assert summary["perplexity"] == pytest.approx(np.exp(nll.sum() / tokens.sum()))
    # The demo's own held-out documents are harmless, and without the others nothing is told apart.
    before = metrics_of(finished)["models"]["baseline"]
    assert summary["benign_perplexity"] == pytest.approx(before["perplexity"]["value"])
    assert before["benign_perplexity"] is None
    low, high = summary["benign_perplexity_interval"]
    assert low < summary["benign_perplexity"] < high
    assert metrics_of(config)["paired"]["penalised"]["benign_perplexity"]["n"] == int((~kind).sum())


def test_annotated_text_has_margins_that_are_those_of_its_tokens(
    finished: Config, copied: Callable[..., Config], tmp_path: Path
) -> None:
    rows = [json.loads(line) for line in Path(finished.pack_corpus.inputs[0].path).read_text().splitlines()]
    texts = tmp_path / "annotated.jsonl"
    texts.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"text": "", "toxic_spans": []}]))
    source = {"path": str(texts), "spans_column": "toxic_spans"}
    config = copied(drop=("report",), evaluate__annotated=[source])
    summary = stage("evaluate")(Run(config=config)).summary
    metrics = metrics_of(config)
    nll, flags = {}, {}
    for model in ("baseline", "penalised"):
        path = Run(config=config).report / "fluency" / f"{model}-annotated.parquet"
        table = schemas.read_table(path, schemas.ANNOTATED)
        assert len(table) == len(rows) + 1
        nll[model], flags[model] = (
            np.concatenate([row for row in table.column(name).to_pylist() if row]) for name in ("nll", "annotated")
        )
        margin = nll[model][flags[model]].mean() - nll[model][~flags[model]].mean()
        figures = metrics["models"][model]
        assert figures["annotated_nll"]["value"] == pytest.approx(nll[model][flags[model]].mean())
        assert figures["margin"]["value"] == pytest.approx(margin) == summary[model]["margin"]
        assert figures["margin"]["low"] < margin < figures["margin"]["high"]
        assert figures["margin"]["n"] == len(rows) + 1
    masked = sum(bool(row["toxic_spans"]) for row in rows)
    assert 0 < masked < len(rows)
    paired = metrics["paired"]["penalised"]
    change = nll["penalised"] - nll["baseline"]
    expected = change[flags["baseline"]].mean() - change[~flags["baseline"]].mean()
    assert paired["margin"]["difference"] == pytest.approx(expected)
    assert paired["margin"]["low"] <= expected <= paired["margin"]["high"]
    assert paired["type_margin"]["n"] == len(rows) + 1
    assert "Annotated text" in (Run(config=config).report / "index.html").read_text()
    texts.write_text('{"text": "nothing is harmful", "toxic_spans": []}\n')
    with pytest.raises(Exception, match=r"evaluate\.annotated: 0 of \d+ tokens lie in a span"):
        stage("evaluate")(Run(config=replace(config, evaluate=replace(config.evaluate, report="none"))))


def bert(folder: Path) -> Path:
    """A random sequence classifier with the labels of ToxiGen-RoBERTa."""
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnop"]))
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = BertConfig(vocab_size=21, max_position_embeddings=32, initializer_range=1.0, **sizes)
    BertForSequenceClassification(config).save_pretrained(folder)
    return folder


def test_further_sets_and_classifiers_are_measured_by_group_with_their_gap(
    copied: Callable[..., Config], tmp_path: Path
) -> None:
    (tmp_path / "bold").mkdir()
    race = {"a": {"x": ["The farmer ", "The cook "]}, "b": {"y": ["A teacher was ", "The boy "], "z": []}}
    (tmp_path / "bold" / "race_prompt.json").write_text(json.dumps(race))
    (tmp_path / "bold" / "gender_prompt.json").write_text(json.dumps({"c": {"w": ["She "]}}))
    rows = [{"input": f"How do I {i}", "label": ["harm", "pii"][i % 2]} for i in range(4)]
    (tmp_path / "attaq.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = copied(
        drop=("report",),
        evaluate__prompt_sets={
            "bold": {"path": str(tmp_path / "bold"), "prompts_per_name": None},
            "attaq": {"path": str(tmp_path / "attaq.jsonl"), "text_column": "input", "group_column": "label"},
        },
        evaluate__classifiers={"implicit": {"name": f"hf:{bert(tmp_path / 'bert')}", "label": "LABEL_1"}},
        **PLAIN,
    )
    before = (Run(config=config).generations("baseline") / "prompts" / MANIFEST).stat().st_mtime_ns
    stage("evaluate")(Run(config=config))
    assert (Run(config=config).generations("baseline") / "prompts" / MANIFEST).stat().st_mtime_ns == before
    sets = metrics_of(config)["models"]["penalised"]["sets"]
    assert list(sets) == ["prompts", "bold", "attaq"]
    evaluators = {"toxicity", "implicit"}
    unlisted = {f"{name} without listed words" for name in evaluators}  # the config has a word list
    assert set(sets["prompts"]["groups"]["all"]["tp"]) == evaluators | unlisted
    bold = sets["bold"]["groups"]
    assert {name: group["prompts"] for name, group in bold.items()} == {
        "all": 5,
        "race/a": 2,
        "race/b": 2,
        "gender/c": 1,
    }
    scores = scores_of(config, "penalised", "bold")["implicit"]  # prompts in the files' order: gender, race a, race b
    assert np.ptp(scores) > 0.01
    means = {"gender/c": scores[:1].mean(), "race/a": scores[1:3].mean(), "race/b": scores[3:].mean()}
    assert {name: bold[name]["mean"]["implicit"]["value"] for name in means} == pytest.approx(means)
    gaps = sets["bold"]["gaps"]
    assert list(gaps) == ["race"]  # one group has no gap
    assert gaps["race"]["mean"]["implicit"]["value"] == pytest.approx(abs(means["race/a"] - means["race/b"]))
    assert "rep_4" not in gaps["race"]
    assert set(sets["attaq"]["gaps"]) == {"groups"}
    paired = metrics_of(config)["paired"]["penalised"]["sets"]["bold"]
    assert paired["gaps"]["race"]["mean"]["implicit"]["p_value"] is not None


def test_benchmarks_stand_in_metrics_on_the_page_and_on_what_is_pushed(
    copied: Callable[..., Config], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"start": f"The farmer {i}", "ends": [" saw", " said"], "right": i % 2} for i in range(6)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "farmers",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": "{{start}}",
        "doc_to_choice": "{{ends}}",
        "doc_to_target": "right",
    }
    (tmp_path / "farmers.yaml").write_text(yaml.safe_dump(task))
    config = copied(evaluate__lm_eval=[str(tmp_path / "farmers.yaml")], evaluate__report="again", **PLAIN)
    run = Run(config=config)
    manifest = stage("evaluate")(run)
    assert f"lm_eval/{tmp_path / 'farmers.yaml'}" in manifest.inputs
    for model in ("baseline", "penalised"):
        figure = metrics_of(config)["models"][model]["lm_eval"]["farmers"]["acc"]
        assert figure["n"] == 6
        assert figure["low"] < figure["value"] < figure["high"]
    assert "farmers, acc" in (run.report / "index.html").read_text()
    assert main(["push", str(run.folder), "owner/name", "--report", "again", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    card = ModelCard(shown[shown.index("---\n") :])
    assert {result.metric_type for result in card.data.eval_results} >= {"emt", "tp", "acc"}
    assert (
        f"model.safetensors ({(run.model('penalised') / 'hf' / 'model.safetensors').stat().st_size:,} bytes)" in shown
    )


def test_balanced_prompts_are_half_and_half_or_refused(copied: Callable[..., Config]) -> None:
    config = copied(evaluate__balanced=True, evaluate__max_prompts=6)
    rows = chosen_prompts(config.evaluate, config.seed)
    assert sum(row.prompt_scores["toxicity"] >= 0.5 for row in rows) == 3
    assert [row.row for row in rows] == sorted({row.row for row in rows})
    assert len(rows) == 6
    config = copied(evaluate__balanced=True, evaluate__max_prompts=60, evaluate__report="again")
    with pytest.raises(ConfigError, match=r"evaluate.balanced: 30 prompts"):
        stage("evaluate")(Run(config=config))


def test_labels_cannot_score_what_was_generated(copied: Callable[..., Config]) -> None:
    with pytest.raises(ConfigError, match=r"evaluate.classifier: labels cannot score"):
        stage("evaluate")(Run(config=copied(evaluate__classifier={"name": "labels"})))


def test_check_classifier_prints_the_agreement_of_each(
    finished: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = [("you pig", True, 0.9), ("the pig slept", False, 0.6), ("good day", False, 0.1), ("clown", True, 0.4)]
    lines = [json.dumps({"text": text, "toxic": label, "toxicity": score}) for text, label, score in texts]
    (tmp_path / "comments.jsonl").write_text("\n".join(lines))
    tree = to_mapping(finished)
    tree["evaluate"] |= {
        "classifier": {"name": words(tmp_path, "pig", "clown")},
        "classifiers": {"perspective": {"name": "labels"}},
        "check_data": [str(tmp_path / "comments.jsonl")],
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    assert main(["evaluate", "--config", str(path), "--check-classifier"]) == 0
    listed, carried = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert (listed["n"], listed["positives"], listed["accuracy"]["value"]) == (4, 2, 0.75)
    assert listed["f1"]["value"] == pytest.approx(0.8)
    assert (carried["classifier"], carried["name"]) == ("labels", "perspective")
    assert carried["accuracy"]["value"] == 0.5
    assert carried["auroc"]["value"] == 0.75
    assert carried["auroc"]["low"] <= 0.75 <= carried["auroc"]["high"]
    tree["evaluate"]["check_data"] = []
    path.write_text(yaml.safe_dump(tree))
    assert main(["evaluate", "--config", str(path), "--check-classifier"]) == 1
    assert "evaluate.check_data" in capsys.readouterr().err
