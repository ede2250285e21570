"""The figures of an evaluation, from the files of its generations and scores."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ifguide import schemas
from ifguide.artifacts import open_artifact
from ifguide.config import Evaluate, config_from_mapping
from ifguide.evaluation import Bootstrap
from ifguide.evaluation.figures import _domains, _gaps, _groups, measure, scored_file
from ifguide.evaluation.prompts import PROMPTS
from ifguide.evaluation.subjects import Evaluation, Model
from ifguide.toxicity import GroupedPrompt, PromptRow


def test_groups_of_one_size_do_not_share_their_draws() -> None:
    values = np.random.default_rng(0).random(40)
    part = {"emt/x": (values, np.ones(40)), "rep_4": (values, np.ones(40))}
    domains = {"race/a": "race", "race/b": "race", "gender/c": "gender"}
    groups = {"all": part, **dict.fromkeys(domains, part)}
    bootstrap = Bootstrap(samples=200, seed=0)
    gaps = _gaps(groups, domains, bootstrap)
    assert {domain: set(found) for domain, found in gaps.items()} == {"race": {"emt/x"}}
    found = gaps["race"]["emt/x"]
    assert (found.value, found.n) == (0, 80)
    assert found.samples.min() > 0  # with the same draws of the same values it would be zero in every replicate
    # models stay paired: the same groups have the same draws
    np.testing.assert_array_equal(_gaps(groups, domains, bootstrap)["race"]["emt/x"].samples, found.samples)


def test_a_group_with_a_slash_in_its_name_is_of_its_prompts_domain() -> None:
    names = ("gay/lesbian", "trans", "trans", "")
    rows = [GroupedPrompt(row=i, prompt="p", group=group) for i, group in enumerate(names)]
    rows += [GroupedPrompt(row=4 + i, prompt="p", group=group, domain="race") for i, group in enumerate(("a/b", "c"))]
    domains = {"gay/lesbian": "", "race/a/b": "race", "race/c": "race", "trans": ""}
    assert _domains(rows) == domains
    masks = _groups("further", rows, np.zeros(0, bool), Evaluate())
    assert list(masks) == ["all", *domains]
    assert [mask.sum() for mask in masks.values()] == [6, 1, 1, 1, 2]
    values = np.arange(6.0)
    parts = {group: {"emt/x": (values[mask], np.ones(mask.sum()))} for group, mask in masks.items()}
    gaps = _gaps(parts, domains, Bootstrap(samples=100, seed=0))
    assert {domain: found["emt/x"].value for domain, found in gaps.items()} == {"groups": 1.5, "race": 1.0}


WORDS = ("pig", "old fool")
PROMPT_TEXTS = ("You PIG", "It was a", "The", "Nothing of")
TEXTS = (("a pig", "fine"), ("rude", "you old fool"), ("pig pig", "pigs"), ("ok", "pig"))
SCORES = ((0.9, 0.2), (0.6, 0.8), (0.7, 0.3), (0.1, 0.95))


def evaluation(
    folder: Path,
    word_list: tuple[str, ...],
    models: tuple[str, ...] = ("first", "second"),
    reference: str | None = None,
) -> Evaluation:
    """Models with two continuations of four prompts, all empty but for those of `first`; scores of three classes."""
    options = {
        "prompts": "unread.jsonl",
        "continuations": 2,
        "word_list": list(word_list),
        "classifiers": {"own": "alt-profanity-check"},
        "bootstrap_samples": 100,
    }
    prompts = [
        PromptRow(row=i, prompt=text, continuation="", prompt_scores={}, continuation_scores={})
        for i, text in enumerate(PROMPT_TEXTS)
    ]
    for model in models:
        rows = [
            {"model": model, "prompt_row": i, "sample": k, "prompt": PROMPT_TEXTS[i], "tokens": [1, 2, 3 + k]}
            | {"continuation": TEXTS[i][k] if model == "first" else ""}
            for i in range(4)
            for k in range(2)
        ]
        place = folder / "generations" / model / PROMPTS
        artifact = open_artifact(place, verb="evaluate", options={}, inputs={}, config_yaml="")
        pq.write_table(pa.Table.from_pylist(rows, schema=schemas.GENERATIONS), place / "shard-0000000.parquet")
        artifact.finish([place / "shard-0000000.parquet"], rows={}, summary={})
        for row in rows:
            score = SCORES[row["prompt_row"]][row["sample"]]
            row["scores"] = [("toxicity", score), ("insult", 0.5), ("own", 1 - score)]
            del row["tokens"]
        path = scored_file(folder / "report", model, PROMPTS, 0)
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows, schema=schemas.CONTINUATIONS), path)
    return Evaluation(
        options=config_from_mapping({"evaluate": options}).evaluate,
        models={model: Model(model, model) for model in models},
        sets={PROMPTS: prompts},
        seed=0,
        block_size=8,
        report=folder / "report",
        generations={model: folder / "generations" / model for model in models},
        config_yaml="",
        reference=reference,
    )


def test_models_are_compared_with_a_reference_on_the_same_prompts(tmp_path: Path) -> None:
    flags = {"flagged": [False] * 4, "grouped_by": {"label": 0, "classifier": 4}}
    models = ("base", "first", "second")
    found = measure(evaluation(tmp_path, WORDS, models, reference="first"), flags)
    assert found["reference"]["model"] == "first"
    assert set(found["reference"]["paired"]) == {"second"}  # the first model's is among the others' differences
    change = found["reference"]["paired"]["second"]
    assert (change.pop("margin"), change.pop("type_margin")) == (None, None)  # there is no annotated text
    assert set(change) == {"emt", "tp"}
    unlisted = change["emt"]["toxicity without listed words"]
    assert unlisted["ratio"] == pytest.approx((0.9 + 0.8 + 0.7 + 0.95) / 1.2)
    alone = measure(evaluation(tmp_path / "alone", WORDS), flags)
    paired = alone["paired"]["second"]["sets"][PROMPTS]["groups"]["all"]
    assert change == {name: paired[name] for name in ("emt", "tp")}  # as against a first model of the same texts
    for reference in (None, "base", "not there"):
        assert measure(evaluation(tmp_path / f"{reference}", WORDS, models, reference), flags)["reference"] is None


def test_continuations_with_a_listed_word_count_as_zero_in_figures_of_their_own(tmp_path: Path) -> None:
    flags = {"flagged": [True, False, False, True], "grouped_by": {"label": 0, "classifier": 4}}
    found = measure(evaluation(tmp_path, WORDS), flags)
    assert found["evaluators"] == ["toxicity", "own"]  # and not `insult`, another label of the main classifier
    assert found["domains"] == {}  # of further sets alone
    assert found["unlisted"] == {f"{name} without listed words": name for name in ("toxicity", "own")}
    groups = found["models"]["first"]["sets"][PROMPTS]["groups"]
    whole = groups["all"]
    assert list(whole["emt"]) == ["toxicity", "insult", "own", *found["unlisted"]]
    # left are .2 of the first prompt, .6 of the second, .3 of the third (`pigs` is no `pig`), .1 of the fourth
    assert whole["emt"]["toxicity without listed words"]["value"] == pytest.approx((0.2 + 0.6 + 0.3 + 0.1) / 4)
    assert whole["tp"]["toxicity without listed words"]["value"] == 0.25
    assert whole["mean"]["toxicity without listed words"]["value"] == pytest.approx((0.2 + 0.6 + 0.3 + 0.1) / 8)
    assert whole["emt"]["own without listed words"]["value"] == pytest.approx((0.8 + 0.4 + 0.7 + 0.9) / 4)
    assert whole["emt"]["toxicity"]["value"] == pytest.approx((0.9 + 0.8 + 0.7 + 0.95) / 4)
    assert whole["listed"]["value"] == 0.5
    assert {name: group["prompts"] for name, group in groups.items()} == {
        "all": 4,
        "with toxicity": 2,
        "without toxicity": 2,
        "with a listed word": 1,
        "without a listed word": 3,
    }
    assert groups["with a listed word"]["emt"]["toxicity"]["value"] == pytest.approx(0.9)
    second = found["models"]["second"]["sets"][PROMPTS]["groups"]["all"]  # of no word nothing is left out
    assert second["emt"]["toxicity without listed words"] == second["emt"]["toxicity"]
    paired = found["paired"]["second"]["sets"][PROMPTS]["groups"]["all"]["emt"]["toxicity without listed words"]
    assert paired["difference"] == pytest.approx((0.7 + 0.2 + 0.4 + 0.85) / 4)
    assert paired["ratio"] == pytest.approx((0.9 + 0.8 + 0.7 + 0.95) / 1.2)


def test_what_no_continuation_is_left_of_is_zero_and_no_list_has_no_such_figures(tmp_path: Path) -> None:
    flags = {"flagged": [False] * 4, "grouped_by": {"label": 0, "classifier": 4}}
    every = measure(evaluation(tmp_path / "every", ("pig", "fine", "rude", "old fool", "pigs", "ok")), flags)
    whole = every["models"]["first"]["sets"][PROMPTS]["groups"]["all"]
    figures = [whole[figure]["toxicity without listed words"]["value"] for figure in ("emt", "tp", "mean")]
    assert (figures, whole["listed"]["value"]) == ([0, 0, 0], 1)
    plain = measure(evaluation(tmp_path / "plain", ()), flags)
    assert plain["unlisted"] == {}
    groups = plain["models"]["first"]["sets"][PROMPTS]["groups"]
    assert list(groups) == ["all", "with toxicity", "without toxicity"]
    assert list(groups["all"]["emt"]) == ["toxicity", "insult", "own"]
    assert "listed" not in groups["all"]
    assert groups["all"]["emt"]["toxicity"] == whole["emt"]["toxicity"]
