"""ifguide.config: every key, type and bound is checked by name, and a resolved config can be run again."""

import dataclasses
import re
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from ifguide.config import (
    VERBS,
    Config,
    ConfigError,
    Input,
    ModelSource,
    config_from_mapping,
    load_config,
    to_mapping,
    to_yaml,
)
from ifguide.config.packaged import packaged_configs

CONFIGS = sorted((Path(__file__).parents[3] / "configs").glob("*.yaml"))
FILE_NAMES = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_.-]*", fullmatch=True)
WORDS = st.text(st.characters(exclude_categories=("Cc", "Cs", "Zl", "Zp")), min_size=1)


def write(folder: Path, text: str) -> Path:
    path = folder / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_config_loads_and_its_resolved_text_loads_to_the_same(path, tmp_path):
    config = load_config(path)
    assert config.target != ModelSource()
    assert load_config(write(tmp_path, to_yaml(config))) == config


@settings(deadline=None, max_examples=50)
@given(
    run_dir=WORDS,
    rate=st.floats(min_value=0, exclude_min=True, allow_infinity=False),
    rows=st.none() | st.tuples(st.integers(0, 99), st.integers(100, 10**12)),
    models=st.dictionaries(FILE_NAMES, WORDS, max_size=3),
    use_mask=st.booleans(),
)
def test_resolved_config_reads_back_equal_whatever_its_values(run_dir, rate, rows, models, use_mask):
    config = config_from_mapping(
        {
            "run_dir": run_dir,
            "pretrain": {"learning_rate": rate, "use_mask": use_mask},
            "pack_corpus": {"inputs": [{"path": run_dir, "rows": rows}]},
            "evaluate": {"models": models, "word_list": sorted(models)},
            "target": {"architecture": {"model_type": "llama", "rope": {"theta": rate}, "layers": [1, None, True]}},
        }
    )
    assert config_from_mapping(yaml.safe_load(to_yaml(config))) == config


def test_empty_file_is_all_defaults(tmp_path):
    assert load_config(write(tmp_path, "")) == Config() == config_from_mapping({})


def test_every_verb_has_its_section():
    assert set(VERBS) <= {f.name for f in dataclasses.fields(Config)}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("score.preset=exact", "score.preset: unknown key; did you mean score_corpus.preset?"),
        ("build.quantile=0.5", "build.quantile: unknown key; did you mean build_mask.quantile?"),
        ("build.damping=0.5", "build.damping: unknown key; did you mean build_query.damping?"),
        ("pretrain.check=0.5", "pretrain.check: unknown key; did you mean pretrain.checkpoint_steps?"),
        ("pretrian.epochs=2", "pretrian: unknown key; did you mean pretrain?"),
        ("pretrain.epoch=2", "pretrain.epoch: unknown key; did you mean pretrain.epochs?"),
        ("evaluate.classifier.nam=x", "evaluate.classifier.nam: unknown key; did you mean evaluate.classifier.name?"),
        ("pack_corpus.inputs=[{pth: a}]", "pack_corpus.inputs[0].pth: unknown key; did you mean"),
        ("build_mask.zzzz=1", "build_mask.zzzz: unknown key; valid here: behaviour, "),
        ("pack_corpus.inputs=[{text_column: t}]", "pack_corpus.inputs[0].path: required, and not set"),
        ("seed=1.5", "seed: expected int, got 1.5"),
        ("seed=true", "seed: expected int, got True"),
        ("baseline=1", "baseline: expected bool, got 1"),
        ("pretrain.epochs=yes", "pretrain.epochs: expected float, got True"),
        ("pretrain.epochs=many", "pretrain.epochs: expected float, got 'many'"),
        ("tokenizer=12", "tokenizer: expected str, got 12"),
        ("pretrain.betas=0.9", "pretrain.betas: expected a list, got 0.9"),
        ("pretrain.betas=[0.9]", "pretrain.betas: expected 2 values, got 1"),
        ("pretrain.betas=[0.9, x]", "pretrain.betas[1]: expected float, got 'x'"),
        ("pretrain.betas=[0.9, .nan]", "pretrain.betas[1]: expected a finite number, got nan"),
        ("pretrain.betas=[1.5, 0.9]", "pretrain.betas[0]: 1.5 is above 1"),
        ("pack_corpus.inputs=a.jsonl", "pack_corpus.inputs: expected a list, got 'a.jsonl'; of one: [a.jsonl]"),
        ("pack_corpus.inputs=[3]", "pack_corpus.inputs[0]: expected a section with keys, got 3"),
        ("pack_corpus.inputs=[{path: a, rows: [-3, 5]}]", "pack_corpus.inputs[0].rows[0]: -3 is below 0"),
        ("pack_corpus.inputs=[{path: a, rows: [5, 5]}]", "pack_corpus.inputs[0].rows: [5, 5] is not in ascending"),
        ("evaluate.prompts={path: a, rows: [5, 2]}", "evaluate.prompts.rows: [5, 2] is not in ascending"),
        ("evaluate.models=[a]", "evaluate.models: expected a mapping, got ['a']"),
        ("evaluate.models={a: 1}", "evaluate.models.a: expected str, got 1"),
        ("pretrain.dtype=float16", "pretrain.dtype: 'float16' is not one of float32, bfloat16"),
        ("score_corpus=", "score_corpus: expected a section with keys, got None"),
        ("seed=-1", "seed: -1 is below 0"),
        ("score_corpus.smooth={ridges: []}", "score_corpus.smooth.ridges: name one at least"),
        ("score_corpus.smooth={own_weight: 2}", "score_corpus.smooth.own_weight: 2.0 is above 1"),
        ("compare.smoothing={folds: 3}", "compare.smoothing: is now called score_corpus.smooth"),
        ("build_mask={smoothed: true, fdr: 0.1}", "build_mask.smoothed: z-scores are of exact scores"),
        (
            "score_corpus={scorer: cascade, attribution: position}",
            "score_corpus.scorer: cascade: fit_student.kind: head makes target scores",
        ),
        (
            "score_corpus={scorer: student, queries: {other: folder}}",
            "score_corpus.scorer: student scores the run's own query alone",
        ),
        ("fit_student.sample_fraction=0", "fit_student.sample_fraction: 0.0 must be above 0"),
        ("fit_student.kind=prefix", "fit_student.kind: 'prefix' is not one of head, suffix, encoder, ngram"),
        ("fit_student.encoder.heads=3", "fit_student.encoder.heads: 3 heads give no even share of hidden_size = 256"),
        ("build_mask.quantile=0", "build_mask.quantile: 0.0 must be above 0"),
        ("build_mask.quantile=1.01", "build_mask.quantile: 1.01 is above 1"),
        ("pretrain.penalty=.nan", "pretrain.penalty: expected a finite number, got nan"),
        ("build_query.damping=.nan", "build_query.damping: expected a finite number, got nan"),
        ("pretrain.learning_rate=.nan", "pretrain.learning_rate: expected a finite number, got nan"),
        ("pretrain.batch_blocks=10", "pretrain.batch_blocks: 10 is not a multiple of workers * micro_batch_blocks"),
        (
            "pretrain={zero_stage: 0, offload_optimizer: true}",
            "pretrain.offload_optimizer: needs engine: deepspeed and a",
        ),
        (
            "pretrain={engine: torch, offload_optimizer: true}",
            "pretrain.offload_optimizer: needs engine: deepspeed and a",
        ),
        (
            "pretrain={zero_stage: 2, offload_parameters: true}",
            "pretrain.offload_parameters: needs engine: deepspeed and",
        ),
        (
            "pretrain={engine: torch, zero_stage: 3, offload_parameters: true}",
            "pretrain.offload_parameters: needs engine: deepspeed and a zero_stage of at least 3, not torch and 3",
        ),
        (
            "pretrain.offload_nvme=/nvme",
            "pretrain.offload_nvme: takes only parameters, where the optimizer is in memory",
        ),
        ("pretrain={offload_nvme: /nvme, offload_optimizer: true}", "pretrain.offload_nvme: takes only parameters"),
        (
            "pretrain={offload_nvme: /nvme, zero_stage: 3, offload_parameters: true}",
            "pretrain.offload_nvme: takes only parameters",
        ),
        ("analyse.methods=[lens, gcg, lens]", "analyse.methods: lens, gcg, lens names one twice; name each once"),
        ("build_query.negative_threshold=0.5", "build_query.negative_threshold: 0.5 is not below"),
        (
            "build_query={reliability_queries: 1}",
            "build_query.reliability_queries: 1 query has no halves to compare; set 2 or more",
        ),
        (
            "build_query={refine_steps: 2, nulls: 3}",
            "build_query.refine_steps: 2 beside build_query.nulls = 3; nulls are of the direction before it is refined",
        ),
        ("baseline=false", "baseline: false leaves no proxy"),
        ("proxy={source: a, architecture: {}}", "proxy: set either source or architecture, not both"),
        ("target={source: a, architecture: {}}", "target: set either source or architecture, not both"),
        ("seed", "--set seed: expected a.b=value"),
        ("=1", "--set =1: expected a.b=value"),
        ("seed.x=1", "--set seed.x=1: seed is not a section"),
        ("seed=[1", "--set seed=[1: the value is not valid YAML"),
    ],
)
def test_errors_name_the_dotted_key_and_the_reason(tmp_path, override, message):
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}"):
        load_config(write(tmp_path, "seed: 0"), [override])


@pytest.mark.parametrize(
    "pretrain",
    [
        "{zero_stage: 1, offload_optimizer: true}",
        "{zero_stage: 3, offload_parameters: true}",
        "{zero_stage: 3, offload_parameters: true, offload_optimizer: true, offload_nvme: /nvme}",
    ],
)
def test_what_can_be_offloaded_is_accepted(tmp_path, pretrain):
    load_config(write(tmp_path, f"pretrain: {pretrain}"))


def test_trainings_of_one_process_are_one_at_a_time(tmp_path):
    config = write(tmp_path, "pretrain: {engine: torch}")
    assert load_config(config).compare.trainings == 1
    with pytest.raises(ConfigError, match=r"^compare\.trainings: engine: torch trains in this process"):
        load_config(config, ["compare.trainings=2"])


def test_tokenizer_cannot_be_named_and_trained(tmp_path):
    with pytest.raises(ConfigError, match=r"^pack_corpus\.train_tokenizer: a tokenizer is named too"):
        load_config(write(tmp_path, "tokenizer: gpt2"), ["pack_corpus.train_tokenizer=512"])
    with pytest.raises(ConfigError, match=r"^pretrain\.train_tokenizer: pretrain\.tokenizer is named too"):
        load_config(
            write(tmp_path, "pretrain: {tokenizer: gpt2}\nproxy: {source: p}"), ["pretrain.train_tokenizer=512"]
        )


@pytest.mark.parametrize(("text", "message"), [("a: [", "not valid YAML"), ("- a", "expected a mapping of sections")])
def test_unreadable_file_is_named(tmp_path, text, message):
    path = write(tmp_path, text)
    with pytest.raises(ConfigError, match=f"{re.escape(str(path))}: {message}"):
        load_config(path)
    with pytest.raises(FileNotFoundError, match=r"missing\.yaml"):
        load_config(tmp_path / "missing.yaml")


@pytest.mark.parametrize(("text", "value"), [("6e-4", 6e-4), ("6.0e-4", 6e-4), ("1", 1.0), ("1E+3", 1000.0)])
def test_number_in_any_notation_is_a_float(tmp_path, text, value):
    for config in (
        load_config(write(tmp_path, f"pretrain: {{learning_rate: {text}}}")),
        load_config(write(tmp_path, ""), [f"pretrain.learning_rate={text}"]),
    ):
        assert config.pretrain.learning_rate == value
        assert type(config.pretrain.learning_rate) is float


def test_bare_string_stands_for_the_first_field():
    short = {"proxy": "a/b", "pack_corpus": {"inputs": ["x.txt"]}, "evaluate": {"prompts": "p", "classifier": "labels"}}
    full = {
        "proxy": {"source": "a/b"},
        "pack_corpus": {"inputs": [{"path": "x.txt"}]},
        "evaluate": {"prompts": {"path": "p"}, "classifier": {"name": "labels"}},
    }
    assert config_from_mapping(short) == config_from_mapping(full)
    assert config_from_mapping(short).pack_corpus.inputs == (Input(path="x.txt"),)


def test_overrides_win_over_the_file_and_the_last_over_the_first(tmp_path):
    path = write(tmp_path, "pretrain: {epochs: 1, penalty: 2}\ntokenizer: a")
    config = load_config(path, ["pretrain.epochs=3", "pretrain.epochs=5", "tokenizer=", "evaluate.models.m=hub/m"])
    assert (config.pretrain.epochs, config.pretrain.penalty) == (5.0, 2.0)
    assert config.tokenizer is None
    assert config.evaluate.models == {"m": "hub/m"}


def test_run_dir_is_put_into_every_string_after_the_overrides(tmp_path):
    text = "run_dir: a\npack_corpus: {inputs: ['{run_dir}/x.txt']}\nevaluate: {models: {m: '{run_dir}/m'}}"
    path = write(tmp_path, text)
    config = load_config(path, ["run_dir=b", "tokenizer='{run_dir}/t'"])
    assert config.pack_corpus.inputs[0].path == "b/x.txt"
    assert (config.evaluate.models["m"], config.tokenizer) == ("b/m", "b/t")


def test_section_mapping_is_plain_json():
    mapping = to_mapping(Input(path="a", rows=(1, 2)))
    assert mapping == {
        "path": "a", "text_column": "text", "tokens_column": None, "spans_column": None, "rows": [1, 2], "subset": None,
        "split": None, "revision": None,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("tree", "expected"),
    [
        ({"tokenizer": "t", "proxy": "p", "target": "x"}, "t"),
        ({"proxy": "p", "target": "x"}, "p"),
        ({"target": "x"}, "x"),
    ],
)
def test_tokenizer_is_the_named_the_proxys_or_the_targets(tree, expected):
    assert config_from_mapping(tree).named_tokenizer == expected


def test_no_tokenizer_at_all_is_refused_by_name():
    with pytest.raises(ConfigError, match=r"^tokenizer: name a hub id or a local folder"):
        _ = Config().named_tokenizer


def test_a_file_extends_another_key_by_key(tmp_path):
    (tmp_path / "base.yaml").write_text(
        "seed: 3\nproxy: a/b\npretrain: {epochs: 2, workers: 2}\nevaluate: {word_list: [x]}"
    )
    (tmp_path / "middle.yaml").write_text("extends: base.yaml\npretrain: {workers: 4}\nproxy: {source: c/d}")
    path = tmp_path / "deep" / "top.yaml"
    path.parent.mkdir()
    path.write_text("extends: ../middle.yaml\nevaluate: {word_list: [y]}")
    config = load_config(path, ["pretrain.epochs=5"])
    assert (config.seed, config.pretrain.epochs, config.pretrain.workers) == (3, 5.0, 4)
    assert (config.proxy.source, config.evaluate.word_list) == ("c/d", ("y",))


def test_an_override_of_one_place_is_of_no_other_that_an_alias_names(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(
        "fit_factors: {resources: &own {gpus: 0}}\nscore_corpus: {resources: *own}\n"
        "evaluate: {resources: *own, classifier: &c {name: hatesonar}, classifiers: {x: *c}}"
    )
    config = load_config(path, ["evaluate.resources.gpus=1", "evaluate.classifier.name=words:w.txt"])
    assert [config.fit_factors.resources.gpus, config.score_corpus.resources.gpus] == [0, 0]
    assert config.evaluate.resources.gpus == 1
    assert config.evaluate.classifiers["x"].name == "hatesonar"


def test_a_file_named_after_the_packaged_one_that_it_extends_is_not_its_own_base(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    wanted = dataclasses.replace(load_config("tiny"), seed=7)
    Path("tiny.yaml").write_text("extends: tiny.yaml\nseed: 7")
    assert load_config("tiny.yaml") == wanted
    Path("mine.yaml").write_text("extends: mine.yaml")
    with pytest.raises(ConfigError, match=r"mine\.yaml extends 'mine\.yaml'"):
        load_config("mine.yaml")


def test_files_that_extend_each_other_or_nothing_are_refused(tmp_path):
    (tmp_path / "a.yaml").write_text("extends: b.yaml")
    (tmp_path / "b.yaml").write_text("extends: a.yaml")
    with pytest.raises(ConfigError, match=r"extends: .*a\.yaml extends"):
        load_config(tmp_path / "a.yaml")
    (tmp_path / "c.yaml").write_text("extends: [a, b]")
    with pytest.raises(ConfigError, match="extends: "):
        load_config(tmp_path / "c.yaml")
    (tmp_path / "d.yaml").write_text("extends: nowhere.yaml")
    with pytest.raises(FileNotFoundError, match=r"nowhere\.yaml"):
        load_config(tmp_path / "d.yaml")


@pytest.mark.parametrize(
    ("source", "others", "message"),
    [
        ({"spans_column": "s"}, {}, "token ids have no text; unset spans_column"),
        ({"text_column": "t"}, {}, "token ids have no text; unset text_column"),
        ({}, {"pack_corpus": {"train_tokenizer": 300}}, "token ids are of one tokenizer"),
        ({}, {"proxy": "p", "pretrain": {"tokenizer": "other"}}, "token ids are of one tokenizer"),
        ({}, {"proxy": "p", "pretrain": {"train_tokenizer": 300}}, "token ids are of one tokenizer"),
    ],
)
def test_token_ids_do_not_go_with_what_needs_text(source, others, message):
    packed = {**others.get("pack_corpus", {}), "inputs": ["b", {"path": "a", "tokens_column": "ids", **source}]}
    with pytest.raises(ConfigError, match=rf"^pack_corpus\.inputs\[1\]\.tokens_column: {message}"):
        config_from_mapping({**others, "pack_corpus": packed})


@pytest.mark.parametrize(
    ("evaluate", "message"),
    [
        ({"models": {"a/b": "x"}}, r"evaluate\.models: 'a/b' names files"),
        ({"prompt_sets": {"..": "x"}}, r"evaluate\.prompt_sets: '\.\.' names files"),
        ({"prompt_sets": {"prompts": "x"}}, r"evaluate\.prompt_sets\.prompts"),
        ({"report": "../report"}, r"evaluate\.report"),
        ({"balanced": True}, r"evaluate\.max_prompts"),
        ({"classifiers": {"implicit": {"nam": "x"}}}, r"evaluate\.classifiers\.implicit\.name"),
        ({"heldout": ["a", {"path": "b", "tokens_column": "c"}]}, r"evaluate\.heldout\[1\]\.tokens_column: texts are"),
        ({"cloze": {"path": "b", "tokens_column": "c"}}, r"evaluate\.cloze\.tokens_column: texts are needed"),
        ({"annotated": ["b"]}, r"evaluate\.annotated\[0\]\.spans_column: name the column of the spans"),
    ],
)
def test_evaluations_that_cannot_be_are_refused(evaluate, message):
    with pytest.raises(ConfigError, match=message):
        config_from_mapping({"evaluate": evaluate})


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        ({"a": {}}, "compare.methods.a: set one of mask, dpo and rad; it has none"),
        ({"a": {"mask": "random", "rad": {}}}, "compare.methods.a: set one of mask, dpo and rad; it has mask and rad"),
        ({"a": {"dpo": {}, "penalty": 2}}, "compare.methods.a.penalty: is of masked tokens; dpo has none"),
        ({"a": {"rad": {}, "objective": "ignore"}}, "compare.methods.a.objective: is of masked tokens; rad has none"),
        (
            {"a": {"mask": "words", "selection": "units"}},
            "compare.methods.a.selection: is of masks by scores: influence",
        ),
        ({"a": {"mask": "influence", "window": 0}}, "compare.methods.a.window: is of `selection: units`"),
        ({"a": {"mask": "words", "max_fraction": 0.1}}, "compare.methods.a.max_fraction: is of masks by scores"),
        ({"a": {"mask": "influence", "max_fraction": 0.1}}, "compare.methods.a.max_fraction: is of masks by scores"),
        ({"a": {"rad": {"model": "b"}}}, "compare.methods.a.rad.model: 'b' is none of baseline, penalised"),
        ({"a": {"rad": {}}, "b": {"dpo": {"model": "a"}}}, "compare.methods.b.dpo.model: 'a' is none of baseline"),
        (
            {"a": {"rad": {"top_n": 3}}},
            "compare.methods.a.rad.top_n: unknown key; did you mean compare.methods.a.rad.top_k?",
        ),
        ({"a": {"dpo": {"batch_size": 24}}}, "compare.methods.a.dpo.batch_size: 24 is not a multiple"),
        ({"samples": "random"}, "compare.methods.samples: that name is taken"),
        ({"x/y": "random"}, "compare.methods: 'x/y' names a folder"),
    ],
)
def test_methods_of_a_comparison_are_checked_by_key(methods, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        config_from_mapping({"compare": {"methods": methods}})


def test_a_method_starts_from_a_model_named_before_it():
    methods = {
        "mine": "random",
        "dpo": {"dpo": {"model": "mine"}},
        "both": {"rad": {"model": "dpo"}},
        "x": {"rad": "dpo"},
    }
    config = config_from_mapping({"compare": {"methods": methods}})
    assert [method.describe() for method in config.compare.methods.values()] == [
        "random masked",
        "DPO of mine",
        "RAD of dpo",
        "RAD of dpo",
    ]


@pytest.mark.parametrize("name", ["own", "../elsewhere", "a/b", ""])
def test_a_further_behaviour_has_a_name_of_its_own(name: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"^score_corpus.queries: '{re.escape(name)}' names a column of scores and a folder.* 'own'"
    ):
        config_from_mapping({"score_corpus": {"queries": {name: "other/query"}}})


def test_a_packaged_config_is_found_by_name_from_any_folder(tmp_path, monkeypatch):
    assert packaged_configs() == [path.stem for path in CONFIGS]
    monkeypatch.chdir(tmp_path)
    wanted = load_config(Path(__file__).parents[3] / "configs" / "tiny.yaml")
    for name in ("tiny", "tiny.yaml", "configs/tiny.yaml"):
        assert load_config(name) == wanted
    assert load_config(write(tmp_path, "extends: tiny.yaml\nseed: 7")) == dataclasses.replace(wanted, seed=7)
    (tmp_path / "tiny.yaml").write_text("seed: 3")
    assert load_config("tiny.yaml") == Config(seed=3), "a file of that path comes first"
    for name in ("huge", "elsewhere/tiny.yaml", "../configs/tiny.yaml"):
        with pytest.raises(FileNotFoundError, match=r"does not exist; packaged are demo, finetune, "):
            load_config(name)
