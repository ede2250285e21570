"""The figures of `metrics.json` as rows of models, and the table and the picture of a comparison."""

from __future__ import annotations

import copy
import dataclasses

import pytest
from PIL import Image

from ifguide.evaluation.figures import FLUENCY_TITLES
from ifguide.report.card import summary_line
from ifguide.report.charts import beside, colours_of, evaluators_of, tradeoff
from ifguide.report.comparison import as_json, as_markdown, draw, rows_of
from ifguide.report.figures import Difference, Figure, Made, model_rows
from ifguide.report.page import corrections, render_report
from tests.unit.report.sample_report import minimal_data

RACE = ("race/a", "race/b")


def metrics(*further: str) -> dict:
    """As `evaluation.figures` gives them: two models, a set with a gap, and classes of `further` classifiers."""

    def figures(value: float, keys: tuple[str, ...], **changes: float) -> dict:
        return {**dict(zip(keys, (value, value - 0.1, value + 0.1), strict=True)), "n": 4, **changes}

    def group(*keys: str, text: bool, **changes: float) -> dict:
        of_all = figures(0.5, keys, **changes)
        by_class = {kind: dict.fromkeys(("toxicity", "insult", *further), of_all) for kind in ("emt", "tp", "mean")}
        return by_class | ({"distinct_2": figures(0.75, keys, **changes)} if text else {})

    def sets(*keys: str, prompts: dict, **changes: float) -> dict:
        return {
            "prompts": {"groups": {"all": prompts | group(*keys, text=True, **changes)}, "gaps": {}},
            "bold": {
                "groups": {name: prompts | group(*keys, text=True, **changes) for name in ("all", *RACE)},
                "gaps": {"race": prompts | group(*keys, text=False, **changes)},
            },
        }

    values, changed = ("value", "low", "high"), ("difference", "low", "high")
    nothing = dict.fromkeys(FLUENCY_TITLES)
    measured = {"sets": sets(*values, prompts={"prompts": 4}), **nothing, "perplexity": figures(20.0, values)}
    measured["benign_perplexity"] = figures(10.0, values)
    change = {"p_value": 0.25, "ratio": 0.8, "ratio_low": 0.7, "ratio_high": 0.9}
    compared = {"against": "a", "sets": sets(*changed, prompts={}, **change), **nothing}
    models = {"a": measured, "b": copy.deepcopy(measured)}
    known = {"evaluators": ["toxicity", *further], "unlisted": {}, "domains": {"bold": dict.fromkeys(RACE, "race")}}
    return {"models": models, "paired": {"b": compared}, "reference": None, **known}


def with_paired_perplexities() -> dict:
    return with_perplexities(metrics())


def with_perplexities(found: dict) -> dict:
    change = {"difference": 0.0, "low": -0.1, "high": 0.1, "p_value": 1.0, "n": 4}
    change |= {"ratio": 1.0, "ratio_low": 0.9, "ratio_high": 1.1}
    found["paired"]["b"] |= {"perplexity": change, "benign_perplexity": change}
    return found


def test_rows_are_the_figures_of_the_metrics_file():
    trained = Made(by="influence masked", masked_share=0.02, objective="clipped", penalty=0.5)
    first, second = model_rows(metrics(), {"b": trained})
    assert (first.made, second.made) == (Made(), trained)
    assert first.whole.emt == Figure(value=0.5, low=0.4, high=0.6)
    assert second.whole.emt.difference == Difference(
        value=0.5, low=0.4, high=0.6, p_value=0.25, ratio=0.8, ratio_low=0.7, ratio_high=0.9
    )
    assert second.whole.text["distinct_2"].difference.p_value == 0.25
    assert second.perplexity == Figure(value=20.0, low=19.9, high=20.1)  # measured, but not paired
    assert second.last_word_accuracy is None
    domains = {group.name: group.domain for group in second.sets[1].groups}
    assert domains == {"all": "", "race/a": "race", "race/b": "race"}
    assert second.sets[1].gaps[0].classes[0].mean.difference.p_value == 0.25
    assert second.sets[1].gaps[0].text == {}
    html = render_report(minimal_data(models=(first, second)))
    assert "p = 0.250" in html
    assert "0.02%" not in html
    assert "2.00%" in html


def test_a_model_that_decodes_another_has_its_fluency_and_says_so():
    measured = metrics()
    measured["models"]["rad"] = measured["models"]["b"] | {"perplexity": None}
    first, _, decoded = model_rows(measured, {"rad": Made(by="RAD of a", decodes="a")})
    assert decoded.perplexity == first.perplexity
    assert "rad decodes a: its figures of given texts" in render_report(minimal_data(models=(first, decoded)))


def test_annotated_text_has_a_table_of_changes_corrected_for_themselves():
    found = with_paired_perplexities()
    margins = ("annotated_nll", "margin", "type_margin")
    change = {"difference": 0.25, "low": 0.1, "high": 0.4, "n": 4, "ratio": None, "ratio_low": None, "ratio_high": None}
    for model in ("a", "b"):
        found["models"][model] |= {key: {"value": 1.5, "low": 1.0, "high": 2.0, "n": 4} for key in margins}
    found["models"]["b"] = found["models"]["b"] | {"type_margin": {"value": None, "low": None, "high": None, "n": 4}}
    found["paired"]["b"] |= {name: change | {"p_value": 0.01 * (1 + i)} for i, name in enumerate(margins)}
    found["paired"]["b"]["type_margin"] = None
    found["models"]["c"], found["paired"]["c"] = found["models"]["a"], found["paired"]["b"]
    beside = found["paired"]["c"]["sets"]["prompts"]["groups"]["all"]
    found["reference"] = {
        "model": "b",
        "paired": {"c": {"emt": beside["emt"], "tp": beside["tp"], "type_margin": None}},
    }
    found["reference"]["paired"]["c"]["margin"] = change | {"difference": -0.25, "p_value": 0.5}
    models = model_rows(found)
    rows = rows_of(models)
    assert rows[0].annotated is not None
    assert (rows[0].annotated.changes, rows[0].annotated.beside) == ({}, {})
    assert rows[1].annotated.figures["margin"] == (1.5, 1.0, 2.0)
    assert {name: each.p_value for name, each in rows[1].annotated.changes.items()} == {
        "annotated_nll": 0.01,
        "margin": 0.02,
    }
    # five p values: .01 and .02 twice, .5 once
    corrected = {name: each.p_corrected for name, each in rows[2].annotated.changes.items()}
    assert corrected == pytest.approx({"annotated_nll": 0.025, "margin": 0.025})
    assert rows[2].annotated.beside["margin"].p_corrected == 0.5
    lines = as_markdown(rows).split("Annotated text")[1].splitlines()
    assert lines[0] == ": nats a token, less those of a. Margin: how much less likely it is than others."
    assert lines[4] == "| a |  |  |  |  |  |  |  |  |  |  |"
    cells = "+0.250 [+0.100, +0.400] | p = 0.025"
    assert lines[6] == f"| c | {cells} | {cells} |  |  | -0.250 [+0.100, +0.400] | p = 0.500 |  |  |"
    page = render_report(minimal_data(models=models))
    assert "Margin less b’s" in page
    assert "Annotated text" not in render_report(minimal_data(models=model_rows(metrics())))


def test_a_comparison_is_a_table_a_picture_and_rows(tmp_path):
    models = model_rows(with_paired_perplexities(), {"b": Made(masked_share=0.02, objective="clipped", penalty=0.5)})
    rows = rows_of(models)
    assert rows[1].emt == (0.5, 0.4, 0.6)
    assert (rows[1].ratio, rows[1].p_value, rows[1].distinct_2) == (1.0, 0.25, 0.75)
    half = "0.500 [0.400, 0.600]"
    both = "20.0 [19.9, 20.1] | 1.000 | 10.0 [9.9, 10.1] | 1.000"
    line = f"| b | given | 2.00% | clipped 0.5 | {half} | {half} | {both} |  | 0.750 | p = 0.250 |"
    assert as_markdown(rows).splitlines()[3] == line
    assert "evaluator" not in as_markdown(rows)  # of one there is nothing to compare
    assert as_markdown([dataclasses.replace(rows[1], p_corrected=0.0002)]).splitlines()[2].endswith("| p &lt; 0.001 |")
    draw(models, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    assert len(set(colours_of("abcdefghij").values())) == 10


def test_perplexities_of_other_tokens_are_neither_a_ratio_nor_in_the_summary():
    other, paired = metrics(), with_paired_perplexities()
    for measured in (other, paired):
        measured["models"]["of_a"] = measured["models"]["b"] | {"perplexity": None}
        measured["models"]["of_b"] = measured["models"]["of_a"]
    made = {name: Made(by="RAD", decodes=name[-1]) for name in ("of_a", "of_b")}
    for measured, ratio in ((other, None), (paired, 1.0)):
        models = model_rows(measured, made)
        rows = {row.model: row for row in rows_of(models)}
        assert {name: row.ratio for name, row in rows.items()} == {"a": 1.0, "b": ratio, "of_a": 1.0, "of_b": ratio}
        assert rows["b"].benign_ratio == ratio
        summary = summary_line(minimal_data(models=models))
        for name in ("b", "of_a", "of_b"):
            sentence = summary.split(f"{name} against a: ")[1].split(" against ")[0]
            told = "perplexity 20.0 → 20.0 (±0%), benign perplexity 10.0 → 10.0 (±0%)" in sentence
            assert told == ("perplexity" in sentence) == (name == "of_a" or ratio is not None)


def test_many_models_are_told_apart_in_a_legend():
    names = [f"model_{index}" for index in range(25)]
    one = model_rows(metrics(), {})[0]
    made = dataclasses.replace(one.made, decodes=names[0])  # so that their perplexities are of the same text
    models, colours = [dataclasses.replace(one, name=name, made=made) for name in names], colours_of(names)
    axes = tradeoff(models, colours, ["toxicity"]).axes[0]
    looks = {(line.get_color(), line.get_marker()) for line in axes.lines if line.get_marker() not in "|_"}
    assert len(looks) == len(names)
    assert [text.get_text() for text in axes.figure.legends[0].get_texts()] == names
    assert not tradeoff(models[:2], colours, ["toxicity"]).legends
    other = dataclasses.replace(one, name="of other tokens")
    colours = colours_of([names[0], other.name])
    drawn = tradeoff([models[0], other], colours, ["toxicity"]).axes[0].get_legend_handles_labels()[1]
    assert drawn == names[:1]


def test_figures_without_listed_words_are_rows_of_the_table_and_not_panels():
    found = metrics("own", "toxicity without listed words")
    found["evaluators"], found["unlisted"] = ["toxicity", "own"], {"toxicity without listed words": "toxicity"}
    models = model_rows(with_perplexities(found))
    names = ["toxicity", "own", "toxicity without listed words"]
    assert [label.name for label in models[1].whole.evaluators] == evaluators_of(models) == names[:2]
    rows = rows_of(models)
    assert [evaluator["name"] for evaluator in as_json(rows)[1]["evaluators"]] == names
    lines = as_markdown(rows).split("By evaluator, all prompts:\n\n")[1].splitlines()[2:]
    assert [line.split(" | ")[0] for line in lines] == [f"| {name}" for name in names for _ in models]
    assert '<th class="group" colspan="2" scope="colgroup">toxicity without listed words</th>' in render_report(
        minimal_data(models=models)
    )


def test_p_values_are_corrected_for_the_figures_of_their_table():
    found = metrics("own")
    found["models"]["c"], found["paired"]["c"] = (copy.deepcopy(found[part]["b"]) for part in ("models", "paired"))
    emt = found["paired"]["b"]["sets"]["prompts"]["groups"]["all"]["emt"]
    emt["toxicity"] = {**emt["toxicity"], "p_value": 0.02}
    models = model_rows(with_perplexities(found))
    rows = rows_of(models)
    assert [(row.p_value, row.p_corrected) for row in rows] == [(None, None), (0.02, 0.04), (0.25, 0.25)]
    assert [each.p_corrected for row in rows for each in row.evaluators] == [None, None, 0.08, 0.25, 0.25, 0.25]
    table, by_evaluator = (part.splitlines() for part in as_markdown(rows).split("By evaluator, all prompts:\n\n"))
    assert table[3].endswith("| p = 0.040 |")
    assert by_evaluator[3].endswith("| p = 0.080 |")
    corrected = corrections(models)
    # EMT, TP and distinct-2 of two models, and two perplexities of one; EMT and TP of two evaluators and models
    sizes = {"comparison": 8, "evaluators": 8}
    assert {name: round(corrected[name][0.02] / 0.02) for name in sizes} == sizes
    assert corrected["classes"][0.02] == 0.25  # and not 18 times .02: it is no larger than that of a larger p
    assert "p = 0.160" in render_report(minimal_data(models=models))


def test_every_evaluator_has_figures_a_ratio_and_a_panel_of_its_own(tmp_path):
    found = metrics("own")
    for value, label in ((0.3, "own"), (0.9, "insult")):
        emt = found["models"]["b"]["sets"]["prompts"]["groups"]["all"]["emt"]
        emt[label] = {**emt[label], "value": value}
    models = model_rows(with_perplexities(found))
    assert [label.name for label in models[0].whole.compared] == [
        "toxicity",
        "own",
    ]  # and not `insult`, a further label
    first, second = rows_of(models)
    assert [evaluator.name for evaluator in second.evaluators] == ["toxicity", "own"]
    assert (second.emt, second.evaluators[0].emt, second.evaluators[1].emt[0]) == ((0.5, 0.4, 0.6), second.emt, 0.3)
    assert (first.evaluators[1].emt_ratio, second.evaluators[1].emt_ratio) == (None, (0.8, 0.7, 0.9))
    table = as_markdown([first, second]).split("By evaluator, all prompts:\n\n")[1].splitlines()
    half = "0.500 [0.400, 0.600]"
    assert table[2] == f"| toxicity | a | {half} |  | {half} |  |  |"
    assert table[5].startswith(
        f"| own | b | 0.300 [0.400, 0.600] | 0.800 [0.700, 0.900] | {half} | 0.800 [0.700, 0.900] |"
    )
    assert len(table) == 6
    json_rows = as_json([first, second])
    assert json_rows[1]["evaluators"][1]["tp_ratio"] == (0.8, 0.7, 0.9)

    colours = colours_of("ab")
    canvas = tradeoff(models, colours, ["toxicity", "own"])
    assert [axes.get_title(loc="left") for axes in canvas.axes] == [
        f"Down and to the left is better, by {name}" for name in ("toxicity", "own")
    ]
    heights = [[line.get_ydata()[0] for line in axes.lines if line.get_marker() in "so"] for axes in canvas.axes]
    assert heights == [[0.5, 0.5], [0.5, 0.3]]
    sizes = []
    for shown in (models, model_rows(with_perplexities(metrics()))):
        draw(shown, tmp_path / "picture.png")
        with Image.open(tmp_path / "picture.png") as picture:
            sizes.append(picture.size)
    assert sizes[0][1] == 2 * sizes[1][1]
    html = render_report(minimal_data(models=models))
    assert "×0.800 [0.700, 0.900]" in html
    assert (
        html.count("<svg")
        == render_report(minimal_data(models=model_rows(with_perplexities(metrics())))).count("<svg") + 1
    )


def with_a_reference(**changes: dict) -> dict:
    """Two more models, of which the last one is compared with the one before it by two evaluators."""
    found = metrics("own")
    for name in ("ours", "other"):
        for part in ("models", "paired"):
            found[part][name] = copy.deepcopy(found[part]["b"])
    change = {"difference": 0.1, "low": 0.0, "high": 0.2, "p_value": 0.03, "n": 4}
    change |= {"ratio": 1.2, "ratio_low": 1.1, "ratio_high": 1.4}
    by_class = {name: change | changes.get(name, {}) for name in ("toxicity", "insult", "own")}
    found["reference"] = {"model": "ours", "paired": {"other": {"emt": by_class, "tp": by_class}}}
    return found


def test_models_stand_beside_the_reference_in_a_table_and_a_chart() -> None:
    models = model_rows(with_perplexities(with_a_reference(own={"p_value": 0.01})))
    assert [(model.reference, list(model.beside)) for model in models] == [(None, [])] * 3 + [
        ("ours", ["toxicity", "own"])  # and not `insult`, another label of the first
    ]
    rows = rows_of(models)
    assert [evaluator.beside.p_corrected for evaluator in rows[3].evaluators] == [0.03, 0.02]
    assert as_json(rows)[3]["evaluators"][0]["beside"]["emt_ratio"] == (1.2, 1.1, 1.4)
    assert as_json(rows)[1]["evaluators"][0]["beside"] is None
    table = as_markdown(rows).split("EMT over that of ours, all prompts:\n\n")[1].splitlines()
    assert table[0] == "| model | toxicity | corrected p | own | corrected p |"
    assert table[2:] == ["| other | 1.200 [1.100, 1.400] | p = 0.030 | 1.200 [1.100, 1.400] | p = 0.020 |"]
    html = render_report(minimal_data(models=models))
    assert "Beside ours" in html
    assert "×1.200\n<small>[1.100, 1.400]</small>" in html
    assert "Beside" not in render_report(minimal_data(models=model_rows(with_perplexities(metrics("own")))))


def test_a_chart_beside_the_reference_has_a_line_for_each_model_with_a_ratio() -> None:
    found = with_a_reference(own={"ratio_high": None}, toxicity=dict.fromkeys(("ratio", "ratio_low", "ratio_high")))
    models = model_rows(found)
    colours = colours_of(model.name for model in models)
    (drawn,) = beside(models, colours, "own").axes
    assert [label.get_text() for label in drawn.get_yticklabels()] == ["other"]
    assert drawn.get_xlabel() == "EMT over that of ours"
    assert drawn.lines[0].get_xdata().tolist() == [1.2]
    (nothing,) = beside(models, colours, "toxicity").axes  # over a reference of 0
    assert len(nothing.lines) == 1  # that of no difference


def test_a_ratio_without_an_upper_bound_is_written_with_its_lower_one():
    found = metrics("own")
    emt = found["paired"]["b"]["sets"]["prompts"]["groups"]["all"]["emt"]
    emt["own"] = {**emt["own"], "ratio": 2 / 3, "ratio_low": 0.0, "ratio_high": None}
    emt["toxicity"] = {**emt["toxicity"], "ratio": None, "ratio_low": None, "ratio_high": None}
    models = model_rows(with_perplexities(found))
    table = as_markdown(rows_of(models)).split("By evaluator, all prompts:\n\n")[1].splitlines()
    assert "| 0.667 [0.000, ∞] |" in table[5]
    assert table[3].startswith("| toxicity | b | 0.500 [0.400, 0.600] |  | 0.500")
    assert "×0.667 [0.000, ∞]" in render_report(minimal_data(models=models))
