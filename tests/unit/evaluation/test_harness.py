"""lm-evaluation-harness on our models: by the key of the config, and by its own command on an exported folder."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import GPTNeoXForCausalLM, PreTrainedTokenizerFast

from ifguide.config import Evaluate
from ifguide.evaluation.harness import _stands_alone
from ifguide.evaluation.subjects import Model, measured_inputs
from ifguide.evaluation.worker import EvaluateModel, Harness
from ifguide.report.figures import Figure, model_rows
from tests.unit.evaluation.small import SENTENCES
from tests.unit.evaluation.test_dtype import settings  # noqa: F401  # a fixture

PAGE = Path(__file__).parents[3] / "docs" / "evaluation.md"
TASK = """task: whole_sentences
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{start}}}}"
doc_to_choice: "{{{{ends}}}}"
doc_to_target: right
target_delimiter: ""
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
"""


@pytest.fixture
def task(tmp_path: Path) -> Path:
    """Which end a sentence has: the model knows three sentences by heart, and the fourth is asked for wrongly."""
    rows = [{"start": text[:8], "ends": [text[8:], " of a pig"], "right": 0} for text in SENTENCES]
    rows.append({**rows[0], "right": 1})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "task.yaml").write_text(TASK.format(data=tmp_path / "rows.jsonl"))
    return tmp_path / "task.yaml"


def test_a_task_of_ones_own_is_measured_with_its_interval(settings: Any, task: Path) -> None:  # noqa: F811
    options = replace(settings.options, lm_eval=(str(task),), batch_size=2)
    worker = EvaluateModel(replace(settings, options=options, seed=2**40))
    piece = Harness(model="model")
    assert piece.key == "model-lm_eval"
    found = worker.process(piece)
    assert found.keys() == {"whole_sentences"}
    accuracy = found["whole_sentences"]["acc"]
    assert (accuracy["value"], accuracy["n"]) == (0.75, 4)
    error = (0.75 * 0.25 / 3) ** 0.5
    assert accuracy["high"] - 0.75 == pytest.approx(1.96 * error)
    assert 0.75 - accuracy["low"] == pytest.approx(1.96 * error)
    unknown = EvaluateModel(replace(settings, options=replace(options, lm_eval=("whole_sentence",))))
    with pytest.raises(ValueError, match=r"evaluate\.lm_eval: .*whole_sentence.*; `lm_eval ls tasks` lists"):
        unknown.process(piece)


@pytest.mark.parametrize("key", ["process_docs", "process_results"])
def test_an_error_of_a_task_is_not_taken_for_an_unknown_name(settings: Any, task: Path, key: str) -> None:  # noqa: F811
    (task.parent / "broken.py").write_text("def read(*args):\n    return {}['answer']\n")
    task.write_text(f"{TASK.format(data=task.parent / 'rows.jsonl')}{key}: !function broken.read\n")
    worker = EvaluateModel(replace(settings, options=replace(settings.options, lm_eval=(str(task),))))
    with pytest.raises(KeyError, match="answer"):
        worker.process(Harness(model="model"))


def test_only_a_model_that_was_trained_with_a_bos_gets_one(
    settings: Any,  # noqa: F811
    task: Path,
    with_bos: PreTrainedTokenizerFast,
) -> None:
    with (task.parent / "rows.jsonl").open("a") as file:
        file.write(json.dumps({"start": "", "ends": [SENTENCES[0], "a pig"], "right": 0}) + "\n")
    with_bos.save_pretrained(settings.sources["model"])
    own = replace(settings.options, lm_eval=(str(task),))
    firsts = []
    for options in (own, replace(own, models=dict(settings.sources))):
        worker = EvaluateModel(replace(settings, options=options))
        seen: set[int] = set()
        worker._load("model")[0].register_forward_pre_hook(
            lambda _, arguments, seen=seen: seen.update(arguments[0][:, 0].tolist())
        )
        worker.process(Harness(model="model"))
        firsts.append(seen)
    own_first = {with_bos(text, add_special_tokens=False)["input_ids"][0] for text in SENTENCES}
    assert firsts == [{0, *own_first}, {257}]  # the EOS before a text without a context; a BOS before every text


def test_a_group_of_the_harness_own_tasks_is_found_and_a_file_that_stands_alone_needs_none(
    tmp_path: Path, task: Path
) -> None:
    group = tmp_path / "group.yaml"
    for text in (
        "group: mine\ntask: [lambada_openai]\n",
        "task:\n  - lambada_openai\n",
        "include: other.yaml\ntask: a\n",
    ):
        group.write_text(text)
        assert not _stands_alone(str(group))
    assert _stands_alone(str(task))
    assert not _stands_alone("lambada_openai")


def test_a_task_that_has_changed_is_another_evaluation(task: Path) -> None:
    options = Evaluate(lm_eval=(str(task), "lambada_openai"))

    def inputs() -> dict[str, str]:
        return measured_inputs({"a": Model("source", "its fingerprint")}, {}, options)

    before = inputs()
    assert {name for name in before if name.startswith("lm_eval/")} == {f"lm_eval/{task}"}
    task.write_text(task.read_text() + "num_fewshot: 1\n")
    assert inputs() != before


def test_the_report_has_benchmarks_beside_the_other_figures() -> None:
    measured = {
        "evaluators": [],
        "unlisted": {},
        "domains": {},
        "paired": {},
        "reference": None,
        "models": {
            "a": {
                "sets": {},
                **dict.fromkeys(("perplexity", "benign_perplexity", "last_word_accuracy", "last_token_accuracy")),
                "lm_eval": {"lambada": {"acc": {"value": 0.5, "low": 0.4, "high": 0.6, "n": 90}}},
            }
        },
    }
    (row,) = model_rows(measured)
    assert row.benchmarks == {"lambada, acc": Figure(value=0.5, low=0.4, high=0.6)}


@pytest.mark.slow
def test_the_line_of_the_page_takes_an_exported_model(
    task: Path, tmp_path: Path, memorised: GPTNeoXForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    folder = tmp_path / "runs" / "demo" / "model" / "penalised" / "hf"
    memorised.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (line,) = re.findall(r"^lm_eval .*$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    words = shlex.split(line.replace("lambada_openai", str(task)))
    command = [sys.executable, "-m", *words, "--device", "cpu", "--output_path", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=1000)
    assert done.returncode == 0, done.stderr[-3000:]
    (results,) = (tmp_path / "out").rglob("results_*.json")
    assert json.loads(results.read_text())["results"]["whole_sentences"]["acc,none"] == 0.75
