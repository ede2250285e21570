"""Documents, blocks, scores and mask side by side: what the report and `ifguide inspect` show.

Reads only the shards it needs; statistics over the whole corpus are tasks, one per shard.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from ifguide import schemas
from ifguide.artifacts import MANIFEST, Manifest, data_files, read_manifest, sound, verified_files
from ifguide.config import OWN
from ifguide.corpus.tables import TOKENIZER, corpus_block_size
from ifguide.evaluation.metrics import MaskAgreement, token_agreement
from ifguide.selection.distributed import RunTasks
from ifguide.selection.fdr import Spread
from ifguide.selection.folders import SelectionFolders
from ifguide.selection.measures import Measure
from ifguide.spans.tables import PackedCorpus
from ifguide.storage import readable
from ifguide.tokenizer import load_tokenizer

MAX_SHOWN_TOKENS = 600
CONTEXT = 32  # tokens on either side that a window is decoded with: its ends may lie within a character or a word
HISTOGRAM_BINS = 80
OUTLIER_CHARACTERS = 160


@dataclass(frozen=True, kw_only=True)
class ShownDocument:
    """A ranked document with its tokens; long ones are cut to a window around their first masked token."""

    unit_id: int
    source: str
    rank: int  # from 1
    rank_score: float
    texts: tuple[str, ...]
    scores: np.ndarray | None  # where the tables of scores are gone
    masked: np.ndarray
    annotated: np.ndarray
    left_out: int  # tokens of the document that are not shown


class View:
    """Random access to the tokens that a mask is of; scores are of the mask's behaviour, if their tables are there:
    they may be removed once there is a mask."""

    def __init__(self, folders: SelectionFolders):
        self.folders = folders
        self.corpus, self.mask, self.ranking = folders.corpus, folders.mask, folders.ranking
        manifest, made = read_manifest(self.mask), read_manifest(self.corpus)
        self.summary = selected(manifest, self.mask)
        self.ranks = "ensemble" in self.summary  # scores are mean ranks
        self.scores = folders.ensemble if self.ranks else folders.scores
        self.options = manifest.options.get("build_mask", {})
        self.ranked = manifest.verb == "build_mask"  # an imported mask has neither ranking nor tau
        self.measure = measured_by(self.summary, self.scores) if data_files(self.scores) else None
        self.tokenizer = load_tokenizer(str(self.corpus / TOKENIZER))
        self.annotated = bool(made.summary["annotated"])
        self.block_size = corpus_block_size(self.corpus)
        self.files = [self.corpus / name for name in made.names()]
        packed = PackedCorpus.of(self.corpus, made)
        self.first_blocks = [packed.extent(shard)[0] // self.block_size for shard in range(len(self.files))]

    def top_documents(self, count: int) -> list[ShownDocument]:
        """The first `count` units of the ranking."""
        ranking: list[dict[str, Any]] = []
        for path in verified_files(self.ranking, "ranking-*.parquet"):
            ranking += schemas.read_table(path, schemas.RANKING).slice(0, count - len(ranking)).to_pylist()
            if len(ranking) == count:
                break
        shown = []
        for row in ranking:
            if self.summary["unit"] == "block":
                start, length, source = row["unit_id"] * self.block_size, self.block_size, "block"
            else:
                record = self._document(row["unit_id"])
                start, length = record["token_start"], record["num_tokens"]
                source = f"{Path(record['source']).name} row {record['row']}"
            shown.append(self._show(row, source, start, length))
        return shown

    def outliers(self, count: int) -> list[tuple[dict[str, Any], str]]:
        """The `count` listed blocks of the greatest mass, each a row of `schemas.OUTLIERS` and its first words."""
        heaviest: list[dict[str, Any]] = []
        for path in verified_files(self.ranking, "outliers-*.parquet"):
            heaviest += schemas.read_table(path, schemas.OUTLIERS).to_pylist()
            heaviest = sorted(heaviest, key=lambda row: (-row["mass"], row["block_id"]))[:count]
        return [(row, self._beginning(row["block_id"])) for row in heaviest]

    def _beginning(self, block_id: int) -> str:
        tokens = self.read(block_id * self.block_size, (block_id + 1) * self.block_size)["tokens"]
        text = " ".join(str(self.tokenizer.decode(tokens.tolist())).split())
        return text if len(text) <= OUTLIER_CHARACTERS else f"{text[:OUTLIER_CHARACTERS]}…"

    def _document(self, doc_id: int) -> dict[str, Any]:
        """A row of the document table, from the one file that holds it."""
        first = 0
        for path in verified_files(self.corpus, "documents-*.parquet"):
            number = pq.read_metadata(readable(path)).num_rows
            if doc_id < first + number:
                return schemas.read_table(path, schemas.DOCUMENTS).slice(doc_id - first, 1).to_pylist()[0]
            first += number
        raise ValueError(f"{self.ranking} names document {doc_id}, {self.corpus} has only {first}")

    def _show(self, row: dict[str, Any], source: str, start: int, length: int) -> ShownDocument:
        columns = self.read(start, start + length)
        first = int(np.argmax(columns["masked"])) if columns["masked"].any() else 0
        begin = max(0, min(first - MAX_SHOWN_TOKENS // 4, len(columns["tokens"]) - MAX_SHOWN_TOKENS))
        window = slice(begin, begin + MAX_SHOWN_TOKENS)
        tokens = columns["tokens"][window]
        return ShownDocument(
            unit_id=row["unit_id"],
            source=source,
            rank=row["rank"] + 1,
            rank_score=row["rank_score"],
            texts=tuple(token_texts(self.tokenizer, columns["tokens"], window)),
            scores=columns["token_score"][window] if self.measure else None,
            masked=columns["masked"][window],
            annotated=columns["annotated"][window],
            left_out=len(columns["tokens"]) - len(tokens),
        )

    @property
    def measure_name(self) -> str:
        """What tokens are ranked by, for people."""
        if "null_spread" in self.summary:
            return "z-score of the influence score"
        if self.ranks:
            return f"mean rank in the scores of {1 + len(self.summary['ensemble'])} runs"
        return "smoothed influence score" if self.summary.get("smoothed") else "influence score"

    def read(self, start: int, stop: int) -> dict[str, np.ndarray]:
        """Tokens, scores if they are there, mask and annotations of stream positions [start, stop)."""
        first_block, last_block = start // self.block_size, (stop - 1) // self.block_size
        parts: dict[str, list[np.ndarray]] = {}
        bounds = [*self.first_blocks[1:], np.inf]
        for path, begin, end in zip(self.files, self.first_blocks, bounds, strict=True):
            if begin > last_block or end <= first_block:
                continue
            for name, array in _shard_columns(path, self.scores, self.measure, self.mask).items():
                parts.setdefault(name, []).append(array[max(first_block - begin, 0) : last_block + 1 - begin])
        offset = start - first_block * self.block_size
        flat = {name: np.concatenate(arrays).reshape(-1) for name, arrays in parts.items()}
        return {name: array[offset : offset + stop - start] for name, array in flat.items()}

    def map_shards(self, run_tasks: RunTasks, function: Any, *arguments: Any) -> Iterator[Any]:
        """`function(columns, predicted, *arguments)` for every shard, in any order: its (B, T) columns as `read` names
        them, and which of its tokens are predicted."""
        places = (self.scores, self.measure, self.mask)
        return run_tasks(_on_columns, ((function, path, *places, *arguments) for path in self.files))


def selected(manifest: Manifest, mask: Path) -> dict[str, Any]:
    """What a mask's manifest says of the selection.

    Raises:
        ValueError: another version has selected, and named no behaviour or no unit.
    """
    summary = manifest.summary
    if manifest.verb == "build_mask" and not all(isinstance(summary.get(key), str) for key in ("behaviour", "unit")):
        raise ValueError(
            f"{mask / MANIFEST} names no behaviour or no unit: another version made it; delete ranking/ and mask/ and"
            " run `ifguide build_mask` again"
        )
    return summary


def measured_by(summary: Mapping[str, Any], scores: Path) -> Measure:
    """What the mask with this summary of its manifest ranks the tokens of `scores` by."""
    behaviour = summary.get("behaviour", OWN)
    column = schemas.score_column(behaviour)
    if "ensemble" in summary:
        return Measure(column=column)
    if "null_spread" not in summary:
        return Measure(column=schemas.smoothed_column(behaviour) if summary.get("smoothed") else column)
    nulls = schemas.null_columns(schemas.read_schema(next(verified_files(scores))), behaviour)
    return Measure(column=column, nulls=nulls, spread=Spread(**summary["null_spread"]))


def token_texts(tokenizer: Any, tokens: np.ndarray, window: slice) -> list[str]:
    """The texts of the tokens in a window of a document, which joined are the text of the window.

    Decoded alone, a token can lose its space or be a part of a character. So a token's text is what it adds to the
    tokens before it; a character that tokens share, as bytes of one emoji do, is in the first one's text only."""
    first = max(0, window.start - CONTEXT)
    ids = tokens[first : window.stop + CONTEXT].tolist()
    decoded = [str(tokenizer.decode(ids[:n], clean_up_tokenization_spaces=False)) for n in range(1, len(ids) + 1)]
    texts, owner, begin = [""] * len(ids), 0, 0
    for index, prefix in enumerate(decoded):
        if len(prefix) >= begin and decoded[-1].startswith(prefix):  # else its last token is within a character
            texts[owner] = prefix[begin:]
            owner, begin = index + 1, len(prefix)
    return texts[window.start - first : window.stop - first]


def score_histogram(view: View, run_tasks: RunTasks) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Bin edges, and counts of all predicted tokens' scores and of the annotated ones'."""
    low, high = view.summary["score_min"], view.summary["score_max"]
    edges = np.linspace(low, high if high > low else low + 1, HISTOGRAM_BINS + 1)
    counts, annotated = np.zeros((2, HISTOGRAM_BINS), np.int64)
    for of_all, of_annotated in view.map_shards(run_tasks, _histogram, edges):
        counts += of_all
        annotated += of_annotated
    return edges, counts, annotated


def mask_agreement(view: View, run_tasks: RunTasks) -> MaskAgreement:
    """The masked tokens of the corpus against the annotated ones."""
    return sum(view.map_shards(run_tasks, _agreement), MaskAgreement())


def _histogram(
    columns: dict[str, np.ndarray], predicted: np.ndarray, edges: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    scores, annotated = columns["token_score"], columns["annotated"]
    return np.histogram(scores[predicted], edges)[0], np.histogram(scores[predicted & annotated], edges)[0]


def _agreement(columns: dict[str, np.ndarray], predicted: np.ndarray) -> MaskAgreement:
    return token_agreement(columns["masked"], columns["annotated"])


def _on_columns(function: Any, path: Path, scores: Path, measure: Measure | None, mask: Path, *arguments: Any) -> Any:
    lengths = schemas.read_table(sound(path.parent, path.name), columns=["length"]).column("length").to_numpy()
    columns = _shard_columns(path, scores, measure, mask)
    index = np.arange(columns["tokens"].shape[1])
    return function(columns, (index >= 1) & (index < lengths[:, None]), *arguments)


def _shard_columns(path: Path, scores: Path, measure: Measure | None, mask: Path) -> dict[str, np.ndarray]:
    """The (B, T) columns of one shard; scores where there are any to `measure`."""
    table = schemas.read_table(sound(path.parent, path.name))
    tokens = schemas.per_token_array(table, "tokens")
    columns = {"tokens": tokens}
    if measure:
        of_scores = schemas.read_table(sound(scores, path.name), columns=measure.columns)
        columns["token_score"] = measure.of([schemas.per_token_array(of_scores, name) for name in measure.columns])[0]
    columns["masked"] = schemas.per_token_array(schemas.read_table(sound(mask, path.name)), "masked")
    has_annotations = "annotated" in table.column_names
    columns["annotated"] = (
        schemas.per_token_array(table, "annotated") if has_annotations else np.zeros_like(tokens, bool)
    )
    return columns
