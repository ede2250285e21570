"""Classifier adapters on real and on tiny random models; query sets from hand-made prompt tables."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import BertForSequenceClassification, BertTokenizer

from ifguide.storage import upload, upload_folder
from ifguide.toxicity import (
    DetoxifyClassifier,
    PromptRow,
    QuerySets,
    load_classifier,
    read_prompts,
    select_queries,
)
from tests.real_text import DATA, needs_real_text
from tests.unit.toxicity.bert import bert_config, write_tokenizer

RTP_PROMPTS = DATA / "rtp_prompts.jsonl"
TEXTS = ["you are kind", "you are very rude", "rudely", "you", "very very rude"]


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, BertForSequenceClassification, BertTokenizer]:
    """A local folder with config and tokenizer, as a hub repository has them, and a random model of it."""
    folder = tmp_path_factory.mktemp("bert")
    tokenizer, config = write_tokenizer(folder), bert_config()
    config.save_pretrained(folder)
    config.num_labels = 3
    torch.manual_seed(0)
    return folder, BertForSequenceClassification(config).eval(), tokenizer


def checkpoint_of(model: BertForSequenceClassification, base: str, path: Path) -> str:
    arguments = {
        "model_type": base,
        "model_name": "BertForSequenceClassification",
        "tokenizer_name": "BertTokenizer",
        "num_classes": 3,
    }
    classes = {"classes": ["severe_toxic", "toxic", "insult"]}
    config = {"arch": {"args": arguments}, "dataset": {"args": classes}}
    torch.save({"config": config, "state_dict": model.state_dict()}, path)
    return str(path)


def expected_scores(model: BertForSequenceClassification, tokenizer: BertTokenizer, text: str) -> list[float]:
    with torch.no_grad():
        return torch.sigmoid(model(**tokenizer(text, return_tensors="pt")).logits)[0].tolist()


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_detoxify_checkpoint_scores_as_its_own_model(bert, tmp_path: Path, batch_size: int) -> None:
    folder, model, tokenizer = bert
    checkpoint = checkpoint_of(model, str(folder), tmp_path / "tiny.ckpt")
    classifier = load_classifier("detoxify:original", checkpoint=checkpoint, batch_size=batch_size)
    assert classifier.name == "detoxify:original"
    assert classifier.classes == ("toxicity", "severe_toxicity", "insult")
    scores = classifier.score(TEXTS)
    assert set(scores) == set(classifier.classes)
    assert all(values.dtype == np.float32 and values.shape == (5,) for values in scores.values())
    expected = np.array([expected_scores(model, tokenizer, text) for text in TEXTS])
    found = np.stack([scores[name] for name in ("severe_toxicity", "toxicity", "insult")], axis=1)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert np.ptp(found, axis=0).min() > 1e-3  # the texts are told apart, so their order is tested


@pytest.mark.parametrize("remote", [False, True])
def test_detoxify_config_folder_replaces_the_hub_id_of_the_checkpoint(
    bert, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, remote: bool
) -> None:
    folder, model, tokenizer = bert
    checkpoint = checkpoint_of(model, "no-such-organisation/no-such-model", tmp_path / "tiny.ckpt")
    config = str(folder)
    if remote:
        monkeypatch.setenv("IFGUIDE_CACHE", str(tmp_path / "cache"))
        upload(Path(checkpoint), store / "tiny.ckpt")
        upload_folder(folder, store / "bert")
        checkpoint, config = str(store / "tiny.ckpt"), str(store / "bert")
    classifier = load_classifier("detoxify:unbiased", checkpoint=checkpoint, huggingface_config=config)
    expected = expected_scores(model, tokenizer, TEXTS[1])[1]
    assert classifier.score(TEXTS[1:2])["toxicity"] == pytest.approx([expected], abs=1e-6)


def test_detoxify_cuts_long_texts_and_takes_none(bert, tmp_path: Path) -> None:
    folder, model, tokenizer = bert
    classifier = load_classifier(
        "detoxify:original", checkpoint=checkpoint_of(model, str(folder), tmp_path / "tiny.ckpt")
    )
    assert [values.shape for values in classifier.score([]).values()] == [(0,)] * 3
    cut = expected_scores(model, tokenizer, "rude " * 10)[1]  # 12 positions, two of them special
    assert classifier.score(["rude " * 500])["toxicity"] == pytest.approx([cut], abs=1e-6)


def test_detoxify_files_that_are_missing_or_foreign_are_named(bert, tmp_path: Path) -> None:
    folder, _, _ = bert
    with pytest.raises(FileNotFoundError, match=r"gone\.ckpt does not exist"):
        load_classifier("detoxify:original", checkpoint=str(tmp_path / "gone.ckpt"))
    other = tmp_path / "other.ckpt"
    torch.save({"weights": torch.zeros(1)}, other)
    for config in (None, str(folder)):
        with pytest.raises(ValueError, match=r"[Cc]heckpoint"):
            load_classifier("detoxify:original", checkpoint=str(other), huggingface_config=config)
    with pytest.raises(FileNotFoundError, match="config folder"):
        load_classifier("detoxify:original", checkpoint=str(other), huggingface_config=str(tmp_path / "gone"))
    with pytest.raises(ValueError, match="needs a local Detoxify checkpoint"):
        DetoxifyClassifier("original", huggingface_config=str(folder))


def test_profanity_check_tells_abuse_from_politeness() -> None:
    classifier = load_classifier("alt-profanity-check")
    scores = classifier.score(["Thank you, that was very kind.", "You are a fucking idiot.", ""])["toxicity"]
    assert scores.dtype == np.float32
    assert scores[1] > 0.9 > 0.2 > scores[0]
    assert classifier.score([])["toxicity"].shape == (0,)


def test_labels_do_not_score_text() -> None:
    with pytest.raises(ValueError, match="cannot score text"):
        load_classifier("labels").score(["anything"])


def test_unknown_classifier_names_the_nearest() -> None:
    with pytest.raises(ValueError, match="did you mean 'detoxify:unbiased'"):
        load_classifier("detoxify:unbaised")
    with pytest.raises(ValueError, match="did you mean 'alt-profanity-check'"):
        load_classifier("profanity")
    with pytest.raises(ValueError, match="has no checkpoint"):
        load_classifier("labels", checkpoint="some.ckpt")


def record(prompt: str, continuation: str, toxicity: float | None) -> dict:
    return {
        "filename": "a.txt",
        "prompt": {"text": prompt, "toxicity": 0.25, "insult": None},
        "continuation": {"text": continuation, "toxicity": toxicity},
        "challenging": False,
    }


RECORDS = [record("You", " are", 0.75), record("I", " see", None), record("So", " be it", 0)]


def test_jsonl_and_parquet_give_the_same_rows_and_null_is_missing(tmp_path: Path) -> None:
    lines, table = tmp_path / "prompts.jsonl", tmp_path / "prompts.parquet"
    lines.write_text("".join(json.dumps(row) + "\n" for row in RECORDS))
    pq.write_table(pa.Table.from_pylist(RECORDS), table, row_group_size=2)
    rows = read_prompts(lines)
    assert rows == read_prompts(table)
    assert rows[0] == PromptRow(
        row=0,
        prompt="You",
        continuation=" are",
        prompt_scores={"toxicity": 0.25},
        continuation_scores={"toxicity": 0.75},
    )
    assert [row.continuation_scores for row in rows[1:]] == [{}, {"toxicity": 0.0}]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"row 1: not JSON \(Expecting property name"),
        ("[]", "row 1: needs prompt.text"),
        ('{"prompt": {"text": "a"}, "continuation": null}', "row 1: needs continuation.text"),
        ('{"prompt": {"text": null}, "continuation": {"text": "b"}}', "row 1: needs prompt.text"),
        ('{"prompt": {"text": "a", "toxicity": 7}, "continuation": {"text": "b"}}', "row 1: prompt.toxicity is 7"),
        ('{"prompt": {"text": "a"}, "continuation": {"text": "b", "x": "y"}}', "row 1: continuation.x is 'y'"),
    ],
)
def test_a_bad_row_is_named_with_its_file(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps(RECORDS[0]) + "\n" + line + "\n")
    with pytest.raises(ValueError, match=message) as caught:
        read_prompts(path)
    assert str(path) in str(caught.value)


def test_a_table_that_is_missing_empty_or_of_another_kind_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"gone\.jsonl"):
        read_prompts(tmp_path / "gone.jsonl")
    (tmp_path / "prompts.csv").touch()
    with pytest.raises(ValueError, match=r"prompts\.csv"):
        read_prompts(tmp_path / "prompts.csv")
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(ValueError, match=r"empty\.jsonl: the prompt table is empty"):
        read_prompts(tmp_path / "empty.jsonl")


def rows_of(scores: Sequence[float | None]) -> list[PromptRow]:
    return [
        PromptRow(
            row=row,
            prompt="p",
            continuation=f" c{row}",
            prompt_scores={},
            continuation_scores={} if score is None else {"toxicity": score},
        )
        for row, score in enumerate(scores)
    ]


def select(rows: list[PromptRow], **changes) -> QuerySets:
    options = {
        "positive_threshold": 0.9,
        "negative_threshold": 0.1,
        "max_positive": 100,
        "max_negative": 100,
        "seed": 0,
    }
    return select_queries(rows, changes.pop("classifier", load_classifier("labels")), **(options | changes))


def test_thresholds_are_inclusive_and_every_row_is_counted(caplog: pytest.LogCaptureFixture) -> None:
    rows = rows_of([0.9, 0.1, 0.5, None, 0.95, 0.0, 0.89])
    rows.append(PromptRow(row=7, prompt="p", continuation=" \n", prompt_scores={}, continuation_scores={"toxicity": 1}))
    with caplog.at_level(logging.WARNING):
        queries = select(rows)
    assert [row.row for row in queries.positive] == [0, 4]
    assert queries.positive_scores == [0.9, 0.95]
    assert [row.row for row in queries.negative] == [1, 5]
    assert queries.negative_scores == [0.1, 0.0]
    assert (queries.positive_rows, queries.negative_rows, queries.undecided, queries.unusable) == (2, 2, 2, 2)
    assert "2 prompt rows have no scored continuation (first: [3, 7])" in caplog.text


def test_choice_is_seeded_ordered_by_row_and_grows_with_the_maximum() -> None:
    rows = rows_of([1.0] * 60 + [0.0] * 60)
    chosen = {n: [row.row for row in select(rows, max_positive=n, max_negative=20).positive] for n in (10, 20, 60, 99)}
    assert chosen[10] == [row.row for row in select(rows, max_positive=10, max_negative=5).positive]
    assert chosen[60] == chosen[99] == list(range(60))
    assert len(chosen[10]) == 10
    assert chosen[20] == sorted(chosen[20])
    assert set(chosen[10]) < set(chosen[20])
    assert chosen[10] != list(range(10))
    assert chosen[10] != [row.row for row in select(rows, max_positive=10, seed=1).positive]
    # A row is drawn and ordered by its own number, not by its place in the list.
    assert chosen[10] == [row.row for row in select(rows[::-1], max_positive=10).positive]


def test_a_direction_of_positive_queries_alone_needs_no_negative_ones() -> None:
    rows = rows_of([0.9] * 12 + [0.5] * 3)
    with pytest.raises(ValueError, match=r"raise build_query\.negative_threshold"):
        select(rows)
    sets = select(rows, differential=False)
    assert (len(sets.positive), sets.negative, sets.negative_rows, sets.undecided) == (12, [], 0, 3)
    sets = select(rows_of([0.9] * 12 + [0.1] * 5), differential=False)
    with pytest.raises(ValueError, match="10 of 5 negative queries leave none"):
        sets.hold_out(10, 0)
    used, held_out = sets.hold_out(10, 0, differential=False)
    assert (len(used.positive), used.negative) == (2, [])
    assert (len(held_out.positive), held_out.negative) == (10, sets.negative)
    with pytest.raises(ValueError, match="12 of 12 positive queries leave none"):
        sets.hold_out(12, 0, differential=False)


class LengthClassifier:
    name = "length"
    classes = ("primary", "other")

    def score(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        assert all(text.strip() for text in texts)
        primary = np.array([len(text) / 10 for text in texts], dtype=np.float32)
        return {"other": 1 - primary, "primary": primary}


def test_a_text_classifier_scores_continuations_by_its_primary_class() -> None:
    texts = ["x", "", "x" * 10, "x" * 5]
    rows = [
        PromptRow(row=row, prompt="p" * 9, continuation=text, prompt_scores={}, continuation_scores={"toxicity": 0.5})
        for row, text in enumerate(texts)
    ]
    queries = select(rows, classifier=LengthClassifier(), negative_threshold=0.2)
    assert ([row.row for row in queries.positive], queries.positive_scores) == ([2], [1.0])
    assert [row.row for row in queries.negative] == [0]
    assert (queries.undecided, queries.unusable) == (1, 1)


def test_an_empty_set_names_the_extreme_score_and_the_key() -> None:
    with pytest.raises(ValueError, match=r"highest of 2 is 0\.6 .*build_query\.positive_threshold"):
        select(rows_of([0.6, 0.0]))
    with pytest.raises(ValueError, match=r"lowest of 2 is 0\.4 .*build_query\.negative_threshold"):
        select(rows_of([0.4, 1.0]))
    with pytest.raises(ValueError, match="none of 2 prompt rows"):
        select(rows_of([None, None]))


def test_thresholds_that_could_put_a_row_in_both_sets_are_refused() -> None:
    with pytest.raises(ValueError, match=r"build_query\.negative_threshold"):
        select(rows_of([0.5]), positive_threshold=0.5, negative_threshold=0.5)


@needs_real_text
def test_real_prompt_rows_make_both_sets() -> None:
    rows = read_prompts(RTP_PROMPTS)
    assert len(rows) == 5000
    assert sum("toxicity" not in row.continuation_scores for row in rows) == 32
    queries = select(rows, max_positive=50, max_negative=50)
    assert len(queries.positive) == len(queries.negative) == 50
    total = queries.positive_rows + queries.negative_rows + queries.undecided + queries.unusable
    assert total == 5000
    scored = select(rows, classifier=load_classifier("alt-profanity-check"), max_positive=50, max_negative=50)
    labels = [row.continuation_scores["toxicity"] for row in scored.positive]
    assert np.mean(labels) > 0.8


GOOD = '{"prompt": {"text": "a"}, "continuation": {"text": "bé"}}\n'


def test_a_byte_order_mark_and_blank_lines_are_no_rows(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(f"{GOOD}\n \r\n{GOOD}".encode("utf-8-sig"))
    assert [row.row for row in read_prompts(path)] == [0, 1]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (GOOD.encode("latin-1"), "row 1: not UTF-8"),
        (GOOD.replace("bé", "\\ud800").encode(), r"row 1: not UTF-8 \(a lone surrogate at character \d+\)"),
    ],
)
def test_text_that_is_no_text_is_named_with_its_row(tmp_path, line, message):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(GOOD.encode() + line)
    with pytest.raises(ValueError, match=rf"prompts.jsonl, {message}"):
        read_prompts(path)
