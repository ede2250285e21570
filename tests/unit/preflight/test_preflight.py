"""ifguide.preflight: what would fail later is named at once, with key, value and what to do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import GPT2Config

from ifguide.artifacts import open_artifact
from ifguide.cli import main
from ifguide.config import config_from_mapping
from ifguide.extras import EXTRAS
from ifguide.influence.query_file import NULLS, QUERIES
from ifguide.preflight import hub, preflight, sections
from ifguide.run import Run
from tests.unit.preflight.conftest import lines
from tests.unit.test_models import word_tokenizer


def test_a_config_without_faults_passes_and_nothing_is_written(tree, tmp_path, faults) -> None:
    assert faults() == []
    assert not (tmp_path / "run").exists()


def test_all_faults_are_named_in_one_go_and_nothing_is_started(tree, tmp_path, capsys) -> None:
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(tree))
    planted = {
        "build_query.classifier": "detoxif:orig",
        "build_query.prompts": "nowhere.jsonl",
        "evaluate.cloze": "none.jsonl",
        "pack_corpus.inputs": [{"path": str(tmp_path / "data" / "corpus.jsonl"), "text_column": "txt"}],
        "evaluate.heldout": [{"path": str(tmp_path / "data" / "heldout.jsonl"), "rows": [0, 9]}],
        "target.architecture.hidden_sizes": 3,
    }
    sets = [part for key, value in planted.items() for part in ("--set", f"{key}={json.dumps(value)}")]
    for arguments in (["run", "--dry-run"], ["run"]):
        assert main([*arguments, "--config", str(tmp_path / "c.yaml"), *sets]) == 1
        said = capsys.readouterr().err.splitlines()
        assert said[0].startswith("ifguide run: 6 faults, and nothing was started")
        for expected in (
            "build_query.classifier.name = detoxif:orig: unknown classifier 'detoxif:orig': did you mean 'detoxify:",
            "build_query.prompts.path = nowhere.jsonl: nowhere.jsonl does not exist: check the path",
            "evaluate.cloze.path = none.jsonl: none.jsonl does not exist: check the path",
            "column 'txt' is missing; it has text, toxic_spans; set text_column: text",
            "evaluate.heldout[0].rows = [0, 9]: ends at 9, but ",
            "target.architecture.hidden_sizes = 3: unknown field of gpt_neox; did you mean hidden_size?",
        ):
            assert [line for line in said if expected in line], expected
    assert not (tmp_path / "run").exists()


def test_no_preflight_skips_it(tree, tmp_path) -> None:
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(tree))
    command = ["pack_corpus", "--config", str(tmp_path / "c.yaml"), "--dry-run", "--set", "tokenizer=./nowhere"]
    assert [main(command), main([*command, "--no-preflight"])] == [1, 0]


def test_a_verb_checks_only_what_it_uses(faults) -> None:
    changes = {"build_query__prompts": "nowhere.jsonl", "evaluate__cloze": "none.jsonl"}
    assert faults("pack_corpus", **changes) == []
    assert len(faults("build_query")) == 1
    assert len(faults("build_query", "evaluate")) == 2


@pytest.mark.parametrize(
    ("verb", "key", "value", "expected"),
    [
        ("pack_corpus", "pack_corpus__inputs", [], "pack_corpus.inputs = null: name at least one file"),
        ("build_query", "build_query__prompts", None, "build_query.prompts = null: name a JSONL or Parquet file"),
        ("evaluate", "evaluate__prompts", None, "evaluate.prompts = null: name a JSONL or Parquet file"),
        ("evaluate", "evaluate__classifier", "labels", "labels cannot score new text; choose another"),
        ("evaluate", "evaluate__classifiers", {"b": "word:x"}, "evaluate.classifiers.b.name = word:x: unknown"),
        (
            "evaluate",
            "evaluate__classifiers",
            {"toxicity": "alt-profanity-check"},
            "evaluate.classifiers.toxicity = alt-profanity-check: is a class of evaluate.classifier too; choose",
        ),
        ("evaluate", "evaluate__classifier", "words:nowhere.txt", "'nowhere.txt' does not exist: check the path"),
        ("evaluate", "evaluate__models", {"m": "./nowhere"}, "evaluate.models.m = ./nowhere: no such file or folder"),
        ("evaluate", "evaluate__prompt_sets", {"s": "none.json"}, "evaluate.prompt_sets.s.path = none.json: none.json"),
        (
            "evaluate",
            "evaluate__max_new_tokens",
            10**6,
            "evaluate.max_new_tokens = 1000000: leaves no room for a prompt",
        ),
        ("build_query", "build_query__factors", "nowhere", "build_query.factors = nowhere: no such folder; check"),
        ("build_query", "proxy", "./nowhere", "proxy.source = ./nowhere: no such file or folder; a hub id has"),
        ("build_query", "tokenizer", "./nowhere", "tokenizer = ./nowhere: no such file or folder; a hub id has"),
        ("score_corpus", "score_corpus__queries", {"q": "nowhere"}, "score_corpus.queries.q = nowhere: no such folder"),
        (
            "fit_student",
            "fit_student",
            {"kind": "encoder", "encoder": {"source": "./nowhere"}},
            "fit_student.encoder.source = ./nowhere: no such file or folder",
        ),
        ("build_mask", "build_mask__behaviour", "rude", "build_mask.behaviour = rude: not scored; choose one of own"),
        (
            "build_mask",
            "build_mask__fdr",
            0.1,
            "build_query.nulls = 0: build_mask.fdr wants null directions: set it to 4",
        ),
        ("pretrain", "pretrain__init_from", "./nowhere", "pretrain.init_from = ./nowhere: no such file or folder"),
        ("pretrain", "target", {}, "target = null: name target.architecture, target.source or pretrain.init_from"),
        ("compare", "compare__methods", {}, "compare.methods = null: name some, as in configs/demo.yaml"),
        ("analyse", "analyse__texts", ["none.jsonl"], "analyse.texts[0].path = none.jsonl: none.jsonl does not exist"),
        ("check_classifier", "evaluate__check_data", ["none.jsonl"], "evaluate.check_data[0].path = none.jsonl: none"),
    ],
)
def test_each_fault_has_key_value_and_what_to_do(faults, verb, key, value, expected) -> None:
    (found,) = faults(verb, **{key: value})
    assert expected in found


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"hidden_sizes": 3},
            "target.architecture.hidden_sizes = 3: unknown field of gpt_neox; did you mean hidden_size?",
        ),
        (
            {"model_type": "gpt_neo_x"},
            "target.architecture.model_type = gpt_neo_x: no model that transformers knows; did",
        ),
        ({"hidden_size": "wide"}, "transformers refuses it: Validation error for field 'hidden_size'"),
        ({"rotary_pct": 0.5, "torch_dtype": "float32", "rotary_emb_base": 500}, None),
    ],
)
def test_fields_of_an_architecture_are_known_and_older_names_are_too(tree, faults, changes, expected) -> None:
    found = faults("pretrain", target={"architecture": tree["target"]["architecture"] | changes})
    assert [expected in fault for fault in found] == [True] * (expected is not None), found


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("no/such", "the hub has no such model, and no such folder is here; check the name"),
        ("no/access", "ask for access on its page, and set HF_TOKEN"),
        ("no/revision", "the hub has no revision None of it; check `revision`"),
    ],
)
def test_what_the_hub_has_not_is_a_fault(faults, asked, name, expected) -> None:
    found = faults("build_query", proxy=name)
    assert [expected in fault for fault in found] == [True]


def test_what_a_training_goes_on_from_is_looked_for_at_the_targets_revision(faults, asked) -> None:
    (found,) = faults("pretrain", pretrain__init_from="no/revision", target={"revision": "step1000"})
    assert found.startswith("pretrain.init_from = no/revision: the hub has no revision 'step1000' of it")


def test_a_hub_that_does_not_answer_is_asked_once_and_what_it_was_asked_named(tree, asked, monkeypatch) -> None:
    tree |= {"proxy": "not/reached", "tokenizer": "some/tokenizer"}
    unchecked = preflight(config_from_mapping(tree), ["build_query"])
    assert asked == ["some/tokenizer", "not/reached"]
    assert [str(finding) for finding in unchecked] == [
        "proxy.source = not/reached: there is no such folder, and the hub did not answer (OSError: no network)",
        "proxy.source = not/reached: whether its tokens are those of some/tokenizer: its stage will compare them",
    ]
    tree["tokenizer"] = "not/reached"
    assert len(preflight(config_from_mapping(tree), ["build_query"])) == 2
    assert len(asked) == 3
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    assert len(preflight(config_from_mapping(tree), ["build_query"])) == 2
    assert len(asked) == 3


def test_a_model_s_folder_has_config_and_weights(tmp_path, faults) -> None:
    model = tmp_path / "model"
    model.mkdir()
    found = faults("build_query", proxy=str(model))
    assert [text.partition("the folder has no ")[2][:13] for text in found] == ["config.json; ", "*.safetensors"]
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_bytes(b"")
    assert faults("build_query") == []
    assert faults("build_query", proxy=str(tmp_path / "run" / "made" / "later")) == []


def test_a_proxy_of_other_tokens_than_the_corpus_is_a_fault(tmp_path, faults) -> None:
    proxy, other = tmp_path / "proxy", tmp_path / "other"
    word_tokenizer(("<eos>", "a", "b", "<unk>"), eos_token="<eos>").save_pretrained(proxy)
    word_tokenizer(("<eos>", "b", "a", "<unk>"), eos_token="<eos>").save_pretrained(other)
    (proxy / "config.json").write_text("{}")
    (proxy / "model.safetensors").write_bytes(b"")
    for verb in ("fit_factors", "build_query", "score_corpus"):
        (found,) = faults(verb, proxy=str(proxy), tokenizer=str(other))
        assert found.startswith(f"proxy.source = {proxy}: token 1 is 'b' in {other}, and 'a' in {proxy}, ")
        assert faults(verb, tokenizer=None) == []
    assert faults("score_corpus", pack_corpus__train_tokenizer=8192) == []  # it may be the very tokenizer


def test_an_encoder_that_cannot_read_the_corpus_is_a_fault(tree, tmp_path, faults) -> None:
    encoder, other = tmp_path / "encoder", tmp_path / "other"
    word_tokenizer(("<eos>", "a", "b", "<unk>"), eos_token="<eos>").save_pretrained(encoder)
    word_tokenizer(("<eos>", "b", "a", "<unk>"), eos_token="<eos>").save_pretrained(other)
    GPT2Config(vocab_size=4, n_positions=64, n_embd=8, n_layer=1, n_head=1).save_pretrained(encoder)
    (encoder / "model.safetensors").write_bytes(b"")
    student = {"kind": "encoder", "encoder": {"source": str(encoder)}}
    assert faults("fit_student", fit_student=student, tokenizer=str(encoder)) == []
    (found,) = faults("fit_student", tokenizer=str(other))
    assert found.startswith(f"fit_student.encoder.source = {encoder}: token 1 is 'b' in {other}, and 'a' in {encoder}")
    (found,) = faults("fit_student", tokenizer=str(encoder), pack_corpus__block_size=65)
    assert f"{encoder}: pack_corpus.block_size: 65 tokens are more than the 64 positions of " in found
    assert faults("fit_student", fit_student={**student, "kind": "head"}) == []
    tree |= {"tokenizer": str(tmp_path / "run" / "later"), "fit_student": student}
    unknown = f"fit_student.encoder.source = {encoder}: whether its tokens are those of {tree['tokenizer']}: its stage"
    said = preflight(config_from_mapping(tree), ["fit_student"])
    assert any(str(finding).startswith(unknown) for finding in said)


def test_an_audit_of_hardly_a_block_of_the_packed_corpus_is_a_fault(tree, faults) -> None:
    run = Run(config=config_from_mapping(tree))
    student = {"scorer": "cascade", "audit_fraction": 0.01}
    assert faults("score_corpus", score_corpus=student | {"resources": {"gpus": 0}}) == []
    (unchecked,) = [
        finding for finding in preflight(config_from_mapping(tree), ["score_corpus"]) if "audit" in finding.key
    ]
    assert unchecked.text == f"whether that is 5 blocks or more: {run.corpus} is not packed yet"
    run.open(run.corpus, "pack_corpus", inputs={}).finish([], rows={"blocks": 400}, summary={})
    for verb in ("fit_student", "score_corpus"):
        (found,) = faults(verb)
        assert found.startswith("score_corpus.audit_fraction = 0.01: 0.01 of 400 blocks is an audit of 4.0, which ")
    assert faults("score_corpus", score_corpus__audit_fraction=0.013) == []
    assert faults("score_corpus", score_corpus={"resources": {"gpus": 0}}) == []


def test_a_run_directory_that_cannot_be_is_a_fault(tmp_path, faults) -> None:
    (tmp_path / "file").write_text("")
    (found,) = faults(run_dir=str(tmp_path / "file" / "run"))
    assert found.endswith(f"{tmp_path / 'file'} is a file; name a folder")


def test_what_was_made_with_other_options_is_a_fault(tree: dict[str, Any], faults: Callable[..., list[str]]) -> None:
    run = Run(config=config_from_mapping(tree))
    run.open(run.corpus, "pack_corpus", inputs={})
    assert faults("pack_corpus") == []
    (found,) = faults("pack_corpus", pack_corpus__block_size=8)
    assert found.startswith(
        f"run_dir = {run.folder}: {run.corpus} was made from something else: pack_corpus.block_size"
    )
    assert faults("evaluate") == []


def test_a_machine_that_is_too_small_is_a_fault_unless_the_run_is_elsewhere(tree, faults, monkeypatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    (found,) = faults("build_query", build_query__resources={"cpus": 3, "gpus": 0})
    assert found.startswith("build_query.resources.cpus = 3.0: 1 process of 3 asked for, this machine has 2; lower it")
    (unchecked,) = preflight(config_from_mapping(tree), ["build_query"], elsewhere=True)
    assert unchecked.key == "build_query.resources.cpus"
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    (unchecked,) = preflight(config_from_mapping(tree), ["build_query"])
    assert unchecked.key == "cluster.address"


def test_so_is_one_with_less_memory(faults, monkeypatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(sections, "_memory", lambda: 10**9)
    assert faults("build_query", build_query__resources={"gpus": 0, "memory": 10**9}) == []
    (found,) = faults("build_query", build_query__resources={"gpus": 0, "memory": 2 * 10**9})
    expected = "memory = 2000000000: 1 process of 2,000,000,000 asked for, this machine has 1,000,000,000; lower it"
    assert found.startswith(f"build_query.resources.{expected}")


@pytest.mark.parametrize("baseline", [True, False])
def test_a_further_model_is_not_called_as_one_that_the_run_trains(
    tree: dict[str, Any], faults: Callable[..., list[str]], tmp_path: Path, baseline: bool
) -> None:
    (tmp_path / "model").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "model" / name).write_text("{}")
    models = dict.fromkeys(("baseline", "penalised", "original"), str(tmp_path / "model"))
    tree |= {"baseline": baseline, "proxy": str(tmp_path / "model")}
    taken = ["baseline", "penalised"] if baseline else ["penalised"]
    assert faults("pretrain", "evaluate", evaluate__models=models) == [
        f"evaluate.models.{name} = {tmp_path / 'model'}: this run has a model of that name; choose another"
        for name in taken
    ]
    assert faults("evaluate") == []  # of models that others trained
    folder = tmp_path / "run" / "model" / "baseline"
    open_artifact(folder, verb="pretrain", options={}, inputs={}, config_yaml="").finish([], rows={}, summary={})
    (found,) = faults("evaluate")
    assert found.startswith("evaluate.models.baseline = ")


@pytest.mark.parametrize("key", ["fdr", "standardise"])
def test_the_query_of_the_mask_s_behaviour_has_the_nulls_that_z_scores_want(tmp_path, faults, key) -> None:
    for name, nulls in (("plain", ()), ("halved", (NULLS,))):
        artifact = open_artifact(tmp_path / name, verb="build_query", options={}, inputs={}, config_yaml="")
        for file in (QUERIES, *nulls):
            (tmp_path / name / file).write_text("")
        artifact.finish([tmp_path / name / file for file in (QUERIES, *nulls)], rows={}, summary={})
    queries = {name: str(tmp_path / name) for name in ("plain", "halved")}
    wanted = {"score_corpus__queries": queries, f"build_mask__{key}": 0.1 if key == "fdr" else True}
    assert faults("build_mask", **wanted, build_mask__behaviour="halved") == []
    (found,) = faults("build_mask", **wanted, build_mask__behaviour="plain")
    place = f"score_corpus.queries.plain = {tmp_path / 'plain'}"
    assert found == (
        f"{place}: build_mask.{key} wants null directions, and this query has none: build it with build_query.nulls (4,"
        " say)"
    )


# ---- kinds of bad files ----------------------------------------------------------------------------------


def test_a_fitted_classifier_s_texts_are_read(tmp_path, faults) -> None:
    texts = lines(tmp_path / "texts.jsonl", {"text": "a", "toxic": 1}, {"text": "b", "toxic": 1})
    (found,) = faults("evaluate", evaluate__classifier={"name": "fitted", "training": [texts]})
    assert found.startswith("evaluate.classifier.training = [")
    assert "2 of 2 texts with a label" in found


def test_the_label_of_a_classifier_of_the_hub_is_one_of_its_config_s(
    tree, tmp_path, faults, asked, monkeypatch
) -> None:
    """As far as the config comes."""
    config = {"model_type": "bert", "id2label": {"0": "LABEL_0", "1": "LABEL_1"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(hub, "_fetch", lambda name, file: str(tmp_path / file) if name == "has/config" else None)
    (found,) = faults("evaluate", evaluate__classifier="hf:has/config")
    assert "hf:has/config" not in asked
    assert found.startswith("evaluate.classifier.label = null: hf:has/config has the labels LABEL_0, LABEL_1")
    tree["evaluate"]["classifier"] = {"name": "hf:has/config", "label": "LABEL_1"}
    assert preflight(config_from_mapping(tree), ["evaluate"]) == ()
    tree["evaluate"]["classifier"] = "hf:has/none"
    (left,) = preflight(config_from_mapping(tree), ["evaluate"])
    assert str(left) == "evaluate.classifier.label = null: whether has/none has it: its config did not come"


def test_a_further_classifier_is_not_called_as_a_class_of_detoxify(faults) -> None:
    words = {"name": "hatesonar"}
    for own, name, wrong in (("original", "threat", True), ("original", "sexual_explicit", False)):
        found = faults("evaluate", evaluate__classifier=f"detoxify:{own}", evaluate__classifiers={name: words})
        assert [fault for fault in found if "is a class of evaluate.classifier too" in fault] == found
        assert bool(found) == wrong
    (found,) = faults("evaluate", evaluate__classifier="detoxify:unbiased-small")
    assert found.startswith("evaluate.classifiers.sexual_explicit = hatesonar: ")


def test_a_hub_dataset_is_looked_for_by_its_name(tree, tmp_path, faults, asked) -> None:
    found = faults("pack_corpus", pack_corpus__inputs=["hf://no/such:train", f"hf://{tmp_path / 'data'}"])
    assert asked == ["no/such"]
    assert len(found) == 1
    assert "the hub has no such dataset" in found[0]


def test_packages_that_a_key_wants_are_named_with_their_extra(
    faults: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "model").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "model" / name).write_text("{}")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    wanted = {
        "pretrain.lora.rank = 4": "peft",
        "evaluate.lm_eval = arc_easy": "lm_eval",
        "evaluate.classifiers.second.name = hatesonar": "hatesonar",
    }
    found = faults(
        pretrain__init_from=str(tmp_path / "model"),
        pretrain__lora={"rank": 4},
        evaluate__lm_eval=["arc_easy"],
        evaluate__classifiers={"second": "hatesonar"},
    )
    for start, package in wanted.items():
        (line,) = [fault for fault in found if fault.startswith(f"{start}: ")]
        assert f"the package {package} is needed and not installed: pip install 'ifguide[{EXTRAS[package]}]'" in line


def test_tasks_of_the_harness_are_known_names_or_files(faults: Callable[..., list[str]], tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text("task: own\n")
    tasks = ["lambada_openai", "lambada_openay", str(tmp_path / "own.yaml"), str(tmp_path / "gone.yaml")]
    found = [fault for fault in faults(evaluate__lm_eval=tasks) if "lm_eval" in fault]
    assert sorted(found) == sorted(
        [
            f"evaluate.lm_eval = {tmp_path / 'gone.yaml'}: does not exist: check the path",
            "evaluate.lm_eval = lambada_openay: no task of lm-evaluation-harness; did you mean lambada_openai?",
        ]
    )
