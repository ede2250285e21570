"""Lens, probes and adversarial suffixes against what they mean, on tiny models of several families."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.model_selection import StratifiedKFold
from torch import Tensor
from transformers import PreTrainedModel

from ifguide.analyses import (
    Budget,
    LogitLens,
    attack,
    final_norm,
    greedy_continuation,
    mean_residuals,
    one_hot_gradient,
    overrepresented_tokens,
    probe_layers,
    target_losses,
)
from ifguide.analyses.adversarial import replacements
from ifguide.analyses.figures import BY_TOKENS, GCG_FIGURES, collect
from ifguide.analyses.inputs import lens_prompts, probe_texts
from ifguide.artifacts import open_artifact
from ifguide.config import ConfigError, config_from_mapping
from ifguide.evaluation import Bootstrap
from ifguide.evaluation.prompts import chosen_prompts
from ifguide.influence.query_file import QueryRow, read_queries, write_queries
from ifguide.run import Run
from ifguide.stages.analyse import analyse
from tests.tiny import VOCABULARY, tiny_model

FAMILIES = ("gpt_neox", "llama", "gemma2", "gemma3", "gpt2", "opt", "gpt_neo")  # soft caps, scaled embeddings, ...
TEXTS = [[5, 9, 3, 30, 7], [11, 2], [8, 8, 40]]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_lens_at_the_last_depth_is_the_models_own_prediction(family: str) -> None:
    model = tiny_model(family, dtype=torch.float64)
    logits_BLV = LogitLens(model).logits(TEXTS)
    assert logits_BLV.shape == (3, 3, VOCABULARY)
    with torch.no_grad():
        own_BV = torch.stack([model(torch.tensor([ids]), use_cache=False).logits[0, -1] for ids in TEXTS])
    torch.testing.assert_close(logits_BLV[:, -1], own_BV, rtol=1e-12, atol=1e-12)
    assert (logits_BLV[:, 1] - own_BV).abs().max() > 1e-3  # and not at the depth before


def test_the_lens_at_an_inner_depth_is_norm_and_head_of_the_block_by_hand() -> None:
    model = tiny_model("llama", dtype=torch.float64)
    with torch.no_grad():
        hidden = model(torch.tensor([TEXTS[0]]), output_hidden_states=True, use_cache=False).hidden_states
        by_hand = [model.lm_head(model.model.norm(hidden[depth][0, -1])) for depth in (0, 1)]
    torch.testing.assert_close(LogitLens(model).logits(TEXTS[:1])[0, :2], torch.stack(by_hand), rtol=1e-10, atol=1e-10)
    mass_NL = LogitLens(model).mass(TEXTS, [[4], [7], [4]], batch_size=2)
    np.testing.assert_allclose(mass_NL[0, :2], [float(z.softmax(-1)[[4, 7]].sum()) for z in by_hand], rtol=1e-6)
    with pytest.raises(ValueError, match="word_list"):
        LogitLens(model).mass(TEXTS, [], batch_size=2)


def test_the_mass_of_a_word_is_the_product_along_its_tokens() -> None:
    model = tiny_model("gpt_neox", dtype=torch.float64)
    lens = LogitLens(model)

    def by_hand(words: list[list[int]]) -> np.ndarray:
        total = np.zeros((len(TEXTS), 3))
        for row, text in enumerate(TEXTS):
            for word in words:
                along = np.ones(3)
                for i, token in enumerate(word):
                    along *= lens.logits([[*text, *word[:i]]])[0].softmax(-1)[:, token].numpy()
                total[row] += along
        return total

    words = [[4, 7], [4, 9, 1], [4, 9, 2], [30]]
    np.testing.assert_allclose(lens.mass(TEXTS, words, batch_size=2), by_hand(words), rtol=1e-9)
    # what begins with [4, 9] or [30] is one event with it
    within = [*words, [4, 9], [30, 5], [30], []]
    np.testing.assert_allclose(lens.mass(TEXTS, within, batch_size=3), by_hand([[4, 7], [4, 9], [30]]), rtol=1e-9)
    everything = [[token] for token in range(VOCABULARY) if token != 4] + [[4, token] for token in range(VOCABULARY)]
    np.testing.assert_allclose(lens.mass(TEXTS, everything, batch_size=3), 1.0, rtol=1e-9)


def test_a_model_without_a_last_norm_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"OPTForCausalLM has no norm"):
        final_norm(tiny_model("opt_350m"))


@pytest.mark.parametrize("family", ["gpt_neox", "gemma3"])
def test_mean_residuals_are_means_of_each_text_alone(family: str) -> None:
    model = tiny_model(family)
    found_LND = mean_residuals(model, TEXTS, batch_size=2)
    for i, ids in enumerate(TEXTS):
        alone = mean_residuals(model, [ids], batch_size=1)[:, 0]
        torch.testing.assert_close(found_LND[:, i], alone, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        hidden = model(torch.tensor([TEXTS[0]]), output_hidden_states=True, use_cache=False).hidden_states
    for depth in (0, 1):  # the last of transformers' own is behind the norm
        torch.testing.assert_close(found_LND[depth, 0], hidden[depth][0].mean(0), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="text 1 has no tokens"):
        mean_residuals(model, [[1], []], batch_size=2)
    with pytest.raises(ValueError, match="no texts"):
        mean_residuals(model, [], batch_size=2)


def test_overrepresented_tokens_are_ranked_by_the_ratio_of_shares() -> None:
    texts, others = [[1, 1, 1, 2, 2, 2, 3, 3]], [[2, 5, 5, 5, 5, 5]]
    assert overrepresented_tokens(texts, others, 5) == [1, 2]  # 3 is too rare
    assert overrepresented_tokens(texts, others, 1) == [1]
    assert overrepresented_tokens([[5, 5, 5]], [[5, 5, 5]], 5) == []


def test_probes_find_what_is_separable_and_nothing_in_noise() -> None:
    rng = np.random.default_rng(0)
    labels_N = np.arange(80) < 40
    noise_ND = rng.normal(size=(80, 4))
    separable_ND = noise_ND + 12 * labels_N[:, None]
    found = probe_layers(
        np.stack([noise_ND, separable_ND]), labels_N, folds=4, seed=0, bootstrap=Bootstrap(samples=100)
    )
    assert found["chosen"] == {**found["layers"][1], "depths": [1, 1, 1, 1]}
    both_LND, bootstrap = np.stack([noise_ND, separable_ND]), Bootstrap(samples=100)
    assert probe_layers(both_LND, labels_N, folds=4, seed=2**32, bootstrap=bootstrap) == found
    found = found["layers"]
    assert found[1]["accuracy"]["value"] == found[1]["auroc"]["value"] == 1
    assert found[0]["auroc"]["value"] < 0.7
    assert found[0]["auroc"]["low"] < found[0]["auroc"]["value"] < found[0]["auroc"]["high"]
    with pytest.raises(ValueError, match=r"analyse\.folds"):
        probe_layers(noise_ND[None], np.arange(80) < 3, folds=4, seed=0, bootstrap=Bootstrap(samples=100))


def test_of_layers_without_a_signal_the_chosen_one_is_no_better_than_chance() -> None:
    """The best of 30 layers of noise is well above chance on the texts that it is picked on."""
    chosen, best = [], []
    for trial in range(4):
        rng = np.random.default_rng(trial)
        labels_N = np.arange(40) < 20
        noise_LND = rng.normal(size=(30, 40, 3))
        found = probe_layers(noise_LND, labels_N, folds=4, seed=trial, bootstrap=Bootstrap(samples=20))
        best.append(max(layer["auroc"]["value"] for layer in found["layers"]))
        chosen.append(found["chosen"]["auroc"]["value"])
        assert len(found["chosen"]["depths"]) == 4
    assert np.mean(best) > 0.65
    assert abs(np.mean(chosen) - 0.5) < 0.1


def test_the_layer_of_a_fold_is_chosen_without_its_texts() -> None:
    """Of the texts of one fold every label is told by layer 0; of all others by layer 1."""
    labels_N = np.arange(40) % 2 == 0
    folds = StratifiedKFold(4, shuffle=True, random_state=0)
    _, held_out = next(iter(folds.split(labels_N, labels_N)))
    rng = np.random.default_rng(0)
    told_LN = rng.normal(size=(2, 40)) + 6 * labels_N
    told_LN[0, np.setdiff1d(np.arange(40), held_out)] = rng.normal(size=30)
    found = probe_layers(told_LN[..., None], labels_N, folds=4, seed=0, bootstrap=Bootstrap(samples=20))
    assert found["chosen"]["depths"][0] == 1


def test_two_folds_of_few_texts_still_choose_and_fewer_are_refused() -> None:
    features_LND = np.random.default_rng(0).normal(size=(2, 8, 3))
    for folds in (2, 3, 4):
        options = {"folds": folds, "seed": 0, "bootstrap": Bootstrap(samples=10)}
        assert len(probe_layers(features_LND, np.arange(8) < 4, **options)["chosen"]["depths"]) == folds
    with pytest.raises(ValueError, match=r"^3 texts of the rarer kind for 2 folds, which need 4"):
        probe_layers(features_LND, np.arange(8) < 3, folds=2, seed=0, bootstrap=Bootstrap(samples=10))


CONTEXT, SUFFIX, TARGET = [5, 9, 3], [7, 7, 7, 7], [12, 31]


def loss_by_hand(model: PreTrainedModel, embedded_TD: Tensor, target: list[int]) -> Tensor:
    """The mean NLL of the target after its context, from one plain forward pass."""
    log_p_TV = model(inputs_embeds=embedded_TD[None], use_cache=False).logits[0].log_softmax(-1)
    places = range(len(embedded_TD) - len(target) - 1, len(embedded_TD) - 1)
    return -torch.stack([log_p_TV[place, token] for place, token in zip(places, target, strict=True)]).mean()


@pytest.mark.parametrize("family", ["gpt_neox", "llama", "gemma3"])
def test_one_hot_gradient_is_the_finite_difference_of_the_loss(family: str) -> None:
    model = tiny_model(family, dtype=torch.float64)
    ids = [*CONTEXT, *SUFFIX, *TARGET]
    gradient_SV = one_hot_gradient(model, ids, (3, 7), 2)
    embed, step = model.get_input_embeddings(), 1e-4
    with torch.no_grad():
        embedded_TD = embed(torch.tensor(ids))
        for place, token in ((0, 4), (2, 40), (3, 7)):
            change_TD = torch.zeros_like(embedded_TD)
            change_TD[3 + place] = step * embed(torch.tensor(token))
            up, down = (loss_by_hand(model, embedded_TD + sign * change_TD, TARGET) for sign in (1, -1))
            expected = float(up - down) / (2 * step)
            assert float(gradient_SV[place, token]) == pytest.approx(expected, rel=1e-5, abs=1e-9)


def test_candidate_losses_are_those_of_a_plain_forward_pass() -> None:
    model = tiny_model("llama", dtype=torch.float64)
    sequences = [[*CONTEXT, *suffix, *TARGET] for suffix in (SUFFIX, [1, 2, 3, 4])]
    with torch.no_grad():
        expected = [loss_by_hand(model, model.get_input_embeddings()(torch.tensor(ids)), TARGET) for ids in sequences]
    torch.testing.assert_close(target_losses(model, sequences, 2).clone(), torch.stack(expected))


def test_replacements_change_one_place_to_one_of_its_top() -> None:
    top_SK = np.array([[10, 11], [20, 21], [30, 31]])
    found = replacements([1, 2, 3], top_SK, 60, np.random.default_rng(0))
    changed = [[(i, token) for i, token in enumerate(each) if token != [1, 2, 3][i]] for each in found]
    assert {len(each) for each in changed} == {1}
    assert {each[0] for each in changed} == {(i, token) for i in range(3) for token in top_SK[i].tolist()}


def test_an_attack_lowers_the_loss_within_the_allowed_tokens_and_says_what_is_decoded() -> None:
    model = tiny_model("gpt_neox")
    allowed_V = torch.arange(VOCABULARY) >= 8
    budget = Budget(steps=15, candidates=24, top_k=8, batch_size=10)
    found = attack(model, CONTEXT, TARGET, SUFFIX, budget, seed=0, allowed_V=allowed_V)
    ids = [*CONTEXT, *found.suffix, *TARGET]
    assert found.loss < found.first_loss
    assert found.loss == pytest.approx(float(target_losses(model, [ids], 2)[0]), rel=1e-4)
    assert found.first_loss == pytest.approx(
        float(target_losses(model, [[*CONTEXT, *SUFFIX, *TARGET]], 2)[0]), rel=1e-4
    )
    assert all(token == 7 or token >= 8 for token in found.suffix)
    with torch.no_grad():
        likeliest = model(torch.tensor([ids])).logits[0, -3:-1].argmax(-1).tolist()
    assert found.exact == (likeliest == TARGET)
    assert found == attack(model, CONTEXT, TARGET, SUFFIX, budget, seed=0, allowed_V=allowed_V)


def test_an_attack_ends_at_once_where_the_target_is_decoded_anyway() -> None:
    model = tiny_model("gpt_neox")
    target = greedy_continuation(model, [*CONTEXT, *SUFFIX], 2)
    found = attack(model, CONTEXT, target, SUFFIX, Budget(steps=3, candidates=4, top_k=4, batch_size=4), seed=0)
    assert (found.exact, found.steps, list(found.suffix)) == (True, 0, SUFFIX)


def test_candidates_that_do_not_survive_as_text_are_left_out() -> None:
    model = tiny_model("gpt_neox")
    budget = Budget(steps=4, candidates=24, top_k=8, batch_size=8)
    found = attack(
        model, CONTEXT, TARGET, SUFFIX, budget, seed=0, keeps_its_tokens=lambda suffix: suffix[0] == SUFFIX[0]
    )
    assert found.suffix[0] == SUFFIX[0]
    with pytest.raises(ValueError, match="at least one token"):
        attack(model, CONTEXT, [], SUFFIX, budget, seed=0)


# ---- the stage: what it reads, refuses and compares ------------------------------------------------------


def queries(positive: int, negative: int) -> list[QueryRow]:
    kinds = [True] * positive + [False] * negative
    return [QueryRow(row=i, positive=kind, score=0.5, prompt="p", completion=f" c{i}") for i, kind in enumerate(kinds)]


def test_a_completion_may_hold_any_line_end(tmp_path: Path) -> None:
    first, second = queries(1, 1)
    rows = [replace(first, completion=" one\u2028two\u2029three\x85four\nfive\r\nsix"), second]
    write_queries(tmp_path, rows)
    assert read_queries(tmp_path) == rows


def test_a_line_that_is_no_query_is_named(tmp_path: Path) -> None:
    write_queries(tmp_path, queries(1, 1))
    path = tmp_path / "queries.jsonl"
    path.write_text(path.read_text()[:-9] + "\n")
    with pytest.raises(ValueError, match=r"queries\.jsonl, line 2: not a query .*build the query again"):
        read_queries(tmp_path)


def test_the_lens_takes_as_many_prompts_of_each_kind_whatever_their_order(tmp_path: Path) -> None:
    path, toxicity = tmp_path / "prompts.jsonl", [0.9 if i >= 30 else 0.1 for i in range(60)]
    rows = [{"prompt": {"text": f"p{i}", "toxicity": toxicity[i]}, "continuation": {"text": ""}} for i in range(60)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    balanced = {"prompts": str(path), "balanced": True, "max_prompts": 40}
    config = config_from_mapping({"analyse": {"max_prompts": 20}, "evaluate": balanced})
    drawn = lens_prompts(config.analyse, config.evaluate, 0)
    assert [row.prompt_scores["toxicity"] for row in drawn] == [0.1] * 10 + [0.9] * 10
    assert drawn != lens_prompts(config.analyse, config.evaluate, 1)
    as_all = replace(config.analyse, max_prompts=40)
    assert lens_prompts(as_all, config.evaluate, 0) == chosen_prompts(config.evaluate, 0)
    plain = replace(config.evaluate, balanced=False, max_prompts=None)
    some = [row.row for row in lens_prompts(config.analyse, plain, 0)]
    assert some == sorted(some)
    assert len(some) == 20
    assert some[-1] >= 30


def test_the_probes_take_as_many_texts_of_each_kind(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    rows = queries(7, 9)
    config = config_from_mapping({"analyse": {"folds": 2, "max_texts": 8}})
    drawn = probe_texts(config.analyse, rows, 0)
    assert [label for _, label in drawn] == [True] * 4 + [False] * 4
    assert len(set(drawn)) == 8
    assert set(drawn) < {(row.completion, row.positive) for row in rows}
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": f"t{i}", "toxic": i < 4}) + "\n" for i in range(8)))
    named = config_from_mapping({"analyse": {"folds": 2, "texts": [str(path)]}})
    assert sorted(probe_texts(named.analyse, rows, 0)) == [(f"t{i}", i < 4) for i in range(8)]
    assert not caplog.messages
    with path.open("a") as file:
        file.write(json.dumps({"text": "", "toxic": True}) + "\n")
    assert len(probe_texts(named.analyse, rows, 0)) == 8
    assert caplog.messages == ["analyse      | analyse.texts: 1 of 9 rows have no text and are left out"]


@pytest.mark.parametrize(
    ("options", "others", "message"),
    [
        ({"methods": ["probes"]}, 0, r"analyse\.texts: .* 20 positive and 0 negative.*build_query\.differential"),
        ({"methods": ["probes"]}, 4, r"analyse\.texts: .* 20 positive and 4 negative.*analyse\.folds"),
        ({"methods": ["probes"], "max_texts": 8}, 20, r"analyse\.texts: .*analyse\.max_texts"),
        ({"methods": ["probes"], "texts": ["texts.jsonl"]}, 20, r"analyse\.texts: they are 0 positive and 6 negative"),
        ({"methods": ["lens"]}, 0, r"evaluate\.word_list: .*build_query\.differential"),
    ],
)
def test_texts_of_one_kind_alone_are_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], others: int, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    Path("texts.jsonl").write_text('{"text": "t", "toxic": false}\n' * 6)
    evaluate = {"prompts": "prompts.jsonl", "models": {"one": "a/model"}}
    run = Run(config=config_from_mapping({"run_dir": str(tmp_path / "run"), "evaluate": evaluate, "analyse": options}))
    artifact = open_artifact(run.query, verb="build_query", options={}, inputs={}, config_yaml="")
    write_queries(run.query, queries(20, others))
    artifact.finish([run.query / "queries.jsonl"], rows={}, summary={})
    with pytest.raises(ConfigError, match=message):
        analyse(run)
    assert not run.analyses.exists()  # so that the mended config is not another plan


def pieces(model: str, *, token_ids: list[int], target_ids: list[int], mass: float) -> dict[str, dict[str, Any]]:
    attacks = [{**dict.fromkeys(GCG_FIGURES, mass + i / 8), "row": i, "target_ids": [*target_ids, i]} for i in range(3)]
    lens = {"tokens": ["a", "b"], "token_ids": token_ids, "mass": [[0.5, mass + i / 8] for i in range(4)]}
    return {f"lens-0000-{model}": lens, **{f"gcg-{i:04d}-{model}": each for i, each in enumerate(attacks)}}


def test_figures_of_other_tokens_are_not_compared() -> None:
    results = {
        **pieces("first", token_ids=[3, 4], target_ids=[7, 8], mass=0.25),
        **pieces("same", token_ids=[3, 4], target_ids=[7, 8], mass=0.5),
        **pieces("other", token_ids=[3, 5], target_ids=[9], mass=0.5),
    }
    paired = collect(results, ["first", "same", "other"], Bootstrap(samples=20))["paired"]
    names = {"lens", *(f"gcg/{name}" for name in GCG_FIGURES)}
    assert paired.keys() == {"same", "other"}
    assert all(each.keys() == {"against", *names} for each in paired.values())
    assert {name for name in names if paired["other"][name] is None} == set(BY_TOKENS)
    found = [paired["same"][name] for name in names] + [paired["other"]["gcg/flagged"]]
    assert all(each["difference"] == pytest.approx(0.25) for each in found)
