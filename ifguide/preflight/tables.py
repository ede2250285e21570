"""Whether files are there and hold what the config says: every name, the first rows, and the rows that it counts on.

Documents: the first rows of up to OPENED_FILES files; of held-out texts all, where they are small. Prompts, queries and
labelled texts: whole tables, by the functions that read them later, or the first rows where they are large. Rows are
counted, and compressed files read to their ends, as far as READ_BYTES go.
"""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from ifguide.config import (
    BuildQuery,
    Completions,
    Config,
    ConfigError,
    Evaluate,
    Input,
    LabelledTexts,
    Pairs,
    Prompts,
    PromptSet,
)
from ifguide.corpus.reading import Chunk, check_row, count_rows, document_files, hub_name, list_chunks, raw_rows
from ifguide.preflight.findings import Findings
from ifguide.preflight.hub import Hub
from ifguide.records.choice import RowChoice
from ifguide.records.files import TABLES, is_compressed, list_files, open_bytes, real_path
from ifguide.records.rows import column_names

FIRST_ROWS = 20
OPENED_FILES = 200
AT_ONCE = 8
READ_BYTES = 2**26  # a fifth of a second
INFLATION = 6  # of compressed bytes to plain ones, about
ONE_CHUNK = 2**62
Rows = tuple[int, int] | str | None  # of an input
BAD_ROW = "mend the row, or allow for it with pack_corpus.max_bad_rows"


class TableChecks:
    """Checks of one preflight; nothing below the run's own directory `apart` is a document."""

    def __init__(self, findings: Findings, hub: Hub, apart: Path):
        self.findings, self.hub, self.apart = findings, hub, apart

    def apart_from(self, key: str, source: Input, inputs: Sequence[Input]) -> None:
        """That no model is trained on the rows of `source`: the inputs of the corpus have none of them."""
        for index, own in enumerate(inputs):
            if shared := self._shared(source, own):
                self.findings.fault(
                    f"{key}.path",
                    source.path,
                    f"{shared} is trained on as well (pack_corpus.inputs[{index}]); name texts that are held out, or"
                    " part the file by `rows` in both",
                )

    def _shared(self, held_out: Input, own: Input) -> str | None:
        """What two inputs both read: a dataset of the hub, or the first file, however either names it. Where neither
        takes all rows, those are compared if both read the same files, and no list names them."""
        if held_out.on_hub and own.on_hub:
            same = (hub_name(held_out), held_out.subset) == (hub_name(own), own.subset)
            return held_out.path if same and _overlap(held_out.rows, own.rows) else None
        if held_out.on_hub or own.on_hub:
            return None
        try:
            files, others = (document_files(each, "path", apart=self.apart) for each in (held_out, own))
        except (FileNotFoundError, ValueError):  # named by the check of its own key
            return None
        real, real_others = [real_path(file) for file in files], [real_path(file) for file in others]
        known = set(real_others)
        shared = next((str(file) for file, place in zip(files, real, strict=True) if place in known), None)
        whole = own.rows is None or (held_out.rows is None and known <= set(real))
        return shared if whole or (real == real_others and _overlap(held_out.rows, own.rows)) else None

    def documents(self, key: str, source: Input, *, bad_rows: int | None = None) -> None:
        """Documents, of which `bad_rows` may be unusable; None: texts that are all wanted."""
        if source.on_hub:
            self._hub_dataset(key, source)
            return
        with self.findings.caught(f"{key}.path", source.path):
            files = document_files(source, f"{key}.path", apart=self.apart)
            opened = _spread(files, OPENED_FILES)
            if len(opened) < len(files):
                self.findings.leave(f"{key}.path", source.path, f"{len(opened)} of {len(files)} files were opened")
            small = bad_rows is None and sum(map(_plain_bytes, files)) <= READ_BYTES
            look = partial(
                _first_documents,
                source=source,
                strict=source.rows is None and not bad_rows,
                most=None if small else FIRST_ROWS,
                advice="mend the row" if bad_rows is None else BAD_ROW,
            )
            with ThreadPoolExecutor(AT_ONCE) as threads:
                read = list(threads.map(look, opened))
            faults = [fault for fault, _ in read if fault]
            self._faults_of_files(key, source, faults)
            if not faults:
                self._rows(key, source, files, empty=len(opened) == len(files) and not any(rows for _, rows in read))

    def _hub_dataset(self, key: str, source: Input) -> None:
        name, _ = hub_name(source)
        with self.findings.caught(f"{key}.path", source.path):
            if Path(name).exists():  # the library reads folders too
                return
            if (reason := self.hub.unchecked(name, source.revision, "dataset")) is not None:
                self.findings.leave(f"{key}.path", source.path, reason)

    def _faults_of_files(self, key: str, source: Input, faults: Iterable[tuple[str, str]]) -> None:
        """One fault for each reason: the first place, and how many files have it."""
        places: dict[str, list[str]] = {}
        for where, reason in faults:
            places.setdefault(reason, []).append(where)
        for reason, files in places.items():
            more = f" (and in {len(files) - 1} more files)" if len(files) > 1 else ""
            self.findings.fault(f"{key}.path", source.path, f"{files[0]}{more}: {reason}")

    def _rows(self, key: str, source: Input, files: Sequence[Path], *, empty: bool) -> None:
        """That there are rows, and those that are asked for; and that compressed files are whole."""
        if empty:
            self.findings.fault(f"{key}.path", source.path, "holds no rows; name files that do")
            return
        choice = None
        with self.findings.caught(f"{key}.rows", source.rows):
            choice = RowChoice.of(source.rows)
        if choice is not None:
            self._count(key, source, files, choice)

    def _count(self, key: str, source: Input, files: Sequence[Path], choice: RowChoice) -> None:
        left, counted = READ_BYTES, 0
        for file in files:
            parquet = file.suffix.lower() == ".parquet"
            cost = 0 if parquet else _plain_bytes(file)
            if counted < choice.wanted:
                left -= cost
                if left < 0:
                    self.findings.leave(f"{key}.rows", source.rows, "the files are too large to count their rows here")
                    return
                counted += sum(count_rows(chunk, source) for chunk in _chunks(file, source))
            elif is_compressed(file) and cost <= left:
                left -= cost
                _read_to_end(file)
        if lack := choice.lack_of(source.path, counted):
            self.findings.fault(f"{key}.rows", source.rows, lack)

    def prompts(self, key: str, prompts: Prompts) -> None:
        """A prompt table."""
        from ifguide.toxicity.prompts import read_prompt_rows, read_prompts

        self._table(
            key,
            prompts,
            lambda: read_prompt_rows(prompts, key),
            lambda: read_prompts(prompts.path, f"{key}.path", FIRST_ROWS),
        )

    def queries(self, key: str, source: Completions | Pairs) -> None:
        """A table of queries, by itself."""
        from ifguide.toxicity.prompts import read_completions, read_pairs

        def read() -> object:
            return read_pairs(source, key) if isinstance(source, Pairs) else read_completions(source, key)

        self._table(key, source, read, None)

    def query_sets(self, options: BuildQuery, seed: int) -> None:
        """That each set that V is made of has queries, and some are left beside those that are held out: of tables, and
        of prompts with scores of their own. Other classifiers need a continuation to score."""
        from ifguide.toxicity.prompts import read_prompt_rows
        from ifguide.toxicity.queries import choose_queries

        tables = [table for table in (options.prompts, options.pairs, options.positive, options.negative) if table]
        if not self._can_be_read("build_query", tables):
            return
        with self.findings.caught("build_query", ", ".join(table.path for table in tables)):
            if options.prompts is None or options.classifier.name == "labels":
                choose_queries(options, seed).hold_out(options.held_out, seed, differential=options.differential)
            elif not any(row.continuation.strip() for row in read_prompt_rows(options.prompts, "build_query.prompts")):
                raise ValueError("no row has a continuation to score; name prompts that have")

    def balanced(self, options: Evaluate, seed: int) -> None:
        """That there are as many prompts of either kind as an evaluation wants."""
        from ifguide.evaluation.prompts import chosen_prompts

        if options.prompts is not None and self._can_be_read("evaluate.prompts", [options.prompts]):
            with self.findings.caught("evaluate.balanced", options.balanced):
                chosen_prompts(options, seed)

    def learnt_from(self, config: Config) -> None:
        """That some prompts of `build_query` are not evaluated, for DPO and RAD to learn from."""
        from ifguide.methods.sampling import drawn_prompts

        learnt, evaluated = config.build_query.prompts, config.evaluate.prompts
        if learnt is None or evaluated is None or not self._can_be_read("build_query.prompts", [learnt]):
            return
        if self._can_be_read("evaluate", [evaluated, *config.evaluate.prompt_sets.values()]):
            with self.findings.caught("build_query.prompts", learnt.path):
                drawn_prompts(config)

    def _can_be_read(self, key: str, tables: Sequence[Prompts | Completions | Pairs | PromptSet]) -> bool:
        """Whether there are tables, small enough to be read here, in which their own checks, which come first, found no
        fault of `key`."""
        if not tables or any(fault.key.startswith(key) for fault in self.findings.faults):
            return False
        files = [file for table in tables for file in list_files(table.path, key, TABLES)]
        return sum(map(_plain_bytes, files)) <= READ_BYTES

    def prompt_set(self, key: str, prompts: PromptSet) -> None:
        """A set of prompts in groups, which is small."""
        from ifguide.toxicity.prompts import read_grouped_prompts

        def read() -> None:
            read_grouped_prompts(
                [prompts.path],
                text_column=prompts.text_column,
                group_column=prompts.group_column,
                prompts_per_name=prompts.prompts_per_name,
                dotted_key=f"{key}.path",
            )

        self._table(key, prompts, read, None)

    def labelled(self, key: str, texts: LabelledTexts) -> None:
        """Texts with labels."""
        from ifguide.toxicity.prompts import read_labelled

        def read(first: int | None) -> None:
            read_labelled(
                texts.path,
                text_column=texts.text_column,
                label_column=texts.label_column,
                rows=None if first else texts.rows,
                dotted_key=key,
                first=first,
            )

        self._table(key, texts, lambda: read(None), lambda: read(FIRST_ROWS))

    def _table(self, key: str, table: Any, read: Callable[[], object], read_first: Callable[[], object] | None) -> None:
        with self.findings.caught(f"{key}.path", table.path):
            try:
                files = list_files(table.path, f"{key}.path", TABLES)
                if sum(map(_plain_bytes, files)) <= READ_BYTES:
                    read()
                    return
                what = "too large to read here" if read_first is None else "only the first rows were read"
                self.findings.leave(f"{key}.path", table.path, what)
                if read_first is not None:
                    read_first()
            except ConfigError as error:
                if not str(error).startswith(f"{key}.rows: "):
                    raise
                self.findings.fault(f"{key}.rows", table.rows, str(error))


def _overlap(one: Rows, other: Rows) -> bool:
    """Whether two choices of the rows of one input have a row in common; those that a file lists are not read."""
    if one is None or other is None:
        return True
    if isinstance(one, str) or isinstance(other, str):
        return False
    return max(one[0], other[0]) < min(one[1], other[1])


def _plain_bytes(file: Path) -> int:
    """What reading it to its end takes, about."""
    return file.stat().st_size * (INFLATION if is_compressed(file) else 1)


def _first_documents(
    file: Path, source: Input, *, strict: bool, most: int | None, advice: str
) -> tuple[tuple[str, str] | None, int]:
    """What is wrong with the first rows of a file, and where, and how many rows were read, at `most`. Unless `strict`,
    they are wrong only if all are. `advice`: what to do about one row."""
    first, bad, rows = None, 0, 0
    names: set[str] = set()
    try:
        for chunk in _chunks(file, source)[:1]:
            for row, content in enumerate(itertools.islice(raw_rows(chunk, source), most)):
                rows += 1
                names |= set(column_names(content)) if isinstance(content, dict) else set()
                if reason := check_row(row, content, source).reason:
                    bad += 1
                    first = first or (f"{file} row {row}", f"{reason}; {_advice(content, source, advice)}")
        if first is None and (near := _meant(source.spans_column, names)):
            first = str(file), f"no row has {source.spans_column!r}; did you mean spans_column: {near}?"
            return first, rows
    except (ValueError, OSError) as error:
        return (str(file), str(error).removeprefix(f"{file}: ").removeprefix(f"{file} ")), rows
    return first if strict or bad == rows else None, rows


def _meant(column: str | None, names: Collection[str]) -> str | None:
    """The column that is there in place of one that is not: rows without spans may leave theirs out."""
    if column is None or column in names:
        return None
    return next(iter(difflib.get_close_matches(column, sorted(names), n=1)), None)


def _advice(content: Any, source: Input, of_row: str) -> str:
    """What to do about a row that cannot be used."""
    names = column_names(content) if isinstance(content, dict) else []
    if not isinstance(content, dict) or source.column in names:
        return of_row
    near = difflib.get_close_matches(source.column, names, n=1, cutoff=0.5)
    has = f"it has {', '.join(names) or 'none'}"
    key = "text_column" if source.tokens_column is None else "tokens_column"
    return f"{has}; set {key}{f': {near[0]}' if near else ' to the one of the documents'}"


def _chunks(file: Path, source: Input) -> list[Chunk]:
    return list_chunks(replace(source, path=str(file)), 0, chunk_bytes=ONE_CHUNK, dotted_key="path")


def _read_to_end(file: Path) -> None:
    try:
        with open_bytes(file) as stream:
            while stream.read(2**20):
                pass
    except OSError as error:
        raise ValueError(f"{file}: damaged or cut off ({error}); fetch it again") from error


def _spread(files: Sequence[Path], count: int) -> list[Path]:
    """At most `count` of the files, the first and the last among them."""
    if len(files) <= count:
        return list(files)
    return [files[place * (len(files) - 1) // (count - 1)] for place in range(count)]
