"""Where documents, prompts, labelled texts and classifiers come from: what sections of the config name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ifguide.config.typed_yaml import ConfigError, option

HUB_PREFIX = "hf://"


@dataclass(frozen=True, kw_only=True)
class Input:
    """Documents. A bare string stands for `path`.

    `.jsonl`, `.ndjson`, `.csv`, `.tsv`, `.parquet`, `.arrow` and `.json` of rows give one document per row, `.txt` one
    per file, `.json` of lists of strings one per string. `ifguide.records.files` says what of a folder is taken.

    Attributes:
        path: a file, a glob, a folder, or `hf://name`.
        text_column: column of the text; `a.b` is `b` within the column `a`.
        tokens_column: column of token ids of the corpus' tokenizer, in place of text. Each row is a document of these
            tokens; nothing is added to them.
        spans_column: column of [[start, end), ...] character spans to carry along as token annotations; an empty
            one annotates none.
        rows: keep rows start <= row < stop, counted over the whole input; or the path of a `.npy` or text file of the
            numbers of those to keep, from 0 and in any order.
        subset: the configuration of a hub dataset that has several.
        split: of a hub dataset; `hf://name:split` says the same. Null: `train`.
        revision: a hub dataset's commit or tag.
    """

    path: str
    text_column: str = "text"
    tokens_column: str | None = None
    spans_column: str | None = None
    rows: tuple[int, int] | str | None = option(None, at_least=0, increasing=True)
    subset: str | None = None
    split: str | None = option(None, off=None)
    revision: str | None = None

    @property
    def on_hub(self) -> bool:
        """Whether it is a dataset of the hub."""
        return self.path.startswith(HUB_PREFIX)

    @property
    def column(self) -> str:
        """The column of what a document holds."""
        return self.text_column if self.tokens_column is None else self.tokens_column


def check_input(source: Input, dotted_key: str) -> None:
    """Raises ConfigError where options of the hub's datasets are given to files, or one is given twice."""
    if source.on_hub:
        if source.split is not None and ":" in source.path.removeprefix(HUB_PREFIX):
            raise ConfigError(f"{dotted_key}.split: {source.path} names a split too; leave one of them out")
        return
    for name in ("subset", "split", "revision"):
        if getattr(source, name) is not None:
            raise ConfigError(f"{dotted_key}.{name}: is of hf:// datasets, and {source.path} is none; remove it")


def check_text(source: Input, dotted_key: str) -> None:
    """Raises ConfigError where an input is of token ids and texts are needed."""
    if source.tokens_column is not None:
        raise ConfigError(f"{dotted_key}.tokens_column: texts are needed here; name a file with a text_column")


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """Prompts, with continuations or not: JSONL, JSON, CSV, TSV, Parquet or Arrow. A bare string stands for `path`.

    `prompt` and `continuation` are texts, or objects with a `text` and scores, as in RealToxicityPrompts.

    Attributes:
        path: a file, a glob or a folder.
        rows: keep rows start <= row < stop.
    """

    path: str
    rows: tuple[int, int] | None = option(None, at_least=0, increasing=True)


@dataclass(frozen=True, kw_only=True)
class Completions:
    """The queries of one set: rows with a prompt and a completion, or with a `text` alone. A bare string stands for
    `path`.

    Attributes:
        path: a file, a glob or a folder: JSONL, JSON, CSV, TSV, Parquet or Arrow.
        prompt_column: column of the prompt. Null: `prompt`, or no prompt in rows of a `text`.
        completion_column: column of the completion. Null: `completion`, else `text`.
        rows: keep rows start <= row < stop.
    """

    path: str
    prompt_column: str | None = None
    completion_column: str | None = None
    rows: tuple[int, int] | None = option(None, at_least=0, increasing=True)


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Queries of both sets: rows with a prompt and two completions. A bare string stands for `path`.

    Attributes:
        path: a file, a glob or a folder: JSONL, JSON, CSV, TSV, Parquet or Arrow.
        prompt_column: column of the prompt.
        positive_column: column of the completion that shows the behaviour.
        negative_column: column of the one that does not.
        margin_column: column of how much more the one shows it than the other, from 0 up, to weigh by confidence.
        rows: keep rows start <= row < stop.
    """

    path: str
    prompt_column: str = "prompt"
    positive_column: str = "rejected"
    negative_column: str = "chosen"
    margin_column: str | None = option(None, off=None)
    rows: tuple[int, int] | None = option(None, at_least=0, increasing=True)


def check_queries(
    prompts: Prompts | None, pairs: Pairs | None, positive: Completions | None, negative: Completions | None
) -> None:
    """Raises ConfigError where the queries come from several places, or one set has no table."""
    given = {"prompts": prompts, "pairs": pairs, "positive": positive or negative}
    named = [name for name, source in given.items() if source is not None]
    if len(named) > 1:
        raise ConfigError(f"build_query: {' and '.join(named)} are set; the queries come from one of them")
    if negative is not None and positive is None:
        raise ConfigError("build_query.positive: required beside build_query.negative, and not set")


@dataclass(frozen=True, kw_only=True)
class PromptSet:
    """Further prompts: rows as those of `Prompts`, or BOLD's own JSON ({group: {name: [prompt]}}). A bare string stands
    for `path`.

    Attributes:
        path: a file, a glob or a folder.
        text_column: column of the prompt (AttaQ: `input`).
        group_column: column that groups rows (AttaQ: `label`). Null: no groups.
        prompts_per_name: of BOLD's own JSON the first prompts of each name (a person, an occupation, ...); 1 is what
            the paper takes, 7,201 prompts. Null: all 23,679.
        max_prompts: prompts at most. Null: all.
    """

    path: str
    text_column: str = "prompt"
    group_column: str | None = None
    prompts_per_name: int | None = option(1, at_least=1)
    max_prompts: int | None = option(None, at_least=1)


@dataclass(frozen=True, kw_only=True)
class LabelledTexts:
    """Texts that people judged: JSONL, JSON, CSV, TSV, Parquet or Arrow. A bare string stands for `path`.

    Attributes:
        path: a file, a glob or a folder.
        text_column: column of the text.
        label_column: column of the label, a bool or a share of annotators (0.5 counts).
        rows: keep rows start <= row < stop.
    """

    path: str
    text_column: str = "text"
    label_column: str = "toxic"
    rows: tuple[int, int] | None = option(None, at_least=0, increasing=True)


@dataclass(frozen=True, kw_only=True)
class ClassifierSource:
    """A text classifier. A bare string stands for `name`.

    `name` is one of `detoxify:original|unbiased|multilingual|original-small|unbiased-small`, `hf:SOURCE` (any sequence
    classifier, by hub id or local folder), `alt-profanity-check` and `hatesonar` (both offline), `words:FILE` (one word
    or phrase a line), `fitted` (a linear classifier that is trained on `training` when it is loaded), or `labels`
    (scores already in the rows).

    Attributes:
        name: the kind, and what it is loaded from.
        label: label of an `hf:` classifier that counts; of `labels` and `fitted`, what their class is called.
        head: how outputs of an `hf:` classifier become scores: `softmax` over labels that exclude each other, a
            `sigmoid` of each label, or `regression`, where they are scores. Null: as its config and labels say.
        checkpoint: a local Detoxify checkpoint, for a machine that cannot reach the hub.
        huggingface_config: a local folder with the config and tokenizer of that checkpoint's model.
        training: texts that `fitted` learns from. Columns may be of nested rows (`continuation.toxicity`), and rows
            whose label is null are left out. The artifacts made with it depend on these texts and labels.
        batch_size: texts classified at once.
    """

    name: str = "detoxify:original"
    label: str | None = None
    head: Literal["softmax", "sigmoid", "regression"] | None = None
    checkpoint: str | None = None
    huggingface_config: str | None = None
    training: tuple[LabelledTexts, ...] = ()
    batch_size: int = option(64, at_least=1, affects_result=False)


def check_classifier(source: ClassifierSource, dotted_key: str) -> None:
    """Raises ConfigError, naming the key, for a classifier that lacks texts to learn from, or learns from none."""
    if source.name == "fitted" and not source.training:
        raise ConfigError(f"{dotted_key}.training: a fitted classifier learns from texts with labels; name their files")
    if source.name != "fitted" and source.training:
        raise ConfigError(f"{dotted_key}.training: {source.name} is trained already; remove it, or name `fitted`")
