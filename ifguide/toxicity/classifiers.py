"""Toxicity classifiers behind one `Classifier` protocol: scores in [0, 1], per class.

- `detoxify:VARIANT`: one transformer pass per text. It fetches its checkpoint unless a local one is given. Detoxify
  would unpickle a checkpoint; a local one is read with `weights_only` before Detoxify sees it.
- `hf:SOURCE`: any sequence classifier of transformers, by hub id or local folder (ToxiGen-RoBERTa for implicit
  toxicity); see `toxicity.sequence_classifier`.
- `alt-profanity-check`: a linear model over word counts, offline, about 6 microseconds per text.
- `hatesonar`: a linear model of tweets, offline, about 1 ms per text; see `toxicity.sonar`.
- `words:FILE`: 1 where a text holds a word or phrase of the list, one per line, as whole words ignoring case; else 0.
- `fitted`: a linear model that is trained on texts with labels when it is loaded, in seconds; see `toxicity.fitted`.
- `labels`: the scores that rows carry already (Perspective's in RealToxicityPrompts); it cannot score new text.

Files and folders are local or remote. No classifier is calibrated: 0.5 does not mean the same to any two of them.
"""

import difflib
import io
import pickle
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import torch

from ifguide.artifacts import file_digest, folder_digest, json_digest
from ifguide.config import ClassifierSource, LabelledTexts
from ifguide.storage import local_copy
from ifguide.toxicity.fitted import FittedClassifier, require_both_kinds
from ifguide.toxicity.prompts import labelled_texts
from ifguide.toxicity.sequence_classifier import Head, Scores, SequenceClassifier, by_length, longest_input
from ifguide.toxicity.sonar import SonarClassifier
from ifguide.words import read_word_list

DETOXIFY = ("original", "unbiased", "multilingual", "original-small", "unbiased-small")
JIGSAW = ("toxicity", "severe_toxicity", "obscene", "threat", "insult", "identity_attack")
DETOXIFY_CLASSES = {"original": JIGSAW, "unbiased": (*JIGSAW, "sexual_explicit")}
CLASSIFIERS = (*(f"detoxify:{variant}" for variant in DETOXIFY), "alt-profanity-check", "hatesonar", "fitted", "labels")
PREFIXES = ("hf:", "words:")


class Classifier(Protocol):
    """`classes[0]` is the primary class: the one that queries and metrics are decided by."""

    name: str
    classes: tuple[str, ...]

    def score(self, texts: Sequence[str]) -> Scores:
        """Per class, (n,) float32 scores in [0, 1] in the order of `texts`."""
        ...


class DetoxifyClassifier:
    """Detoxify, from its own release or from a local checkpoint; `toxicity` is the primary class.

    `huggingface_config` is a local folder with the base model's config and tokenizer. Without it they are
    those that the checkpoint names, which is a hub id in the published ones.
    """

    def __init__(
        self,
        model_type: str,
        *,
        checkpoint: str | None = None,
        huggingface_config: str | None = None,
        device: str = "cpu",
        batch_size: int = 64,
    ) -> None:
        assert batch_size >= 1, batch_size
        from detoxify import Detoxify  # heavy: imports transformers

        self.name = f"detoxify:{model_type}"
        self.batch_size = batch_size
        source = _detoxify_source(checkpoint, huggingface_config)
        try:
            self._model = Detoxify(model_type, checkpoint=source, device=device)
        except OSError as error:
            raise FileNotFoundError(
                f"{self.name} could not load its files ({error}): without a network, name a local checkpoint "
                "and a local folder with the base model's config and tokenizer"
            ) from error
        classes = list(self._model.class_names)
        self.classes = tuple(sorted(classes, key=lambda name: name != "toxicity"))  # stable: only one moves
        tokenizer = self._model.tokenizer
        tokenizer.model_max_length = longest_input(self._model.model, tokenizer)

    def score(self, texts: Sequence[str]) -> Scores:
        scores = by_length(texts, self.batch_size, len(self.classes), self._batch)
        return dict(zip(self.classes, scores.T, strict=True))

    def _batch(self, texts: list[str]) -> np.ndarray:
        predicted = self._model.predict(texts)
        # A batch of one comes back as bare numbers.
        return np.stack([np.atleast_1d(np.asarray(predicted[name])) for name in self.classes], axis=1)


def _detoxify_source(checkpoint: str | None, huggingface_config: str | None) -> io.BytesIO | None:
    """What Detoxify takes for its checkpoint, with the base model replaced by the local folder if given."""
    if checkpoint is None:
        if huggingface_config is not None:
            raise ValueError(
                f"a local config folder ({huggingface_config}) needs a local Detoxify checkpoint too: name one"
            )
        return None
    file = local_copy(checkpoint)
    if not file.is_file():
        raise FileNotFoundError(f"Detoxify checkpoint {checkpoint} does not exist: check the path")
    folder = None if huggingface_config is None else local_copy(huggingface_config)
    if folder is not None and not folder.is_dir():
        raise FileNotFoundError(f"config folder {huggingface_config} of Detoxify does not exist")
    try:
        loaded = torch.load(file, map_location="cpu", weights_only=True)
        arguments = loaded["config"]["arch"]["args"]
        loaded["config"]["dataset"]["args"]["classes"], loaded["state_dict"]
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{checkpoint} holds more than tensors and plain values, which could run code: save its `config` and "
            f"`state_dict` alone ({str(error).splitlines()[0]})"
        ) from error
    except (KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"{checkpoint} is not a Detoxify checkpoint, {{config, state_dict}}: {error}") from error
    if folder is not None:
        # Detoxify's own `huggingface_config_path` still asks the hub for the config that the checkpoint names,
        # and then loses the number of classes.
        arguments["model_type"] = str(folder)
    buffer = io.BytesIO()
    torch.save(loaded, buffer)
    buffer.seek(0)
    return buffer


class ProfanityClassifier:
    """alt-profanity-check: probability of profanity as class `toxicity`. The model is in the package."""

    name = "alt-profanity-check"
    classes: tuple[str, ...] = ("toxicity",)

    def score(self, texts: Sequence[str]) -> Scores:
        from profanity_check import predict_prob  # loads its model when imported

        scores = predict_prob(list(texts)) if len(texts) else []
        return {"toxicity": np.asarray(scores, dtype=np.float32)}


class WordListClassifier:
    """1 where a text holds a whole word or phrase of a file, ignoring case; else 0. Class `toxicity`."""

    classes: tuple[str, ...] = ("toxicity",)

    def __init__(self, path: str) -> None:
        self.name = f"words:{path}"
        self.words = read_word_list(path)

    def score(self, texts: Sequence[str]) -> Scores:
        flags = [self.words.any_in(text) for text in texts]
        return {"toxicity": np.asarray(flags, dtype=np.float32)}


class LabelClassifier:
    """The scores of one class (`toxicity`) that rows carry. Raises ValueError when asked to score text."""

    name = "labels"

    def __init__(self, label: str | None = None) -> None:
        self.classes: tuple[str, ...] = (label or "toxicity",)

    def score(self, texts: Sequence[str]) -> Scores:
        raise ValueError(
            "classifier 'labels' only reads the scores in a table's rows and cannot score text: "
            f"choose one of {', '.join(CLASSIFIERS[:-1])}, hf:SOURCE, words:FILE"
        )


def require_known(
    spec: str, *, checkpoint: str | None, huggingface_config: str | None, label: str | None, head: Head | None
) -> None:
    """Raises ValueError for an unknown name, which names the nearest, and for an option that the classifier lacks."""
    kind, _, rest = spec.partition(":")
    if spec not in CLASSIFIERS and not (f"{kind}:" in PREFIXES and rest):
        nearest = difflib.get_close_matches(spec, CLASSIFIERS, n=1, cutoff=0)[0]
        kinds = ", ".join((*CLASSIFIERS, "hf:SOURCE", "words:FILE"))
        raise ValueError(f"unknown classifier {spec!r}: did you mean {nearest!r}? ({kinds})")
    if kind != "detoxify" and (checkpoint is not None or huggingface_config is not None):
        raise ValueError(f"classifier {spec!r} has no checkpoint: remove it, or choose a detoxify classifier")
    if label is not None and kind not in ("hf", "labels", "fitted"):
        raise ValueError(f"classifier {spec!r} has no `label` to choose: remove it, or choose an hf classifier")
    if head is not None and kind != "hf":
        raise ValueError(f"classifier {spec!r} has no `head` to choose: remove it, or choose an hf classifier")


def load_classifier(
    spec: str,
    *,
    checkpoint: str | None = None,
    huggingface_config: str | None = None,
    label: str | None = None,
    head: Head | None = None,
    training: Sequence[LabelledTexts] = (),
    device: str = "cpu",
    batch_size: int = 64,
    dotted_key: str = "classifier",
) -> Classifier:
    """The classifier of that name. Raises ValueError for an unknown name, an option it does not have, or bad rows of
    `training`, which names `dotted_key`."""
    kind, _, rest = spec.partition(":")
    require_known(spec, checkpoint=checkpoint, huggingface_config=huggingface_config, label=label, head=head)
    if kind == "detoxify":
        return DetoxifyClassifier(
            rest, checkpoint=checkpoint, huggingface_config=huggingface_config, device=device, batch_size=batch_size
        )
    if kind == "hf":
        return SequenceClassifier(rest, label=label, head=head, device=device, batch_size=batch_size)
    if kind == "words":
        return WordListClassifier(rest)
    if kind == "fitted":
        key = f"{dotted_key}.training"
        return FittedClassifier(labelled_texts(training, key), label=label, dotted_key=key)
    if kind == "hatesonar":
        return SonarClassifier()
    return ProfanityClassifier() if kind == "alt-profanity-check" else LabelClassifier(label)


def known_classes(source: ClassifierSource) -> tuple[str, ...] | None:
    """The classes of a classifier, where they are known without loading it; None: they are those of its model."""
    kind = source.name.partition(":")[0]
    if kind in (FittedClassifier.name, LabelClassifier.name):
        return (source.label or "toxicity",)
    if kind == "detoxify" and source.checkpoint is None:
        return DETOXIFY_CLASSES.get(source.name.partition(":")[2].removesuffix("-small"))
    classes = {
        "words": WordListClassifier.classes,
        ProfanityClassifier.name: ProfanityClassifier.classes,
        SonarClassifier.name: SonarClassifier.classes,
    }
    return classes.get(kind)


def classifier_inputs(classifiers: Mapping[str, ClassifierSource | None]) -> dict[str, str]:
    """Digests of what classifiers are made of, by dotted key: the texts that a fitted one learns from, a list's words,
    a local checkpoint and the folder of its config, a local model. One of a package or of the hub has none: its name
    says what it is.

    They are inputs of whatever is made with these classifiers.

    Raises:
        ValueError: no texts, texts of one kind alone, or a bad row. FileNotFoundError: no such file. Both name the key.
    """
    digests = {}
    for key, source in classifiers.items():
        if source is None:
            continue
        kind, _, rest = source.name.partition(":")
        if kind == FittedClassifier.name:
            texts = labelled_texts(source.training, f"{key}.training")
            require_both_kinds(texts, f"{key}.training")
            digests[f"{key}.training"] = json_digest([(text.text, text.share) for text in texts])
        elif kind == "words":
            digests[f"{key}.words"] = json_digest(sorted(read_word_list(rest).words))
        elif kind == "hf" and (folder := local_copy(rest)).is_dir():
            digests[f"{key}.model"] = folder_digest(folder)
        elif source.checkpoint is not None:
            digests[f"{key}.checkpoint"] = file_digest(local_copy(source.checkpoint))
            if source.huggingface_config is not None:
                digests[f"{key}.huggingface_config"] = folder_digest(local_copy(source.huggingface_config))
    return digests


def make_classifier(source: ClassifierSource, *, gpus: float, dotted_key: str = "classifier") -> Classifier:
    """The configured classifier on this worker's device; errors in what a fitted one learns from name `dotted_key`."""
    return load_classifier(
        source.name,
        checkpoint=source.checkpoint,
        huggingface_config=source.huggingface_config,
        label=source.label,
        head=source.head,
        training=source.training,
        device="cuda" if gpus else "cpu",
        batch_size=source.batch_size,
        dotted_key=dotted_key,
    )
