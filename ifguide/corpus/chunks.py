"""The chunks of a corpus by key, and what tokenising them came to: places in their inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ifguide.config import ConfigError, Input, PackCorpus
from ifguide.corpus.inputs import InputFile
from ifguide.corpus.reading import Chunk, list_chunks
from ifguide.records.choice import RowChoice


@dataclass(frozen=True, kw_only=True)
class KeyedChunk:
    """A chunk to read, of whose input `first_input_row` rows lie before it. `files`, by path: its own, which a hub
    dataset has not, and the one that lists the rows of its input, if one does."""

    key: str
    chunk: Chunk
    files: Mapping[str, InputFile] = field(default_factory=dict)
    first_input_row: int = 0

    def __str__(self) -> str:
        at = f", bytes {self.chunk.start:,} to {self.chunk.stop:,}" if self.chunk.kind == "jsonl" else ""
        return f"{self.chunk.name}{at}"


def plan_chunks(config: PackCorpus, *, open_hub: bool, apart: Path | None = None) -> list[Chunk]:
    """The chunks of all inputs, in reading order; without `open_hub` a hub dataset is one. Nothing below the folder
    `apart` is taken.

    Raises:
        FileNotFoundError: nothing matches an input's path; names the config key. ValueError: a file of another kind.
    """
    chunk_bytes = max(1, int(config.chunk_megabytes * 2**20))
    chunks: list[Chunk] = []
    for index, source in enumerate(config.inputs):
        if source.on_hub and not open_hub:
            chunks.append(Chunk(input_index=index, kind="hub", path=source.path, stop=1))
            continue
        key = f"pack_corpus.inputs[{index}].path"
        chunks += list_chunks(source, index, chunk_bytes=chunk_bytes, dotted_key=key, apart=apart)
    return chunks


def keyed_chunks(chunks: Sequence[Chunk], inputs: Sequence[Input], files: Mapping[str, InputFile]) -> list[KeyedChunk]:
    """The chunks, each with a key and what its files hold."""
    keyed = []
    for number, chunk in enumerate(chunks):
        rows = inputs[chunk.input_index].rows
        paths = [chunk.path, rows] if isinstance(rows, str) else [chunk.path]
        own = {path: files[path] for path in paths if path in files}
        keyed.append(KeyedChunk(key=f"chunk-{number:05d}", chunk=chunk, files=own))
    return keyed


def uncounted_chunks(
    keyed: Sequence[KeyedChunk], inputs: Sequence[Input], counted: Mapping[str, Mapping[str, Any]], at_once: int
) -> list[KeyedChunk]:
    """The next chunks to count: of every input whose chunks so far have fewer rows than are asked of it, as many again,
    and `at_once` at least. So a few rounds suffice, and an input is counted little further than its rows go."""
    chunks_of_input: dict[int, list[KeyedChunk]] = {}
    for item in keyed:
        chunks_of_input.setdefault(item.chunk.input_index, []).append(item)
    following = []
    for index, chunks in chunks_of_input.items():
        results = [counted[item.key]["rows"] for item in chunks if item.key in counted]
        if sum(results) < RowChoice.of(inputs[index].rows).wanted:
            following += chunks[len(results) :][: max(at_once, len(results))]
    return following


def placed_chunks(
    keyed: Sequence[KeyedChunk], inputs: Sequence[Input], counted: Mapping[str, Mapping[str, Any]]
) -> list[KeyedChunk]:
    """The chunks, each with its `first_input_row`, from the results of `CountRows`; 0 where no rows were counted. That
    of a chunk behind the last row that is taken may be too small, but it lies behind that row too.

    Raises:
        ConfigError: an input has fewer rows than its `rows` ask for; names the key.
    """
    rows_of_input, placed = [0] * len(inputs), []
    for item in keyed:
        index = item.chunk.input_index
        placed.append(replace(item, first_input_row=rows_of_input[index]))
        rows_of_input[index] += counted.get(item.key, {"rows": 0})["rows"]
    for index, source in enumerate(inputs):
        if lack := RowChoice.of(source.rows).lack_of(source.path, rows_of_input[index]):
            raise ConfigError(f"pack_corpus.inputs[{index}].rows: {lack}")
    return placed


def number_rows(keyed: Sequence[KeyedChunk], tokenised: Mapping[str, dict[str, Any]]) -> None:
    """Give each result of `TokeniseChunk` the `first_row` of its chunk in its file, as far as rows are taken of it."""
    rows_read: dict[tuple[int, str], int] = {}  # of a file so far; one may be two inputs, of different rows
    for item in keyed:
        result, file = tokenised[item.key], (item.chunk.input_index, item.chunk.path)
        result["first_row"] = rows_read.get(file, 0)
        rows_read[file] = result["first_row"] + result["rows"]
