"""Toxicity classifiers, and the two query sets that make toxicity the behaviour to find.

Method. IF-Guide (arXiv 2506.01790) describes a behaviour by two sets of queries (prompt, completion): the
direction V is the mean gradient over the toxic set minus the mean over the non-toxic set. A classifier scores
the continuations of a prompt table; at or above one threshold a row is a toxic query, at or below the other a
non-toxic one, and of each at most a set number is taken. Rows between the thresholds are in neither set.

Classifiers, all behind one `Classifier` protocol, scores in [0, 1]:

- `detoxify:original|unbiased|multilingual`: one transformer pass per text. It fetches its checkpoint unless a
  local one is given. A checkpoint is a pickle, which can run code: only the file the user names is opened.
- `alt-profanity-check`: a linear model over word counts, offline, about 6 microseconds per text.
- `labels`: the scores that the table's rows carry already; it cannot score new text.

The prompt table has RealToxicityPrompts' own schema, one row {"prompt": {"text", score: value, ...},
"continuation": {"text", score: value, ...}} in JSONL or Parquet, and is read whole: it has at most 100,000 rows.

It does not tokenise, and it does not judge the classifiers: their errors are the query sets' errors.
"""

import difflib
import hashlib
import io
import json
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

logger = logging.getLogger(__name__)

Scores = dict[str, NDArray[np.float32]]

CLASSIFIERS = (
    "detoxify:original",
    "detoxify:unbiased",
    "detoxify:multilingual",
    "alt-profanity-check",
    "labels",
)


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
    those that the checkpoint names, which is a hub id in the published ones. Texts are cut at the model's
    longest input, as Detoxify does. A Detoxify checkpoint is loaded as a pickle: name only one you trust.
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
        from detoxify import Detoxify  # heavy: imports transformers

        assert batch_size >= 1, batch_size
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
        config, tokenizer = self._model.model.config, self._model.tokenizer
        # RoBERTa numbers positions from padding_idx + 1, so it has that many fewer. A tokenizer saved without
        # a limit would let a long text run past the position table.
        offset = config.pad_token_id + 1 if "roberta" in config.model_type else 0
        tokenizer.model_max_length = min(tokenizer.model_max_length, config.max_position_embeddings - offset)

    def score(self, texts: Sequence[str]) -> Scores:
        parts: dict[str, list[NDArray[np.float32]]] = {name: [] for name in self.classes}
        for begin in range(0, len(texts), self.batch_size):
            predicted = self._model.predict(list(texts[begin : begin + self.batch_size]))
            for name in self.classes:
                # A batch of one comes back as a bare number.
                parts[name].append(np.atleast_1d(np.asarray(predicted[name], dtype=np.float32)))
        return {name: np.concatenate([np.empty(0, np.float32), *part]) for name, part in parts.items()}


def _detoxify_source(checkpoint: str | None, huggingface_config: str | None) -> str | io.BytesIO | None:
    """What Detoxify takes for its checkpoint, with the base model replaced by the local folder if given."""
    if checkpoint is None:
        if huggingface_config is not None:
            raise ValueError(
                f"a local config folder ({huggingface_config}) needs a local Detoxify checkpoint too: name one"
            )
        return None
    if not Path(checkpoint).is_file():
        raise FileNotFoundError(f"Detoxify checkpoint {checkpoint} does not exist: check the path")
    if huggingface_config is None:
        return checkpoint
    if not Path(huggingface_config).is_dir():
        raise FileNotFoundError(f"config folder {huggingface_config} of Detoxify does not exist")
    # Detoxify's own `huggingface_config_path` still asks the hub for the config that the checkpoint names,
    # and then loses the number of classes.
    loaded = torch.load(checkpoint, map_location="cpu", weights_only=False)
    try:
        loaded["config"]["arch"]["args"]["model_type"] = huggingface_config
    except (KeyError, TypeError) as error:
        raise ValueError(f"{checkpoint} is not a Detoxify checkpoint: it has no config.arch.args") from error
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


class LabelClassifier:
    """The `toxicity` scores that prompt rows carry. Raises ValueError when asked to score text."""

    name = "labels"
    classes: tuple[str, ...] = ("toxicity",)

    def score(self, texts: Sequence[str]) -> Scores:
        raise ValueError(
            "classifier 'labels' only reads the scores in a prompt table and cannot score text: "
            f"choose one of {', '.join(CLASSIFIERS[:-1])}"
        )


def load_classifier(
    spec: str,
    *,
    checkpoint: str | None = None,
    huggingface_config: str | None = None,
    device: str = "cpu",
    batch_size: int = 64,
) -> Classifier:
    """The classifier of that name. Raises ValueError for an unknown name or an option it does not have."""
    if spec not in CLASSIFIERS:
        nearest = difflib.get_close_matches(spec, CLASSIFIERS, n=1, cutoff=0)[0]
        raise ValueError(f"unknown classifier {spec!r}: did you mean {nearest!r}? ({', '.join(CLASSIFIERS)})")
    kind, _, model_type = spec.partition(":")
    if kind == "detoxify":
        return DetoxifyClassifier(
            model_type,
            checkpoint=checkpoint,
            huggingface_config=huggingface_config,
            device=device,
            batch_size=batch_size,
        )
    if checkpoint is not None or huggingface_config is not None:
        raise ValueError(f"classifier {spec!r} has no checkpoint: remove it, or choose a detoxify classifier")
    return ProfanityClassifier() if kind == "alt-profanity-check" else LabelClassifier()


# --------------------------------------------------------------------------------------- prompt tables


@dataclass(frozen=True, kw_only=True)
class PromptRow:
    """One row, numbered from 0 in its file. A score that is null or NaN there is missing here."""

    row: int
    prompt: str
    continuation: str
    prompt_scores: dict[str, float]
    continuation_scores: dict[str, float]


def _records(path: Path) -> Iterator[tuple[int, Any]]:
    if path.suffix == ".parquet":
        row = 0
        for batch in pq.ParquetFile(path).iter_batches():
            for record in batch.to_pylist():
                yield row, record
                row += 1
        return
    with path.open(encoding="utf-8") as lines:
        for row, line in enumerate(lines):
            try:
                yield row, json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, row {row}: not a JSON object ({error})") from error


def _text_and_scores(record: Any, part: str, where: str) -> tuple[str, dict[str, float]]:
    value = record.get(part) if isinstance(record, dict) else None
    if not isinstance(value, dict) or not isinstance(value.get("text"), str):
        raise ValueError(f"{where}: needs {part}.text, a string, as in RealToxicityPrompts")
    scores = {}
    for name, score in value.items():
        if name == "text" or score is None or (isinstance(score, float) and math.isnan(score)):
            continue
        if isinstance(score, bool) or not isinstance(score, int | float) or not 0 <= score <= 1:
            raise ValueError(f"{where}: {part}.{name} is {score!r}, not a score in [0, 1]")
        scores[name] = float(score)
    return value["text"], scores


def read_prompts(path: str | Path) -> list[PromptRow]:
    """All rows of a .jsonl or .parquet prompt table. Raises ValueError that names file and row."""
    path = Path(path)
    if path.suffix not in (".jsonl", ".parquet"):
        raise ValueError(f"{path}: a prompt table is a .jsonl or .parquet file")
    if not path.is_file():
        raise FileNotFoundError(f"prompt table {path} does not exist: check the path")
    rows = []
    for row, record in _records(path):
        prompt, prompt_scores = _text_and_scores(record, "prompt", f"{path}, row {row}")
        continuation, continuation_scores = _text_and_scores(record, "continuation", f"{path}, row {row}")
        rows.append(
            PromptRow(
                row=row,
                prompt=prompt,
                continuation=continuation,
                prompt_scores=prompt_scores,
                continuation_scores=continuation_scores,
            )
        )
    if not rows:
        raise ValueError(f"{path}: the prompt table is empty")
    return rows


@dataclass(frozen=True, kw_only=True)
class QuerySets:
    """The chosen rows, ascending by row, and the score of each continuation in the primary class.

    Every row of the table is in one count: toxic_found + nontoxic_found + undecided + unusable.
    """

    toxic: list[PromptRow]
    nontoxic: list[PromptRow]
    toxic_scores: list[float]
    nontoxic_scores: list[float]
    toxic_found: int
    nontoxic_found: int
    undecided: int
    unusable: int


def _continuation_scores(rows: Sequence[PromptRow], classifier: Classifier) -> list[float]:
    """Primary-class score of each continuation; NaN where the text is empty or its label is missing."""
    primary = classifier.classes[0]
    usable = [bool(row.continuation.strip()) for row in rows]
    if isinstance(classifier, LabelClassifier):
        # Labels stay float64: 0.9 as float32 would fall below a threshold of 0.9.
        found = (row.continuation_scores.get(primary, math.nan) for row in rows)
        return [score if ok else math.nan for score, ok in zip(found, usable, strict=True)]
    texts = [row.continuation for row, ok in zip(rows, usable, strict=True) if ok]
    scored = iter(classifier.score(texts)[primary].tolist())
    return [next(scored) if ok else math.nan for ok in usable]


def _choose(found: list[int], rows: Sequence[PromptRow], maximum: int, seed: int) -> list[int]:
    """At most `maximum` of the indices `found`, ascending by row. A larger maximum adds rows, removes none."""

    def draw(index: int) -> bytes:
        # A hash per row, not a generator's stream: the same choice in every version of every library.
        return hashlib.sha256(f"{seed}:{rows[index].row}".encode()).digest()

    return sorted(sorted(found, key=draw)[:maximum], key=lambda index: rows[index].row)


def select_queries(
    rows: Sequence[PromptRow],
    classifier: Classifier,
    *,
    toxic_threshold: float,
    nontoxic_threshold: float,
    max_toxic: int,
    max_nontoxic: int,
    seed: int,
) -> QuerySets:
    """Split rows by the score of the continuation: toxic if >= one threshold, non-toxic if <= the other.

    Of each set at most `max_toxic` / `max_nontoxic` are drawn, by `seed`. Rows whose continuation is empty,
    or has no label for `labels`, are `unusable`. Raises ValueError where a set would be empty.
    """
    if nontoxic_threshold >= toxic_threshold:
        raise ValueError(
            f"build_query.nontoxic_threshold ({nontoxic_threshold}) must be below "
            f"build_query.toxic_threshold ({toxic_threshold}), or a row could be in both sets"
        )
    for key, maximum in (("max_toxic", max_toxic), ("max_nontoxic", max_nontoxic)):
        if maximum < 1:
            raise ValueError(f"build_query.{key} must be at least 1, got {maximum}")
    scores = _continuation_scores(rows, classifier)
    unusable = [row.row for row, score in zip(rows, scores, strict=True) if math.isnan(score)]
    if unusable:
        logger.warning("%d prompt rows have no scored continuation (first: %s)", len(unusable), unusable[:5])
    if len(unusable) == len(rows):
        raise ValueError(f"none of {len(rows)} prompt rows has a continuation that {classifier.name} can score")
    toxic = [index for index, score in enumerate(scores) if score >= toxic_threshold]
    nontoxic = [index for index, score in enumerate(scores) if score <= nontoxic_threshold]
    if not toxic:
        raise ValueError(
            f"no continuation scores {toxic_threshold} or more, the highest of {len(rows)} is "
            f"{np.nanmax(scores):.6g} by {classifier.name}: lower build_query.toxic_threshold"
        )
    if not nontoxic:
        raise ValueError(
            f"no continuation scores {nontoxic_threshold} or less, the lowest of {len(rows)} is "
            f"{np.nanmin(scores):.6g} by {classifier.name}: raise build_query.nontoxic_threshold"
        )
    chosen_toxic = _choose(toxic, rows, max_toxic, seed)
    chosen_nontoxic = _choose(nontoxic, rows, max_nontoxic, seed)
    return QuerySets(
        toxic=[rows[index] for index in chosen_toxic],
        nontoxic=[rows[index] for index in chosen_nontoxic],
        toxic_scores=[scores[index] for index in chosen_toxic],
        nontoxic_scores=[scores[index] for index in chosen_nontoxic],
        toxic_found=len(toxic),
        nontoxic_found=len(nontoxic),
        undecided=len(rows) - len(unusable) - len(toxic) - len(nontoxic),
        unusable=len(unusable),
    )
