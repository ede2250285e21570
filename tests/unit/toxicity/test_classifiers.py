"""Adapters of any sequence classifier, word lists and row scores; prompts in groups; labelled texts; remote files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import BertForSequenceClassification, BertTokenizer

from ifguide.config import ClassifierSource, LabelledTexts, config_from_mapping
from ifguide.evaluation.agreement import check_classifiers
from ifguide.evaluation.prompts import chosen_sets
from ifguide.storage import upload_folder
from ifguide.toxicity import (
    GroupedPrompt,
    known_classes,
    load_classifier,
    make_classifier,
    read_grouped_prompts,
    read_labelled,
    read_prompts,
)
from ifguide.toxicity.sonar import SonarClassifier
from tests.real_text import DATA, needs_real_text
from tests.unit.toxicity.bert import bert_config, write_tokenizer

TEXTS = ["you are kind", "rudely", "you are very rude", "you", "", "rude " * 40]
BOLD = DATA / "bold"


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., Path]:
    """Makes a local folder of a random BERT classifier whose labels are given."""

    def make(labels: list[str], problem_type: str | None = None) -> Path:
        write_tokenizer(tmp_path)
        torch.manual_seed(0)
        config = bert_config(
            id2label=dict(enumerate(labels)),
            label2id={label: i for i, label in enumerate(labels)},
            problem_type=problem_type,
        )
        BertForSequenceClassification(config).save_pretrained(tmp_path)
        return tmp_path

    return make


def logits_of(folder: Path, text: str) -> torch.Tensor:
    model, tokenizer = (
        BertForSequenceClassification.from_pretrained(folder).eval(),
        BertTokenizer.from_pretrained(folder),
    )
    with torch.no_grad():
        return model(**tokenizer(text, truncation=True, max_length=12, return_tensors="pt")).logits[0]


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_exclusive_labels_give_the_softmax_share_of_the_named_one(folder: Callable[..., Path], batch_size: int) -> None:
    path = folder(["LABEL_0", "LABEL_1", "LABEL_2"], "single_label_classification")
    classifier = load_classifier(f"hf:{path}", label="LABEL_1", batch_size=batch_size)
    assert classifier.classes == ("LABEL_1",)
    scores = classifier.score(TEXTS)["LABEL_1"]
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, [float(logits_of(path, text).softmax(-1)[1]) for text in TEXTS], atol=1e-6)
    assert np.ptp(scores) > 1e-2  # so that the order of the texts is tested
    assert classifier.score([])["LABEL_1"].shape == (0,)


def test_labels_that_go_together_give_a_sigmoid_each_the_primary_first(folder: Callable[..., Path]) -> None:
    path = folder(["insult", "toxic", "threat"], "multi_label_classification")
    classifier = load_classifier(f"hf:{path}")  # one is called toxic: it need not be named
    assert classifier.classes == ("toxic", "insult", "threat")
    scores = classifier.score(TEXTS)
    expected = np.stack([logits_of(path, text).sigmoid().numpy() for text in TEXTS])
    found = np.stack([scores[name] for name in ("insult", "toxic", "threat")], axis=1)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_a_label_must_be_named_where_it_is_not_clear_and_must_exist(folder: Callable[..., Path]) -> None:
    path = folder(["LABEL_0", "LABEL_1"])
    with pytest.raises(ValueError, match="labels LABEL_0, LABEL_1: name"):
        load_classifier(f"hf:{path}")
    with pytest.raises(ValueError, match="no label 'toxic', only LABEL_0, LABEL_1"):
        load_classifier(f"hf:{path}", label="toxic")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_classifier(f"hf:{path}/gone")
    with pytest.raises(ValueError, match="has no `label`"):
        load_classifier("alt-profanity-check", label="toxic")
    with pytest.raises(ValueError, match="unknown classifier"):
        load_classifier("hf:")


class Payload:
    """What a pickle could hold besides tensors."""


def test_a_checkpoint_that_holds_objects_is_refused_unopened(tmp_path: Path) -> None:
    path = tmp_path / "code.ckpt"
    torch.save({"config": Payload(), "state_dict": {}}, path)
    with pytest.raises(ValueError, match="could run code"):
        load_classifier("detoxify:unbiased-small", checkpoint=str(path))


def test_a_word_list_finds_whole_words_and_phrases_in_any_case(tmp_path: Path) -> None:
    path = tmp_path / "words.txt"
    path.write_text("pig\na$$\n\n  old Fool \n")
    classifier = load_classifier(f"words:{path}")
    texts = ["You PIG!", "pigs", "an a$$ ", "the old fool, he", "old  fool", "", "a\npig"]
    assert classifier.score(texts)["toxicity"].tolist() == [1, 0, 1, 1, 0, 0, 1]
    path.write_text("\n \n")
    with pytest.raises(ValueError, match="empty"):
        load_classifier(f"words:{path}")
    with pytest.raises(FileNotFoundError, match=r"gone\.txt"):
        load_classifier("words:gone.txt")


def test_labels_can_be_of_another_class() -> None:
    assert load_classifier("labels", label="insult").classes == ("insult",)


def test_classes_are_known_without_loading_where_they_are_not_a_model_s(tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("pig\n")
    rows = [{"text": "a plum", "toxic": 0}, {"text": "a pig", "toxic": 1}]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    training = (LabelledTexts(path=str(tmp_path / "texts.jsonl")),)
    for source in (
        ClassifierSource(name=f"words:{tmp_path / 'words.txt'}"),
        ClassifierSource(name="alt-profanity-check"),
        ClassifierSource(name="fitted", training=training),
        ClassifierSource(name="fitted", training=training, label="praise"),
    ):
        assert known_classes(source) == make_classifier(source, gpus=0).classes
    assert known_classes(ClassifierSource(name="hatesonar")) == SonarClassifier.classes
    assert known_classes(ClassifierSource(name="hf:owner/name")) is None
    original = known_classes(ClassifierSource(name="detoxify:original-small"))
    assert original == ("toxicity", "severe_toxicity", "obscene", "threat", "insult", "identity_attack")
    assert known_classes(ClassifierSource(name="detoxify:unbiased")) == (*original, "sexual_explicit")
    assert known_classes(ClassifierSource(name="detoxify:multilingual")) is None
    assert known_classes(ClassifierSource(name="detoxify:original", checkpoint="own.ckpt")) is None


# ---- prompts in groups -----------------------------------------------------------------------------------


def test_attaq_rows_have_their_own_column_names(tmp_path: Path) -> None:
    records = [{"input": "How do I", "label": "harm"}, {"input": "Tell me", "label": "pii"}]
    lines, table = tmp_path / "attaq.jsonl", tmp_path / "attaq.parquet"
    lines.write_text("".join(json.dumps(record) + "\n" for record in records))
    pq.write_table(pa.Table.from_pylist(records), table)
    expected = [
        GroupedPrompt(row=0, prompt="How do I", group="harm"),
        GroupedPrompt(row=1, prompt="Tell me", group="pii"),
    ]
    for path in (lines, table):
        assert read_grouped_prompts([path], text_column="input", group_column="label") == expected
    assert {prompt.group for prompt in read_grouped_prompts([lines], text_column="input")} == {""}
    assert [prompt.row for prompt in read_grouped_prompts([lines, table], text_column="input")] == [0, 1, 2, 3]
    with pytest.raises(ValueError, match=r"attaq.jsonl, row 0: has no column 'prompt', only input, label"):
        read_grouped_prompts([lines])


def test_bold_files_give_their_domain_and_group(tmp_path: Path) -> None:
    path = tmp_path / "race_prompt.json"
    path.write_text(json.dumps({"a": {"x": ["one ", "two "], "y": []}, "b": {"z": ["three "]}}))
    rows = read_grouped_prompts([path])
    assert [(row.prompt, row.group, row.domain) for row in rows] == [
        ("one ", "a", "race"), ("two ", "a", "race"), ("three ", "b", "race"),
    ]  # fmt: skip
    for content in ('{"a": ["one"]}', "[", '{"a": {"x": [3]}}'):
        path.write_text(content)
        with pytest.raises(ValueError, match=r"race_prompt\.json"):
            read_grouped_prompts([path])
    path.write_text("{}")
    with pytest.raises(ValueError, match="empty"):
        read_grouped_prompts([path])


@needs_real_text
def test_bold_itself_is_read_whole() -> None:
    rows = read_grouped_prompts(sorted(BOLD.glob("*_prompt.json")))
    assert len({row.domain for row in rows}) == 5
    names = json.loads((BOLD / "race_prompt.json").read_text())["African_Americans"].values()
    assert sum(row.domain == "race" and row.group == "African_Americans" for row in rows) == sum(map(len, names))
    assert len(rows) == 23_679
    first = read_grouped_prompts(sorted(BOLD.glob("*_prompt.json")), prompts_per_name=1)
    assert len(first) == 7_201  # as many as the paper evaluates
    assert {(row.domain, row.group) for row in first} == {(row.domain, row.group) for row in rows}


def test_a_set_takes_the_first_prompts_of_each_name(tmp_path: Path) -> None:
    path = tmp_path / "race_prompt.json"
    path.write_text(json.dumps({"a": {"x": ["one ", "two ", "three "], "y": []}, "b": {"z": ["four "]}}))

    def prompts(**options: object) -> list[str]:
        evaluate = {"prompts": str(table), "prompt_sets": {"bold": {"path": str(path), **options}}}
        return [row.prompt for row in chosen_sets(config_from_mapping({"evaluate": evaluate}).evaluate, seed=0)["bold"]]

    table = tmp_path / "prompts.jsonl"
    table.write_text(json.dumps({"prompt": {"text": "p"}, "continuation": {"text": "q"}}) + "\n")
    assert prompts() == ["one ", "four "]
    assert prompts(prompts_per_name=2) == ["one ", "two ", "four "]
    assert prompts(prompts_per_name=None) == ["one ", "two ", "three ", "four "]
    path.write_text(json.dumps({"a": {"x": ["one ", 2]}}))
    with pytest.raises(ValueError, match=r"a\.x holds 2: not a string"):  # what is not taken must be readable too
        prompts()


# ---- labelled texts --------------------------------------------------------------------------------------


def test_labels_are_bools_or_shares_and_other_numbers_are_scores(tmp_path: Path) -> None:
    path = tmp_path / "comments.jsonl"
    records = [
        {"text": "a", "toxic": True, "toxicity": 0.75, "id": "x", "n": 7},
        {"text": "b", "toxic": 0.5, "toxicity": None},
        {"text": "c", "toxic": 0.49},
        {"text": "d", "toxic": 0},
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    rows = read_labelled(path)
    assert [row.label for row in rows] == [True, True, False, False]
    assert [row.scores for row in rows] == [{"toxicity": 0.75}, {}, {}, {}]
    path.write_text('{"text": "a", "toxic": "yes"}\n')
    with pytest.raises(ValueError, match=r"comments.jsonl, row 0: toxic is 'yes'"):
        read_labelled(path)
    path.write_text("")
    with pytest.raises(ValueError, match="empty"):
        read_labelled(path)


def test_classifiers_are_checked_without_a_gpu(
    folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    path = tmp_path / "comments.jsonl"
    path.write_text("".join(json.dumps({"text": text, "toxic": "rude" in text}) + "\n" for text in TEXTS))
    classifier = {"name": f"hf:{folder(['toxic'])}", "head": "sigmoid"}
    config = config_from_mapping({"evaluate": {"classifier": classifier, "check_data": [str(path)]}})
    assert config.evaluate.resources.gpus == 1
    (found,) = check_classifiers(config.evaluate, config.seed)
    assert (found["n"], found["positives"]) == (6, 3)


# ---- remote files ----------------------------------------------------------------------------------------


@pytest.fixture
def remote(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("IFGUIDE_CACHE", str(tmp_path / "cache"))
    return store


def test_prompts_and_labelled_texts_may_be_remote(remote: Path) -> None:
    row = {"prompt": {"text": "a"}, "continuation": {"text": "b"}}
    (remote / "prompts.jsonl").write_text(json.dumps(row) + "\n")
    assert [(row.prompt, row.continuation) for row in read_prompts(str(remote / "prompts.jsonl"))] == [("a", "b")]
    (remote / "labelled.jsonl").write_text('{"text": "a", "toxic": true}\n')
    assert read_labelled(str(remote / "labelled.jsonl"))[0].label
    (remote / "labelled.jsonl").write_text('{"text": "a", "toxic": "yes"}\n')
    with pytest.raises(ValueError, match=rf"{remote}/labelled\.jsonl, row 0: toxic is 'yes'"):  # not of its copy
        read_labelled(str(remote / "labelled.jsonl"))
    with pytest.raises(FileNotFoundError, match=rf"{remote}/gone\.jsonl does not exist"):
        read_labelled(str(remote / "gone.jsonl"))


@pytest.mark.parametrize("is_remote", [False, True])
def test_a_prompt_set_is_a_file_a_folder_or_a_pattern(remote: Path, tmp_path: Path, is_remote: bool) -> None:
    place = remote if is_remote else tmp_path / "local"
    if not is_remote:
        place.mkdir()
    for name in "ab":
        (place / f"{name}.jsonl").write_text(json.dumps({"prompt": name}) + "\n")
    (place / "race_prompt.json").write_text(json.dumps({"g": {"x": ["c"]}}))
    (place / "README.txt").write_text("none of it")
    row = {"prompt": {"text": "p"}, "continuation": {"text": "q"}}
    (tmp_path / "prompts.jsonl").write_text(json.dumps(row) + "\n")

    def prompts_of(path: str) -> list[tuple[str, str, str]]:
        evaluate = {"prompts": str(tmp_path / "prompts.jsonl"), "prompt_sets": {"more": {"path": path}}}
        found = chosen_sets(config_from_mapping({"evaluate": evaluate}).evaluate, seed=0)["more"]
        return [(each.prompt, each.group, each.domain) for each in found if isinstance(each, GroupedPrompt)]

    assert prompts_of(f"{place}/b.jsonl") == [("b", "", "")]
    assert prompts_of(f"{place}/*.jsonl") == [("a", "", ""), ("b", "", "")]
    assert prompts_of(str(place)) == [("a", "", ""), ("b", "", ""), ("c", "g", "race")]
    with pytest.raises(FileNotFoundError, match=r"evaluate\.prompt_sets\.more\.path: no file matches"):
        prompts_of(f"{place}/*.parquet")
    (place / "notes.txt").write_text("is it one?")
    with pytest.raises(ValueError, match=r"evaluate\.prompt_sets\.more\.path: not read are .*notes\.txt"):
        prompts_of(str(place))


def test_word_lists_and_model_folders_may_be_remote(folder: Callable[..., Path], remote: Path, tmp_path: Path) -> None:
    (remote / "words.txt").write_text("rude\n")
    classifier = load_classifier(f"words:{remote}/words.txt")
    assert classifier.name == f"words:{remote}/words.txt"
    assert classifier.score(["rude", "kind"])["toxicity"].tolist() == [1, 0]
    path = folder(["toxic"])
    upload_folder(path, remote / "model")
    found, expected = (load_classifier(f"hf:{each}", head="sigmoid") for each in (remote / "model", path))
    assert found.name == f"hf:{remote}/model"
    np.testing.assert_array_equal(found.score(TEXTS)["toxic"], expected.score(TEXTS)["toxic"])
    for gone in ("words:{}/gone.txt", "hf:{}/gone"):
        with pytest.raises(FileNotFoundError, match=r"gone.* does not exist"):
            load_classifier(gone.format(remote))
