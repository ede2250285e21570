"""What fine-tuning with each mask costs: the figures of a comparison's row, and continuations under another model."""

from __future__ import annotations

import math
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch.nn.functional import log_softmax

from bench.finetune import (
    CONFIGS,
    ORIGINAL,
    as_markdown,
    continuation_perplexity,
    continuations,
    figures_of,
    generations_of,
)
from ifguide.config import load_config
from ifguide.run import Run
from tests.tokenizers import byte_level
from tests.unit.evaluation.small import tiny_model

ROOT = Path(__file__).parents[3]
ROW = {
    "model": "words",
    "masked_share": 0.0125,
    "tp": [0.25, 0.2, 0.3],
    "ratio": 1.5,
    "benign_ratio": 1.02,
    "last_word_accuracy": 0.125,
    "distinct_2": 0.9,
    "annotated": {"changes": {"annotated_nll": {"change": [3, 2, 4]}, "margin": {"change": [0.125, 0.1, 0.15]}}},
    "evaluators": [{"name": "a", "emt_ratio": [0.5, 0.4, 0.6]}, {"name": "b", "emt_ratio": [0.75, 0.5, 1.0]}],
}


def test_a_row_has_the_ratios_of_every_evaluator_and_the_benign_perplexity() -> None:
    figures = figures_of(ROW)
    assert figures["emt_ratio"] == {"a": [0.5, 0.4, 0.6], "b": [0.75, 0.5, 1.0]}
    assert (figures["tp"], figures["perplexity_ratio"], figures["masked"]) == (0.25, 1.02, 0.0125)
    assert figures["margins"] == {"margin": [0.125, 0.1, 0.15]}
    assert figures_of({**ROW, "benign_ratio": None})["perplexity_ratio"] == 1.5
    assert figures_of({**ROW, "annotated": None})["margins"] == {}


def test_the_table_leaves_empty_what_the_first_model_has_not() -> None:
    nothing = dict.fromkeys(("masked_share", "ratio", "benign_ratio"))
    evaluators = [{"name": name, "emt_ratio": None} for name in ("a", "b")]
    first = figures_of({**ROW, **nothing, "annotated": {"changes": {}}, "evaluators": evaluators})
    measured = {"fluency": 20.0, "recognition": [0.9, 0.85, 0.95]}
    *_, plain, words = as_markdown({"plain": first | measured, "words": figures_of(ROW) | measured}).splitlines()
    assert [cell.strip() for cell in plain.split("|")[1:6]] == ["plain", "", "", "", "0.250"]
    assert "1.25%" in words
    assert "0.750 [0.500, 1.000]" in words
    assert "0.125 [0.100, 0.150]" in words
    assert "+2.0%" in words


def test_continuations_are_taken_from_all_files_at_equal_distances(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("seed: 0")
    for shard in range(2):
        rows = {"prompt": [f"p{shard}{i}" for i in range(5)], "continuation": [f"c{shard}{i}" for i in range(5)]}
        pq.write_table(pa.table(rows), tmp_path / f"shard-{shard:05d}.parquet")
    assert [prompt for prompt, _ in continuations(tmp_path, most=4)] == ["p00", "p03", "p11", "p14"]
    assert continuations(tmp_path, most=100)[-1] == ("p14", "c14")


def test_the_continuations_are_of_the_run_or_of_its_comparison_and_never_of_a_methods_samples(tmp_path: Path) -> None:
    run = Run(config=load_config(ROOT / CONFIGS["explicit"], [f"run_dir={tmp_path}"]))
    samples = run.comparison / "samples" / "generations"
    places = [run.generations("baseline"), run.comparison / "generations" / "rad", samples / "baseline"]
    for place in places:
        (place / "prompts").mkdir(parents=True)
    assert [generations_of(run, name).parent for name in ("baseline", "rad")] == places[:2]


def test_continuations_are_judged_by_their_own_tokens_after_their_prompts() -> None:
    model, tokenizer = tiny_model().double(), byte_level()
    pairs = [("one two", " three four"), ("a", " b"), ("nothing follows", "  ")]
    total, count = 0.0, 0
    for prompt, text in pairs[:2]:
        ids = tokenizer(prompt + text, add_special_tokens=False)["input_ids"]
        start = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
        log_p = log_softmax(model(torch.tensor([ids])).logits[0].detach(), dim=-1)
        for place in range(start, len(ids)):
            total -= float(log_p[place - 1, ids[place]])
            count += 1
    assert continuation_perplexity(model, tokenizer, pairs) == pytest.approx(math.exp(total / count), rel=1e-9)


@pytest.mark.parametrize("behaviour", list(CONFIGS))
def test_the_config_goes_on_from_the_model_that_it_evaluates_beside(behaviour: str) -> None:
    config = load_config(ROOT / CONFIGS[behaviour])
    assert config.pretrain.init_from == config.evaluate.models[ORIGINAL] == config.proxy.source == config.target.source


def test_hate_is_told_and_judged_as_where_models_are_trained_from_scratch() -> None:
    own, other = (
        load_config(ROOT / "configs" / name) for name in ("real_text_finetune_implicit.yaml", "real_text_implicit.yaml")
    )
    for name in ("prompts", "classifier", "classifiers", "check_data"):
        assert getattr(own.evaluate, name) == getattr(other.evaluate, name)
    assert own.build_query == other.build_query
