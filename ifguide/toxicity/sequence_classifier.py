"""Any sequence classifier of transformers as a classifier of texts, by hub id or local folder.

What its outputs mean is a matter of how it was trained, and of that a config says little: `head_of` takes what the
config, its architecture and the labels say, and refuses to guess. With `softmax` the labels exclude each other and one
of them, named, is the class; with `sigmoid` each label is a class; with `regression` the outputs are scores already.

Texts are taken in order of length, so that little is padded, and cut at the model's longest input.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from ifguide.storage import local_copy

Scores = dict[str, NDArray[np.float32]]
Head = Literal["softmax", "sigmoid", "regression"]

BY_PROBLEM: dict[str, Head] = {
    "multi_label_classification": "sigmoid",
    "single_label_classification": "softmax",
    "regression": "regression",
}
GENERIC = re.compile(r"label[ _-]?\d+", re.IGNORECASE)
ABSENT = ("no", "not", "non", "none", "neither", "neutral", "normal", "benign", "safe", "clean", "ok", "acceptable")
ABSENCE = re.compile(rf"(?:{'|'.join(ABSENT)})(?:[\W_]|$)|no[nt][a-z]")  # of the behaviour; "notoxic", "nothate" too
BEHAVIOUR = re.compile(
    r"tox|obscen|threat|insult|identity|hate|attack|profan|vulgar|sexual|abus|offens|violen|harass|harm|flirt"
)
OUTSIDE = 0.5  # how far beyond [0, 1] a regression's output may lie
LONGEST = 2**20  # tokens of a text, for models and tokenizers without a limit


def by_length(
    texts: Sequence[str], batch_size: int, columns: int, score: Callable[[list[str]], np.ndarray]
) -> NDArray[np.float32]:
    """`score` of batches of texts of like length, (n, columns) in the order of `texts`."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    scores = np.empty((len(texts), columns), dtype=np.float32)
    for begin in range(0, len(order), batch_size):
        batch = order[begin : begin + batch_size]
        scores[batch] = score([texts[i] for i in batch])
    return scores


def longest_input(model: Any, tokenizer: Any) -> int:
    """Tokens that the model can take. A tokenizer saved without a limit would run past the position table."""
    positions = getattr(model.config, "max_position_embeddings", None) or tokenizer.model_max_length
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            positions = module.num_embeddings - module.padding_idx - 1  # as RoBERTa, MPNet and others count them
    return min(tokenizer.model_max_length, positions, LONGEST)


def head_of(config: Any, labels: Sequence[str], name: str) -> Head:
    """How the outputs become scores, by the model's `problem_type`, its architecture's name, and its labels.

    Without a `problem_type`, labels of which one names the absence of the rest (`neutral`, `not_hate`) exclude each
    other, as do two that have no names; labels that all name bad behaviour do not, for other text would have none.

    Raises:
        ValueError: none of these says it; names `head`.
    """
    problem, architectures = config.problem_type, " ".join(config.architectures or ())
    ambiguous = ValueError(
        f"{name} has the label{'s' * (len(labels) > 1)} {', '.join(labels)} and problem_type {problem!r} in its config,"
        " which does not tell how its outputs become scores: set the classifier's `head` to softmax, sigmoid or"
        " regression"
    )
    if problem in BY_PROBLEM:
        return BY_PROBLEM[problem]
    if re.search("multi.?label", architectures, re.IGNORECASE):
        return "sigmoid"
    if "regress" in architectures.lower():
        return "regression"
    if len(labels) > 1 and any(map(ABSENCE.match, map(_lower, labels))):
        return "softmax"
    if len(labels) == 2 and all(map(GENERIC.fullmatch, labels)):
        return "softmax"
    if len(labels) > 1 and all(map(BEHAVIOUR.search, map(_lower, labels))):
        return "sigmoid"
    raise ambiguous


def _lower(label: str) -> str:
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", label).lower()


def outputs_of(config: Any, name: str, *, label: str | None, head: Head | None) -> tuple[list[str], str, Head]:
    """The labels of a model by its config, the one that counts, and how outputs become scores.

    Raises:
        ValueError: the config does not tell, or has not, what is wanted; says which option to set.
    """
    labels = [str(config.id2label.get(i, f"LABEL_{i}")) for i in range(config.num_labels)]
    if len(set(labels)) < len(labels):
        raise ValueError(f"{name} has two labels of one name, {', '.join(labels)}: mend id2label in its config")
    primary = _primary_label(labels, label, name)
    head = head or head_of(config, labels, name)
    if head == "softmax" and len(labels) == 1:
        raise ValueError(f"{name} has one label, of which the softmax is 1: set `head` to sigmoid or regression")
    return labels, primary, head


class SequenceClassifier:
    """Any sequence classifier of transformers. `label` names the label that is the primary class.

    It can be left out where the model has one label, or one called `toxicity` or `toxic`. `head` is that of `head_of`
    where it is None."""

    def __init__(
        self,
        source: str,
        *,
        label: str | None = None,
        head: Head | None = None,
        device: str = "cpu",
        batch_size: int = 64,
    ) -> None:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        assert batch_size >= 1, batch_size
        self.name, self.batch_size, self.device = f"hf:{source}", batch_size, device
        if source.startswith((".", "/", "~")) or "://" in source:
            folder = local_copy(source)
            if not folder.is_dir():
                raise FileNotFoundError(f"classifier folder {source!r} does not exist: check the path")
            source = str(folder)
        try:
            model, loaded = AutoModelForSequenceClassification.from_pretrained(
                source, dtype=torch.float32, output_loading_info=True
            )
            self._tokenizer = AutoTokenizer.from_pretrained(source)
        except OSError as error:
            raise FileNotFoundError(f"{self.name} could not load its files ({error}): name a local folder") from error
        except ValueError as error:  # such as a problem_type that does not fit the number of labels
            raise ValueError(f"{self.name} cannot be used as its config.json says: {error}") from error
        if missing := sorted(loaded["missing_keys"]):
            raise ValueError(
                f"{self.name} has no weights for {', '.join(missing[:3])}: it is no trained classifier, and its scores"
                " would be random; name a model with a head for classification"
            )
        self._model = torch.nn.Module.to(model, device).eval()  # transformers' own wrapper of it has no types
        config = self._model.config
        labels, primary, self._head = outputs_of(config, self.name, label=label, head=head)
        kept = [primary] if self._head == "softmax" else sorted(labels, key=lambda name: name != primary)
        self.classes = tuple(kept)
        self._columns = [labels.index(name) for name in kept]
        self._limit = longest_input(self._model, self._tokenizer)
        if self._tokenizer.pad_token is None:
            raise ValueError(f"{self.name}: its tokenizer has no padding token; set pad_token in its folder")
        if config.model_type != "xlnet":  # it alone reads a text's last place; others number places from the left
            self._tokenizer.padding_side = "right"
        padding = self._tokenizer.pad_token_id
        # a decoder's score is that of the last token before the padding
        config.pad_token_id = config.get_text_config().pad_token_id = padding
        special = (getattr(self._tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "unk"))
        self._blank = [next((token for token in special if token not in (None, padding)), padding)]

    def score(self, texts: Sequence[str]) -> Scores:
        scores = by_length(texts, self.batch_size, len(self.classes), self._batch)
        return dict(zip(self.classes, scores.T, strict=True))

    def _batch(self, texts: list[str]) -> np.ndarray:
        encoded = dict(self._tokenizer(texts, truncation=True, max_length=self._limit))
        for row, tokens in enumerate(encoded["input_ids"]):
            if not tokens:  # a decoder's tokenizer adds nothing to an empty text
                for name in encoded:
                    encoded[name][row] = {"input_ids": self._blank, "attention_mask": [1]}.get(name, [0])
        padded = self._tokenizer.pad(encoded, return_tensors="pt").to(self.device)
        with torch.inference_mode():
            logits = self._model(**padded).logits.float()
        return self._scores(logits)[:, self._columns].cpu().numpy()

    def _scores(self, logits: torch.Tensor) -> torch.Tensor:
        if self._head != "regression":
            return logits.softmax(-1) if self._head == "softmax" else logits.sigmoid()
        low, high = logits.min().item(), logits.max().item()
        if not (low >= -OUTSIDE and high <= 1 + OUTSIDE):
            raise ValueError(
                f"{self.name} gives outputs from {low:.3g} to {high:.3g}, and a regression's are scores in [0, 1]: set"
                " the classifier's `head` to sigmoid or softmax, or choose another"
            )
        return logits.clamp(0, 1)


def _primary_label(labels: list[str], wanted: str | None, name: str) -> str:
    if wanted is None:
        usual = [label for label in labels if label.lower() in ("toxicity", "toxic")]
        candidates = labels if len(labels) == 1 else usual
        if len(candidates) == 1:
            return candidates[0]
        raise ValueError(f"{name} has the labels {', '.join(labels)}: name the behaviour's as the classifier's `label`")
    if wanted not in labels:
        raise ValueError(f"{name} has no label {wanted!r}, only {', '.join(labels)}")
    return wanted
