"""ifguide.config.names: what a config names never leaves its folder, nor takes another's place."""

import pytest

from ifguide.config import Config, ConfigError, Evaluate, check_names, config_from_mapping
from ifguide.folders import FOLDERS
from ifguide.interchange import export_scores
from ifguide.run import Run

BAD = ["..", ".", "a/b", "../../etc", "/etc", "", "a b", "-x", "é", "x" * 101, "a\\b", "a\n"]
PLACES = {
    "score_corpus.queries": lambda name: {"score_corpus": {"queries": {name: "folder"}}},
    "evaluate.models": lambda name: {"evaluate": {"models": {name: "m"}}},
    "evaluate.prompt_sets": lambda name: {"evaluate": {"prompt_sets": {name: {"path": "p"}}}},
    "evaluate.classifiers": lambda name: {"evaluate": {"classifiers": {name: "labels"}}},
    "evaluate.report": lambda name: {"evaluate": {"report": name}},
    "compare.methods": lambda name: {"compare": {"methods": {name: {"mask": "random"}}}},
}


@pytest.mark.parametrize("key", PLACES)
@pytest.mark.parametrize("name", BAD)
def test_a_name_that_is_not_one_plain_name_is_refused_wherever_it_stands(key, name):
    with pytest.raises(ConfigError, match=rf"^{key}: .*names .*; use letters, digits"):
        config_from_mapping(PLACES[key](name))


@pytest.mark.parametrize("key", PLACES)
def test_a_plain_name_is_taken(key):
    config_from_mapping(PLACES[key]("A-plain_name.2"))


@pytest.mark.parametrize("name", BAD)
def test_scores_are_exported_under_a_plain_name(name, tmp_path):
    with pytest.raises(ConfigError, match=r"^--name: "):
        export_scores(tmp_path / "run", tmp_path, name=name, behaviour="own", max_gigabytes=1)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", [*sorted({name.partition("/")[0] for name in FOLDERS} - {"report"}), "compare"])
def test_the_report_takes_no_other_artifacts_place(name):
    with pytest.raises(ConfigError, match=rf"^evaluate\.report: '{name}' names a folder; use .* none of .*'{name}'"):
        Run(config=Config(evaluate=Evaluate(report=name)))


def test_a_name_that_is_taken_is_refused():
    with pytest.raises(ConfigError, match=r"'own' names files; use .* and none of 'own'"):
        check_names("k", ["own"], taken=["own"])
