"""Which options count among what made an artifact: not placement, and not one that came later and is off."""

import dataclasses
import re
from pathlib import Path

import pytest

from ifguide.config import Config, config_from_mapping, load_config, result_options

SECTIONS = [f.name for f in dataclasses.fields(Config) if f.name not in ("run_dir", "cluster")]


def overridden(folder: Path, override: str) -> Config:
    """The defaults, but for one key."""
    (folder / "config.yaml").write_text("")
    return load_config(folder / "config.yaml", [override])


@pytest.mark.parametrize(
    "override",
    [
        "run_dir=elsewhere",
        "cluster.num_cpus=3",
        "pack_corpus.resources.cpus=2",
        "pretrain.resources.gpus=0",
        "pretrain.log_steps=1",
        "pretrain.max_failures=0",
        "build_query.classifier.batch_size=2",
        "pretrain.workers=2",
        "score_corpus.max_actors=7",
        "score_corpus.min_agreement=0.5",
        "score_corpus.resources.memory=1000",
        "evaluate.resources.attempts=1",
    ],
)
def test_placement_leaves_the_result_options_as_they_are(tmp_path, override):
    changed = overridden(tmp_path, override)
    assert changed != Config()
    assert result_options(changed, SECTIONS) == result_options(Config(), SECTIONS)


@pytest.mark.parametrize(
    "override",
    [
        "seed=1",
        "pack_corpus.inputs=[a.txt]",
        "pretrain.zero_stage=2",
        "build_query.classifier.name=labels",
        "score_corpus.micro_batch_blocks=4",
        "evaluate.models={a: b}",
    ],
)
def test_an_option_that_changes_results_changes_the_result_options_of_its_section_only(tmp_path, override):
    changed = result_options(overridden(tmp_path, override), SECTIONS)
    plain = result_options(Config(), SECTIONS)
    assert [name for name in SECTIONS if changed[name] != plain[name]] == [re.split(r"[.=]", override)[0]]


def test_an_option_that_came_later_counts_only_where_it_is_on():
    def options(**build_mask):
        return result_options(config_from_mapping({"build_mask": build_mask}), ["build_mask"])["build_mask"]

    by_sum = options(rank_by="sum")
    assert not {"rank_by", "rate_prior"} & by_sum.keys()
    assert options() == options(rank_by="rate") == by_sum | {"rank_by": "rate"}
    assert options(rank_by="sum", rate_prior=100) == by_sum
    assert options(rate_prior=5) == by_sum | {"rank_by": "rate", "rate_prior": 5}


def test_result_options_of_sections_by_name_leave_placement_out():
    tree = {"classifiers": {"implicit": {"name": "hf:x", "batch_size": 7}}, "report": "again"}
    options = result_options(config_from_mapping({"evaluate": tree}), ["evaluate"])["evaluate"]
    assert "report" not in options
    assert options["classifiers"]["implicit"]["name"] == "hf:x"
    assert "batch_size" not in options["classifiers"]["implicit"]
