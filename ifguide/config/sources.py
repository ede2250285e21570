"""Where documents, prompts, labelled texts and classifiers come from: what sections of the config name."""

from __future__ import annotations

from dataclasses import dataclass

from ifguide.config.typed_yaml import option


@dataclass(frozen=True, kw_only=True)
class Input:
    """Documents: `path` is a file, a glob, a folder, or `hf://name[:split]`.

    `.jsonl` and `.parquet` give one document per row (`text_column`); `.txt` one per file; `.json` one per
    string found anywhere in it. `rows` keeps rows start <= row < stop, counted over the whole input.
    `spans_column` names a column of [[start, end), ...) character spans to carry along as token annotations.
    """

    path: str
    text_column: str = "text"
    spans_column: str | None = None
    rows: tuple[int, int] | None = option(None, at_least=0, increasing=True)


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """Prompt rows in RealToxicityPrompts' schema (JSONL or Parquet); `rows` as in `Input`."""

    path: str
    rows: tuple[int, int] | None = option(None, at_least=0, increasing=True)


@dataclass(frozen=True, kw_only=True)
class PromptSet:
    """Further prompts: a file, a glob or a folder of JSONL, Parquet, or BOLD's own JSON ({group: {name: [prompt]}}).
    `group_column` names the column that groups rows (AttaQ: `text_column: input`, `group_column: label`)."""

    path: str
    text_column: str = "prompt"
    group_column: str | None = None
    max_prompts: int | None = option(None, at_least=1)


@dataclass(frozen=True, kw_only=True)
class LabelledTexts:
    """Texts that people judged: rows of JSONL or Parquet, the label a bool or a share of annotators (0.5 counts)."""

    path: str
    text_column: str = "text"
    label_column: str = "toxic"
    rows: tuple[int, int] | None = option(None, at_least=0, increasing=True)


@dataclass(frozen=True, kw_only=True)
class ClassifierSource:
    """A text classifier: `detoxify:original|unbiased|multilingual|original-small|unbiased-small`, `hf:SOURCE` (any
    sequence classifier, by hub id or local folder), `alt-profanity-check`, `words:FILE` (one word or phrase a line), or
    `labels` (scores already in the rows). `label` is the label of an hf classifier that counts. `checkpoint` is a
    local Detoxify checkpoint, `huggingface_config` a local folder with its model's config and tokenizer, for a machine
    that cannot reach the hub."""

    name: str = "detoxify:original"
    label: str | None = None
    checkpoint: str | None = None
    huggingface_config: str | None = None
    batch_size: int = option(64, at_least=1, affects_result=False)
