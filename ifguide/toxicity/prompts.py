"""Prompt tables, prompts in groups, and texts with human labels, from JSONL, JSON, CSV, TSV, Parquet and Arrow files.

- A prompt table has RealToxicityPrompts' own schema, one row {"prompt": {"text", score: value, ...}, "continuation":
  {"text", score: value, ...}}; the scores are those of Perspective there, and of anything else elsewhere.
  Plain strings stand for objects with a text alone, beside which columns `prompt.toxicity` are scores, and there need
  be no continuation.
- Completions of a query set are rows {prompt, completion} or {text}; pairs are rows {prompt, chosen, rejected}.
- Prompts in groups are rows with a text column and, if there are groups, a group column (AttaQ: `input`, `label`), or
  BOLD's own JSON, {group: {name: [prompt, ...]}}, one file for each domain.
- Labelled texts are rows with a text column and a label column, and perhaps scores. A dotted name is a column of nested
  rows: `continuation.toxicity`.

A path is a file, a folder or a pattern, local or remote, by the rule of `records.files`. Every table is read whole: it
has at most some 100,000 rows. A row that cannot be used is an error that names file and row; none is left out, but
for labelled texts whose label is null, which are counted in the log.
"""

import itertools
import json
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ifguide.config import Completions, ConfigError, LabelledTexts, Pairs, Prompts
from ifguide.records.delimited import Cell
from ifguide.records.files import TABLES, holds_json_lines, kind_of, list_files
from ifguide.records.rows import lone_surrogate, read_json, table_rows

logger = logging.getLogger(__name__)

WHOLE = "all"  # what the prompts of a set are called together, beside its groups


@dataclass(frozen=True, kw_only=True)
class PromptRow:
    """One row, numbered from 0 in its table. A score that is null or NaN there is missing here. `margin` is that of a
    pair, where it is read."""

    row: int
    prompt: str
    continuation: str
    prompt_scores: dict[str, float]
    continuation_scores: dict[str, float]
    margin: float = 1.0


def _records(path: str | Path, dotted_key: str, first: int | None = None) -> Iterator[tuple[int, str, Any]]:
    """The rows of all files, numbered over them; where each is, and what it holds. `first`: of each file so many."""
    row = 0
    for file in list_files(str(path), dotted_key, TABLES):
        for where, record in _file_records(file, first):
            yield row, where, record
            row += 1


def _within(
    records: list[tuple[int, str, Any]], rows: tuple[int, int] | None, path: str | Path, dotted_key: str
) -> list[tuple[int, str, Any]]:
    """Those of `rows`, or all. Raises ConfigError for rows outside of the table."""
    start, stop = rows or (0, len(records))
    if stop > len(records):
        raise ConfigError(f"{dotted_key}.rows: [{start}, {stop}) is not within the {len(records)} of {path}")
    return records[start:stop]


def _file_records(file: Path, first: int | None = None) -> Iterator[tuple[str, Any]]:
    for row, record in enumerate(itertools.islice(table_rows(file), first)):
        where = f"{file}, row {row}"
        if isinstance(record, str):
            raise ValueError(f"{where}: {record}")
        if reason := lone_surrogate(json.dumps(record, ensure_ascii=False, default=str)):
            raise ValueError(f"{where}: {reason}; mend the row")
        yield where, record


def _text_and_scores(record: Any, part: str, where: str) -> tuple[str, dict[str, float]]:
    value = record.get(part) if isinstance(record, dict) else None
    if isinstance(record, dict) and (value is None or isinstance(value, str)):
        # a table without nested rows has columns `prompt.text`, or `prompt`, and `prompt.toxicity`
        columns = {k.removeprefix(f"{part}."): v for k, v in record.items() if k.startswith(f"{part}.")}
        value = columns if value is None else {**columns, "text": str(value)}
    if not isinstance(value, dict) or not isinstance(value.get("text"), str):
        raise ValueError(f"{where}: needs {part}.text, a string, as in RealToxicityPrompts, or a string as {part}")
    scores = {}
    for name, score in ((name, _plain(score)) for name, score in value.items()):
        if name == "text" or _is_missing(score):
            continue
        if not _is_score(score):
            raise ValueError(f"{where}: {part}.{name} is {score!r}, not a score in [0, 1]")
        scores[name] = float(score)
    return value["text"], scores


def read_prompts(path: str | Path, dotted_key: str = "prompt table", first: int | None = None) -> list[PromptRow]:
    """All rows of a prompt table, or the `first` of each file. A row need have no continuation, which is empty then.

    Raises ValueError that names file and row."""
    rows = []
    for row, where, record in _records(path, dotted_key, first):
        prompt, prompt_scores = _text_and_scores(record, "prompt", where)
        alone = not any(name.partition(".")[0] == "continuation" for name in record)
        continuation, continuation_scores = ("", {}) if alone else _text_and_scores(record, "continuation", where)
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


def _plain(value: Any) -> Any:
    """A value as its table's type; a separated table has texts alone."""
    return value.value if isinstance(value, Cell) else value


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _is_score(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, int | float) and 0 <= value <= 1


# ---- completions of either set ---------------------------------------------------------------------------


def read_completions(source: Completions, dotted_key: str) -> list[PromptRow]:
    """The configured rows of a table of one query set, without scores.

    Raises:
        FileNotFoundError, ConfigError: no such file, `rows` outside of it. ValueError: a bad row; names file and row.
    """
    return [_completion(source, row, where, record) for row, where, record in _chosen_records(source, dotted_key)]


def _completion(source: Completions, row: int, where: str, record: Any) -> PromptRow:
    has = record.keys() if isinstance(record, dict) else ()
    alone = source.completion_column is None and "completion" not in has and "text" in has
    completion_column = source.completion_column or ("text" if alone else "completion")
    without = source.prompt_column is None and completion_column == "text" and "prompt" not in has
    prompt = "" if without else _text(record, source.prompt_column or "prompt", where)
    return _plain_row(row, prompt, _text(record, completion_column, where))


def read_pairs(source: Pairs, dotted_key: str) -> tuple[list[PromptRow], list[PromptRow]]:
    """The configured rows as those with the positive completion, and those with the negative one. Raises as
    `read_completions`."""
    positive: list[PromptRow] = []
    negative: list[PromptRow] = []
    for row, where, record in _chosen_records(source, dotted_key):
        prompt, margin = _text(record, source.prompt_column, where), _margin(record, source.margin_column, where)
        for rows, column in ((positive, source.positive_column), (negative, source.negative_column)):
            rows.append(replace(_plain_row(row, prompt, _text(record, column, where)), margin=margin))
    return positive, negative


def _margin(record: Any, column: str | None, where: str) -> float:
    if column is None:
        return 1.0
    value = _plain(_column(*_holder(record, column, where), object, where))
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise ValueError(f"{where}: {column} is {value!r}, not a margin from 0 up")
    return float(value)


def _plain_row(row: int, prompt: str, completion: str) -> PromptRow:
    return PromptRow(row=row, prompt=prompt, continuation=completion, prompt_scores={}, continuation_scores={})


def _text(record: Any, column: str, where: str) -> str:
    return str(_column(*_holder(record, column, where), str, where))


def _chosen_records(source: Completions | Pairs, dotted_key: str) -> list[tuple[int, str, Any]]:
    records = list(_records(source.path, f"{dotted_key}.path"))
    if not records:
        raise ValueError(f"{source.path}: the table of queries is empty")
    return _within(records, source.rows, source.path, dotted_key)


# ---- prompts in groups -----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class GroupedPrompt:
    """A prompt of a set, numbered from 0 over the set; `group` is empty where the set has none.

    `domain` is what groups are compared within: BOLD's file (race, gender, ...), else empty."""

    row: int
    prompt: str
    group: str = ""
    domain: str = ""

    @property
    def group_name(self) -> str:
        """What the group is called beside those of other domains; empty where the set has none."""
        return f"{self.domain}/{self.group}" if self.domain else self.group


def read_grouped_prompts(
    paths: Sequence[str | Path],
    *,
    text_column: str = "prompt",
    group_column: str | None = None,
    prompts_per_name: int | None = None,
    dotted_key: str = "prompt set",
) -> list[GroupedPrompt]:
    """All prompts of the files, in order; of BOLD's JSON the first `prompts_per_name` of each name, if set.

    Raises:
        ValueError: a row that cannot be used, one of a group called `all`, or no prompt; names file and row, or JSON
            key.
    """
    prompts: list[tuple[str, str, str]] = []
    for file in (file for path in paths for file in list_files(str(path), dotted_key, TABLES)):
        if kind_of(file) == "json" and not holds_json_lines(file, text_column):
            tree = read_json(file)
            if isinstance(tree, dict) and text_column not in tree:
                prompts += _bold_prompts(file, tree, prompts_per_name)
                continue
        for where, record in _file_records(file):
            text = _prompt(record, text_column, where)
            group = "" if group_column is None else str(_column(*_holder(record, group_column, where), object, where))
            if group == WHOLE:
                raise ValueError(f"{where}: {group_column} is {WHOLE!r}, as all prompts of a set are called; rename it")
            prompts.append((text, group, ""))
    if not prompts:
        raise ValueError(f"{', '.join(map(str, paths)) or 'no file'}: the prompt set is empty")
    return [GroupedPrompt(row=row, prompt=t, group=g, domain=d) for row, (t, g, d) in enumerate(prompts)]


def _prompt(record: Any, column: str, where: str) -> str:
    """The text of a column, or of the object there, as in a prompt table."""
    holder, name = _holder(record, column, where)
    value = holder.get(name) if isinstance(holder, dict) else None
    return str(_column(value, "text", str, where) if isinstance(value, dict) else _column(holder, name, str, where))


def _bold_prompts(path: Path, groups: dict[str, Any], prompts_per_name: int | None) -> list[tuple[str, str, str]]:
    domain = path.name.partition(".")[0].removesuffix("_prompt")
    prompts = []
    try:
        for group, names in groups.items():
            for name, texts in names.items():
                if not isinstance(texts, list):
                    raise AttributeError(f"{group}.{name} is a {type(texts).__name__}")
                for text in texts:
                    reason = lone_surrogate(text) if isinstance(text, str) else "not a string"
                    if reason:
                        raise ValueError(f"{path}: {group}.{name} holds {text!r}: {reason}")
                prompts += [(text, group, domain) for text in texts[:prompts_per_name]]
    except AttributeError as error:
        raise ValueError(f"{path}: not in BOLD's schema, {{group: {{name: [prompt, ...]}}}} ({error})") from error
    return prompts


def _holder(record: Any, column: str, where: str) -> tuple[Any, str]:
    """The mapping that a dotted column lies in, and its name there; a column whose own name has dots comes first."""
    if isinstance(record, dict) and column not in record and "." in column:
        outer, _, inner = column.partition(".")
        return _holder(_column(record, outer, dict, where), inner, where)
    return record, column


def _column(record: Any, name: str, kind: type, where: str) -> Any:
    if not isinstance(record, dict) or name not in record:
        columns = ", ".join(record) if isinstance(record, dict) else type(record).__name__
        raise ValueError(f"{where}: has no column {name!r}, only {columns}")
    if record[name] is None or not isinstance(record[name], kind):
        raise ValueError(f"{where}: {name} is {record[name]!r}, not a {kind.__name__}")
    return record[name]


# ---- labelled texts --------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class LabelledText:
    """A text, whether people called it so, the share of them who did (0 or 1 of a bool), and the scores that its row
    carries."""

    text: str
    label: bool
    share: float
    scores: dict[str, float]


def read_labelled(
    path: str | Path,
    *,
    text_column: str = "text",
    label_column: str = "toxic",
    rows: tuple[int, int] | None = None,
    threshold: float = 0.5,
    dotted_key: str = "labelled texts",
    first: int | None = None,
) -> list[LabelledText]:
    """The rows in [start, stop), or all; with `first`, so many of each file are all. A label is a bool, or a number in
    [0, 1] that counts from `threshold` (the annotators' share). Rows whose label is null or NaN are left out, and
    counted in the log.

    Other columns beside the label's that hold numbers in [0, 1] are scores.

    Raises:
        ConfigError: `rows` outside of the table. ValueError: a row that cannot be used; names file and row.
    """
    records = list(_records(path, f"{dotted_key}.path", first))
    if not records:
        raise ValueError(f"{path}: the table of labelled texts is empty")
    chosen, texts = _within(records, rows, path, dotted_key), []
    for _, where, record in chosen:
        holder, name = _holder(record, label_column, where)
        if isinstance(holder, dict) and name in holder and _is_missing(_plain(holder[name])):
            continue
        label = _plain(_column(holder, name, object, where))
        if not isinstance(label, bool) and not _is_score(label):
            raise ValueError(f"{where}: {label_column} is {label!r}, neither a bool nor a number in [0, 1]")
        numbers = {k: _plain(v) for k, v in holder.items() if k not in (name, text_column)}
        scores = {k: float(v) for k, v in numbers.items() if not _is_missing(v) and _is_score(v)}
        text = _column(*_holder(record, text_column, where), str, where)
        texts.append(LabelledText(text=text, label=label >= threshold, share=float(label), scores=scores))
    if unlabelled := len(chosen) - len(texts):
        logger.warning("%s: %d of %d rows have no label (null) and are left out", path, unlabelled, len(chosen))
    return texts


def labelled_texts(sources: Sequence[LabelledTexts], dotted_key: str) -> list[LabelledText]:
    """The configured rows of all `sources`, in order, as `read_labelled`."""
    return [
        text
        for index, source in enumerate(sources)
        for text in read_labelled(
            source.path,
            text_column=source.text_column,
            label_column=source.label_column,
            rows=source.rows,
            dotted_key=f"{dotted_key}[{index}]",
        )
    ]


def read_prompt_rows(prompts: Prompts, dotted_key: str) -> list[PromptRow]:
    """The configured rows of a prompt table.

    Raises:
        FileNotFoundError, ValueError: no such file, bad rows, or `rows` outside of it.
    """
    rows = read_prompts(prompts.path, f"{dotted_key}.path")
    if prompts.rows is None:
        return rows
    start, stop = prompts.rows
    if not 0 <= start < stop <= len(rows):
        raise ConfigError(f"{dotted_key}.rows: [{start}, {stop}) is not within the {len(rows)} rows of {prompts.path}")
    return rows[start:stop]
