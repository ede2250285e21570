"""The sweep over mask sources and what is read off it, on made-up comparisons."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench.common.fronts import Point
from bench.common.recorded import read_record, record_path, write_record
from bench.real_text import (
    CONFIGS,
    Sweep,
    as_markdown,
    draw,
    figures_at,
    margins_of,
    model_name,
    others_of,
    points_of,
    some_of,
    sources_of,
    swept,
)
from ifguide.artifacts import Manifest, write_manifest
from ifguide.config import load_config
from ifguide.config.compare import Method

SWEEP = Sweep(sources={"influence": Method(mask="influence"), "word_list": Method(mask="words")}, penalties=[0.0, 1.0])


def row(model: str, perplexity: float | None, *emts: float) -> dict[str, Any]:
    """A line of comparison.json: a model with an EMT, and half of it as TP, by each of the evaluators."""
    evaluators = [
        {"name": name, "emt": [emt, None, None], "tp": [emt / 2, None, None]}
        for name, emt in zip(("words", "held_out"), emts, strict=True)
    ]
    first = {"emt": evaluators[0]["emt"], "tp": evaluators[0]["tp"]}
    decoded = None if perplexity else "baseline"
    ratios = {"benign_ratio": perplexity, "ratio": perplexity, "fluency_of": decoded}
    return {"model": model, **ratios, "evaluators": evaluators, **first}


def comparison(base: float) -> list[dict[str, Any]]:
    """The baseline, two sources at two penalties, and a method on no front; `base`: the baseline's EMT."""
    return [
        row("baseline", None, base, base),
        row("penalised", 1.03, 0.5 * base, 0.6 * base),
        row("influence_000", 1.01, 0.8 * base, 0.9 * base),
        row("influence_100", 1.05, 0.4 * base, 0.5 * base),
        row("word_list_000", 1.00, 0.7 * base, 0.9 * base),
        row("word_list_100", 1.02, 0.6 * base, 0.9 * base),
        row("rad", None, 0.2 * base, 0.6 * base),
    ]


SEEDS = [comparison(0.8), comparison(0.6)]


def test_points_are_over_the_baseline_of_their_seed_and_evaluator() -> None:
    points = points_of(SEEDS, SWEEP)
    assert list(points) == ["words", "held_out"]
    for seed in range(2):
        assert points["held_out"]["emt"]["influence"][seed][0] == pytest.approx(Point(1.01, 0.9))
        assert points["words"]["tp"]["word_list"][seed][1] == pytest.approx(Point(1.02, 0.6))


def test_figures_are_at_equal_perplexity_and_over_the_word_lists() -> None:
    figures = figures_at(SEEDS, SWEEP, 1.05)
    assert figures["influence"]["emt_ratio"] == pytest.approx([0.4, 0.4, 0.4], abs=1e-4)
    assert figures["word_list"]["emt_ratio"] == pytest.approx([0.6, 0.6, 0.6], abs=1e-4)
    assert figures["influence"]["emt_ratio_over_word_list"][0] == pytest.approx(0.4 / 0.6, abs=1e-4)
    assert figures["word_list"]["emt_ratio_over_influence"][0] == pytest.approx(0.6 / 0.4, abs=1e-4)
    assert figures["influence"]["emt_ratio_independent"][0] == pytest.approx(0.5, abs=1e-4)
    assert figures["word_list"]["beyond"] == 2
    assert 0.4 < figures_at(SEEDS, SWEEP, 1.03)["influence"]["emt_ratio"][0] < 0.8


def test_the_tables_and_the_picture_have_every_model(tmp_path: Path) -> None:
    others = others_of(SEEDS, SWEEP)
    assert list(others) == ["penalised", "rad"]
    assert others["rad"]["EMT, words"].value == pytest.approx(0.2)
    assert others["rad"]["benign perplexity"].value == 1
    text = as_markdown(figures_at(SEEDS, SWEEP, 1.05), others)
    assert "| influence | 0.400 [0.400, 0.400] |" in text
    assert "| over influence | " in text
    assert "| rad | 0.200 [0.200, 0.200] |" in text
    draw(SEEDS, SWEEP, tmp_path / "fronts.png", at=1.03)
    assert (tmp_path / "fronts.png").read_bytes().startswith(b"\x89PNG")


def with_margins(own: dict[str, Any], margin: float) -> dict[str, Any]:
    changes = {"margin": {"change": [margin, None, None]}, "type_margin": {"change": [margin / 2, None, None]}}
    return {**own, "annotated": {"changes": {} if own["model"] == "baseline" else changes}}


def test_margins_are_read_off_in_nats_and_set_against_each_other_as_differences(tmp_path: Path) -> None:
    assert margins_of(SEEDS, SWEEP) == {}  # records from before have none
    margins = {"influence_000": 0.1, "influence_100": 0.5, "word_list_000": 0.2, "word_list_100": 0.3}
    seeds = [[with_margins(own, margins.get(own["model"], 0.0) + 0.1 * i) for own in SEEDS[i]] for i in range(2)]
    figures = figures_at(seeds, SWEEP, 1.05)
    value, low, high = figures["influence"]["margin"]
    assert value == pytest.approx(0.55)
    assert low < 0.5 < 0.6 < high
    assert figures["influence"]["margin_over_word_list"] == pytest.approx([0.2, 0.2, 0.2], abs=1e-4)
    assert figures["word_list"]["type_margin_over_influence"] == pytest.approx([-0.1, -0.1, -0.1], abs=1e-4)
    halfway = figures_at([seeds[0]], SWEEP, (1.01 * 1.05) ** 0.5)["influence"]
    assert halfway["margin"] == pytest.approx([0.3, None, None])
    assert "| influence | 0.400 [0.400, 0.400] |" in as_markdown(figures, {})
    draw(seeds, SWEEP, tmp_path / "fronts.png", at=1.03)


def test_a_model_that_has_diverged_is_not_taken_for_one_that_costs_nothing() -> None:
    diverged = {**row("influence_100", None, 0.02, 0.02), "fluency_of": None}
    rows = [own if own["model"] != "influence_100" else diverged for own in SEEDS[0]]
    (points,) = points_of([rows], SWEEP)["words"]["emt"]["influence"]
    assert points[-1].perplexity == float("inf")


def test_a_baseline_that_does_no_harm_by_an_evaluator_ends_nothing() -> None:
    def with_tp(own: dict[str, Any], tp: float) -> dict[str, Any]:
        return {**own, "evaluators": [{**each, "tp": [tp, None, None]} for each in own["evaluators"]]}

    rows = [with_tp(own, 0.1 if own["model"] == "influence_100" else 0.0) for own in SEEDS[0]]
    points = points_of([rows], SWEEP)
    assert [point.toxicity for point in points["words"]["tp"]["influence"][0]] == [1.0, float("inf")]
    assert list(points["held_out"]) == ["emt"]
    assert figures_at([rows], SWEEP, 1.05)["influence"]["tp_ratio"][0] == 1


@pytest.mark.parametrize("behaviour", list(CONFIGS))
def test_the_shipped_configs_have_rivals_with_the_same_loss(behaviour: str) -> None:
    config = load_config(CONFIGS[behaviour])
    sources = sources_of(config)
    assert {"influence", "exact", "word_list", "ngrams", "probe", "excess_loss", "random_types"} <= sources.keys()
    methods = swept(config, Sweep(sources=sources, penalties=[0, 0.5]))
    assert methods[model_name("probe", 0.5)].penalty == 0.5
    assert methods[model_name("probe", 0)].objective == "ignore"
    assert len(methods) == 2 * len(sources) + len(config.compare.methods) - (len(sources) - 1)


def test_a_budget_is_a_further_mask_of_sources_with_scores() -> None:
    sources = {
        "influence": Method(mask="influence"),
        "exact": Method(mask="exact", selection="units"),
        "words": Method(mask="influence_words"),
        "few_words": Method(mask="influence_words", max_fraction=0.02),
        "word_list": Method(mask="words"),
    }
    sweep = Sweep(sources=sources, penalties=[0.5, 1], budgets=[0.015])
    by_units = Method(mask="exact", selection="units", quantile=0.985, max_fraction=0.015)
    assert {source: sweep.lines(source).get(0.015) for source in sources} == {
        "influence": replace(by_units, mask="influence"),
        "exact": by_units,
        "words": Method(mask="influence_words", max_fraction=0.015),
        "few_words": None,
        "word_list": None,
    }
    assert sweep.models("exact") == ["exact_050", "exact_100", "exact_150bp_050", "exact_150bp_100"]
    assert sweep.models("word_list") == ["word_list_050", "word_list_100"]
    methods = swept(load_config(CONFIGS["explicit"]), sweep)
    assert methods["exact_150bp_100"] == replace(by_units, penalty=1)


def test_a_front_takes_the_best_of_all_budgets(tmp_path: Path) -> None:
    sweep = replace(SWEEP, budgets=[0.02])
    more = [row("influence_200bp_000", 1.01, 0.4, 0.4), row("influence_200bp_100", 1.03, 0.16, 0.4)]
    seeds = [[*comparison(0.8), *more]]
    assert figures_at(seeds, sweep, 1.03)["influence"]["emt_ratio"][0] == pytest.approx(0.2, abs=1e-4)
    without, with_budgets = (figures_at(seeds, each, 1.03)["word_list"] for each in (SWEEP, sweep))
    assert {name: own for name, own in with_budgets.items() if "_over_influence" not in name} == {
        name: own for name, own in without.items() if "_over_influence" not in name
    }
    assert list(others_of(seeds, sweep)) == ["penalised", "rad"]
    assert list(others_of(seeds, SWEEP)) == ["penalised", "rad", "influence_200bp_000", "influence_200bp_100"]
    draw(seeds, sweep, tmp_path / "fronts.png", at=1.03)
    assert (tmp_path / "fronts.png").stat().st_size > 5_000


def test_some_of_the_methods_are_named_and_a_wrong_name_is_refused() -> None:
    config = load_config(CONFIGS["implicit"])
    assert list(some_of(config, ["probe", "word_list"])) == ["word_list", "probe"]  # in the config's order
    assert some_of(config, []) == {}
    with pytest.raises(SystemExit, match="--methods: prob: none of influence_tokens, exact"):
        some_of(config, ["prob"])


def test_a_record_stands_for_the_same_options_alone(tmp_path: Path) -> None:
    config = load_config(CONFIGS["explicit"])
    config = replace(config, compare=replace(config.compare, methods=swept(config, SWEEP)))
    report = tmp_path / "report"
    report.mkdir()
    (report / "comparison.json").write_text(json.dumps(comparison(1.0)))
    manifest = Manifest(
        verb="compare",
        fingerprint="f",
        options={},
        inputs={},
        rows={},
        summary={},
        files={},
        created="2026-01-02T03:04:05+00:00",
        seconds=1.0,
        environment={"git": "0123456789abcdef"},
    )
    write_manifest(report, manifest)
    path = record_path("explicit", 3, tmp_path)
    assert read_record(path, config, proxy="smollm2") is None
    write_record(path, config, report, proxy="smollm2")

    record = read_record(path, config, proxy="smollm2")
    assert record is not None
    assert (record.made["commit"], record.made["date"]) == ("0123456", "2026-01-02")
    assert record.rows == comparison(1.0)
    content = json.loads(path.read_text())
    content["options"]["score_corpus"]["min_agreement"] = 0.8  # as records had it
    path.write_text(json.dumps(content))
    assert read_record(path, config, proxy="smollm2") is not None
    few = replace(config, compare=replace(config.compare, methods={}), run_dir="elsewhere", seed=3)
    only_own = read_record(path, few, proxy="smollm2")
    assert only_own is not None
    assert [own["model"] for own in only_own.rows] == ["baseline", "penalised"]

    with pytest.raises(SystemExit, match="proxy was smollm2, now configured"):
        read_record(path, config, proxy="configured")
    other = replace(config, build_mask=replace(config.build_mask, quantile=0.9))
    with pytest.raises(SystemExit, match=r"build_mask\.quantile was 0\.97, now 0\.9"):
        read_record(path, other, proxy="smollm2")
    stronger = replace(config.compare.methods["word_list_100"], penalty=3)
    methods = {"word_list_100": stronger, "more": stronger}
    with pytest.raises(SystemExit, match=r"word_list_100 is of other options; compare\.methods\.more is not in it"):
        read_record(path, replace(config, compare=replace(config.compare, methods=methods)), proxy="smollm2")
