"""What the methods of `compare` need of the rest of a config."""

from __future__ import annotations

from typing import Any

import pytest

from ifguide.config import ConfigError, config_from_mapping
from ifguide.config.compare import CLASSIFIED, WORDS
from ifguide.config.methods import check_method

LABELS: dict[str, Any] = {"build_query": {"prompts": "p.jsonl"}, "compare": {"classifier": "labels"}}
TOKENS: dict[str, Any] = {
    "pack_corpus": {"inputs": ["a.jsonl", {"path": "b.parquet", "tokens_column": "ids"}]},
    "evaluate": {"word_list": ["pig"]},
}
OTHER = {"score_corpus": {"queries": {"rude": "runs/rude/query"}}, "build_mask": {"behaviour": "rude"}}


def check(method: dict[str, Any], tree: dict[str, Any]) -> None:
    tree = {**tree, "compare": {**tree.get("compare", {}), "methods": {"tried": method}}}
    check_method(config_from_mapping(tree), "tried")


@pytest.mark.parametrize(
    ("method", "tree", "expected"),
    [
        ({"mask": "words"}, {}, "mask: words needs words; list them in evaluate.word_list"),
        ({"mask": "sentences"}, LABELS, "mask: sentences needs a classifier that scores text; set compare.classifier"),
        ({"mask": "annotated"}, {}, r"mask: annotated needs spans .*; set pack_corpus.inputs\[i\].spans_column"),
        ({"mask": "span_probe"}, {}, r"mask: span_probe needs spans .*; set pack_corpus.inputs\[i\].spans_column"),
        ({"mask": "probe"}, {"build_query": {"differential": False}}, "mask: probe needs queries of both sets"),
        ({"mask": "ngrams"}, OTHER, "mask: ngrams learns from the run's own query, and build_mask.behaviour is 'rude'"),
        ({"mask": "plain_influence"}, OTHER, "mask: plain_influence learns from the run's own query"),
        ({"mask": "exact"}, {"score_corpus": {"scorer": "student"}}, "mask: exact needs exact scores of every block"),
        ({"mask": "smoothed"}, {"score_corpus": {"scorer": "cascade"}}, "mask: smoothed needs exact scores"),
        ({"mask": "smoothed"}, {"score_corpus": {"smooth": None}}, "smoothed needs smoothed scores; set score_corpus"),
        (
            {"mask": "influence_words"},
            {"build_mask": {"standardise": True}, "build_query": {"nulls": 4}},
            "mask: influence_words goes by scores, and the run's own mask by z-scores; unset build_mask.standardise",
        ),
        (
            {"mask": "influence", "selection": "tokens"},
            {"build_mask": {"fdr": 0.1}, "build_query": {"nulls": 4}},
            "mask: influence goes by scores, and the run's own mask by z-scores",
        ),
        *(
            ({"mask": mask}, TOKENS, f"mask: {mask} reads texts, and pack_corpus.inputs are of token ids; pack texts")
            for mask in (*WORDS, *CLASSIFIED)
        ),
        ({"dpo": {}}, {}, "DPO of baseline learns from continuations of other prompts; set build_query.prompts"),
        ({"rad": {}}, LABELS, "RAD of baseline needs a classifier that scores text; set compare.classifier"),
    ],
)
def test_a_method_that_the_run_cannot_have_is_refused_by_its_key(
    method: dict[str, Any], tree: dict[str, Any], expected: str
) -> None:
    with pytest.raises(ConfigError, match=rf"^compare\.methods\.tried(\.mask)?: .*{expected.removeprefix('mask: ')}"):
        check(method, tree)


@pytest.mark.parametrize(
    ("method", "tree"),
    [
        ({"mask": "words"}, {"evaluate": {"word_list": ["pig"]}}),
        ({"mask": "annotated"}, {"pack_corpus": {"inputs": [{"path": "a.jsonl", "spans_column": "spans"}]}}),
        ({"mask": "influence", "selection": "units"}, {"build_mask": {"fdr": 0.1}, "build_query": {"nulls": 4}}),
        ({"mask": "influence_words"}, OTHER),
        *(({"mask": mask}, TOKENS) for mask in ("influence_words", "ngrams", "random", "probe")),
        ({"mask": "influence_words"}, {"score_corpus": {"scorer": "student"}}),
        ({"dpo": {}}, {"build_query": {"prompts": "p.jsonl"}}),
    ],
)
def test_what_it_can_have_passes(method: dict[str, Any], tree: dict[str, Any]) -> None:
    check(method, tree)
