"""ifguide.toxicity.sequence_classifier: how outputs become scores, and texts of any length."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    MPNetConfig,
    MPNetForSequenceClassification,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from ifguide.config import config_from_mapping
from ifguide.evaluation.agreement import check_classifiers
from ifguide.tokenizer import END_OF_TEXT, train_tokenizer
from ifguide.toxicity import load_classifier
from ifguide.toxicity.classifiers import make_classifier
from ifguide.toxicity.sequence_classifier import SequenceClassifier, head_of
from tests.unit.toxicity.bert import VOCABULARY, bert_config, write_tokenizer

SIX = ["toxic", "severe_toxic", "obscene", "threat", "insult", "identity_hate"]
TEXTS = ["you are kind", "", "rude", "you are very rude"]


def config(labels: list[str], problem: str | None = None, architecture: str = "BertForSequenceClassification"):
    names = dict(enumerate(labels))
    return PretrainedConfig(id2label=names, problem_type=problem, architectures=[architecture])


@pytest.mark.parametrize(
    ("labels", "problem", "architecture", "head"),
    [
        (SIX, None, "BertForSequenceClassification", "sigmoid"),
        (["toxicity", "sexual_explicit", "identity_attack"], None, "RobertaForSequenceClassification", "sigmoid"),
        (["LABEL_0", "LABEL_1", "LABEL_2"], None, "BertForMultiLabelClassification", "sigmoid"),
        (["neutral", "toxic"], "multi_label_classification", "X", "sigmoid"),
        (["toxicity"], "regression", "BertForSequenceClassification", "regression"),
        (SIX, "regression", "X", "regression"),
        (["score"], None, "RobertaForRegression", "regression"),
        (SIX, "single_label_classification", "X", "softmax"),
        (["LABEL_0", "LABEL_1"], None, "X", "softmax"),
        (["neutral", "toxic"], None, "X", "softmax"),
        (["nothate", "hate"], None, "X", "softmax"),
        (["NON_HATE", "HATE"], None, "X", "softmax"),
        (["NotToxic", "Toxic"], None, "X", "softmax"),
        (["hate speech", "normal", "offensive"], None, "X", "softmax"),
    ],
)
def test_config_architecture_and_labels_tell_the_head(labels, problem, architecture, head) -> None:
    assert head_of(config(labels, problem, architecture), labels, "m") == head


@pytest.mark.parametrize(
    ("labels", "problem"),
    [
        (["toxicity"], None),  # trained on a loss of one output: a regression or a sigmoid
        (["LABEL_0", "LABEL_1", "LABEL_2"], None),
        (["joy", "anger", "fear"], None),
        (["good", "toxic"], None),
        (["normative", "toxic"], None),  # no absence, though it begins like one
    ],
)
def test_what_none_of_them_tells_is_refused_and_the_option_named(labels, problem) -> None:
    with pytest.raises(ValueError, match=rf"^m has the labels? {labels[0]}.* set the classifier's `head`"):
        head_of(config(labels, problem), labels, "m")


@pytest.fixture
def bert(tmp_path: Path) -> Callable[..., Path]:
    """Makes a local BERT whose first output is `low` or `high`, by the word `rude`; the others are -6."""

    def make(labels: list[str], problem_type: str | None, low: float, high: float) -> Path:
        write_tokenizer(tmp_path)
        names = dict(enumerate(labels))
        torch.manual_seed(0)
        model = BertForSequenceClassification(bert_config(id2label=names, problem_type=problem_type)).eval()
        ids = torch.tensor([[2, 5, 6, VOCABULARY.index(word), 3] for word in ("kind", "rude")])
        with torch.no_grad():
            kind, rude = model.bert(ids).pooler_output
            direction = (rude - kind) / (rude - kind).square().sum()
            model.classifier.weight.zero_()
            model.classifier.bias.fill_(-6)
            model.classifier.weight[0] = direction * (high - low)
            model.classifier.bias[0] = low - (high - low) * direction @ kind
        model.save_pretrained(tmp_path)
        return tmp_path

    return make


def checked(tmp_path: Path, **classifier: str) -> dict:
    path = tmp_path / "labelled.jsonl"
    path.write_text('{"text": "you are kind", "toxic": false}\n{"text": "you are rude", "toxic": true}\n')
    options = {"classifier": classifier, "check_data": [str(path)], "resources": {"gpus": 0}}
    (found,) = check_classifiers(config_from_mapping({"evaluate": options}).evaluate, 0)
    return found


def test_a_regression_s_outputs_are_its_scores(bert: Callable[..., Path], tmp_path: Path) -> None:
    """Their sigmoid is .5 or more of every text."""
    path = bert(["toxicity"], "regression", 0.02, 0.97)
    scores = load_classifier(f"hf:{path}").score(["you are kind", "you are rude"])["toxicity"]
    np.testing.assert_allclose(scores, [0.02, 0.97], atol=1e-4)
    assert checked(tmp_path, name=f"hf:{path}")["accuracy"]["value"] == 1


def test_six_labels_without_a_problem_type_give_a_sigmoid_each(bert: Callable[..., Path], tmp_path: Path) -> None:
    """Their softmax is a third where two others of six are as likely."""
    path = bert(SIX, None, -5, 0.4)
    scores = load_classifier(f"hf:{path}", label="toxic").score(["you are kind", "you are rude"])
    np.testing.assert_allclose(scores["toxic"], torch.tensor([-5, 0.4]).sigmoid(), atol=1e-4)
    np.testing.assert_allclose(scores["threat"], torch.tensor([-6.0, -6.0]).sigmoid(), atol=1e-4)
    assert checked(tmp_path, name=f"hf:{path}", label="toxic")["f1"]["value"] == 1


def test_a_regression_outside_of_its_range_is_refused_and_inside_of_the_margin_clipped(
    bert: Callable[..., Path],
) -> None:
    path = bert(["toxicity"], "regression", -0.1, 1.2)
    assert load_classifier(f"hf:{path}").score(["you are kind", "you are rude"])["toxicity"].tolist() == [0, 1]
    path = bert(["toxicity"], "regression", 0.0, 4.0)
    with pytest.raises(
        ValueError, match=r"outputs from .* to 4, and a regression's are scores in \[0, 1\]: set .*`head`"
    ):
        load_classifier(f"hf:{path}").score(["you are kind", "you are rude"])


@pytest.mark.parametrize(("head", "expected"), [("sigmoid", [0.0474, 0.8808]), ("regression", [0, 1])])
def test_the_option_decides_where_the_config_does_not(bert, head, expected) -> None:
    path = bert(["toxicity"], None, *((-3, 2) if head == "sigmoid" else (0, 1)))
    with pytest.raises(ValueError, match="set the classifier's `head`"):
        load_classifier(f"hf:{path}")
    section = {"evaluate": {"classifier": {"name": f"hf:{path}", "head": head}}}
    classifier = make_classifier(config_from_mapping(section).evaluate.classifier, gpus=0)
    np.testing.assert_allclose(classifier.score(["you are kind", "you are rude"])["toxicity"], expected, atol=1e-3)
    with pytest.raises(ValueError, match="has one label, of which the softmax is 1"):
        load_classifier(f"hf:{path}", head="softmax")
    with pytest.raises(ValueError, match="has no `head` to choose"):
        load_classifier("alt-profanity-check", head=head)


def test_a_label_that_does_not_exist_or_stands_twice_is_named(bert: Callable[..., Path]) -> None:
    path = bert(SIX, None, 0, 1)
    with pytest.raises(ValueError, match=rf"has no label 'hate', only {', '.join(SIX)}"):
        load_classifier(f"hf:{path}", label="hate")
    path = bert(["toxic", "toxic"], "multi_label_classification", 0, 1)
    with pytest.raises(ValueError, match="two labels of one name, toxic, toxic: mend id2label"):
        load_classifier(f"hf:{path}", label="toxic")


def test_one_label_of_classes_that_exclude_each_other_is_refused(bert: Callable[..., Path]) -> None:
    path = bert(["toxicity"], "regression", 0, 1)
    file = path / "config.json"
    file.write_text(file.read_text().replace('"regression"', '"single_label_classification"'))
    with pytest.raises(
        ValueError, match=r"^hf:.* cannot be used as its config.json says: .*single_label_classification"
    ):
        load_classifier(f"hf:{path}")


def decoder(folder: Path, padding: str, side: str) -> Path:
    """A GPT-2 classifier of two labels; its tokenizer adds nothing to a text, and may have no token but one for it."""
    tokenizer = train_tokenizer(TEXTS * 9, vocab_size=300)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, eos_token=END_OF_TEXT, pad_token=padding, padding_side=side
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, n_positions=12, initializer_range=1.0,
        problem_type="multi_label_classification", id2label={0: "toxic", 1: "threat"}, pad_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    GPT2ForSequenceClassification(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("padding", [END_OF_TEXT, "<pad>"])
def test_a_decoder_scores_a_text_alike_alone_and_beside_others_an_empty_one_too(tmp_path, padding, side) -> None:
    path = decoder(tmp_path, padding, side)
    texts = [*TEXTS, "you are kind " * 30]
    alone = load_classifier(f"hf:{path}", batch_size=1).score(texts)["toxic"]
    beside = load_classifier(f"hf:{path}", batch_size=8).score(texts)["toxic"]
    assert np.isfinite(alone).all()
    assert np.ptp(alone) > 1e-2
    np.testing.assert_allclose(beside, alone, atol=1e-6)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(path)
    model = AutoModelForSequenceClassification.from_pretrained(path).eval()
    for text, score in zip(texts, alone, strict=True):
        ids = tokenizer(text)["input_ids"][:12] or [tokenizer.eos_token_id]
        with torch.no_grad():
            expected = model(torch.tensor([ids])).logits[0, 0].sigmoid()
        assert score == pytest.approx(float(expected), abs=1e-6)


def test_a_decoder_whose_config_pads_with_another_token_than_its_tokenizer_reads_no_padding(tmp_path) -> None:
    path = decoder(tmp_path, "<pad>", "right")
    config = json.loads((path / "config.json").read_text())
    config["pad_token_id"] = config["eos_token_id"]
    (path / "config.json").write_text(json.dumps(config))
    texts = ["you", "you are kind " * 3]
    alone = load_classifier(f"hf:{path}", batch_size=1).score(texts)["toxic"]
    beside = load_classifier(f"hf:{path}", batch_size=8).score(texts)["toxic"]
    np.testing.assert_allclose(beside, alone, atol=1e-6)


def test_a_tokenizer_without_padding_is_refused(tmp_path) -> None:
    path = decoder(tmp_path, END_OF_TEXT, "right")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(path)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(path)
    with pytest.raises(ValueError, match="has no padding token; set pad_token"):
        load_classifier(f"hf:{path}")


@pytest.mark.parametrize(
    ("config_class", "model_class"),
    [(RobertaConfig, RobertaForSequenceClassification), (MPNetConfig, MPNetForSequenceClassification)],
)
def test_texts_are_cut_at_the_positions_that_a_model_really_has(tmp_path, config_class, model_class) -> None:
    """Families that number places from the padding's id on have fewer than `max_position_embeddings` of them."""
    tokenizer = write_tokenizer(tmp_path)
    assert tokenizer.model_max_length > 10**9
    options = {
        "vocab_size": len(VOCABULARY), "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 16, "max_position_embeddings": 12, "pad_token_id": 1,
        "problem_type": "multi_label_classification", "id2label": {0: "toxic", 1: "threat"},
    }  # fmt: skip
    model_class(config_class(**options)).save_pretrained(tmp_path)
    classifier = load_classifier(f"hf:{tmp_path}")
    assert isinstance(classifier, SequenceClassifier)
    assert classifier._limit == 10
    assert np.isfinite(classifier.score(["you are kind " * 20, ""])["toxic"]).all()


def test_a_model_without_a_trained_head_is_refused(tmp_path: Path) -> None:
    BertForSequenceClassification(bert_config(num_labels=2)).bert.save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    with pytest.raises(ValueError, match=r"has no weights for classifier\.bias, classifier\.weight: it is no trained"):
        SequenceClassifier(str(tmp_path), label="LABEL_1")
