"""What the passes of Algorithm 1 are given: the rules of a selection, and the shards of a corpus and its scores."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ifguide.selection.algorithm import Unit
from ifguide.selection.measures import Measure

CHUNK_TOKENS = 1 << 18  # a chunk and its temporary arrays stay in a core's cache
RUN_UNITS = FILE_UNITS = 1 << 17
SAMPLE_UNITS = 1 << 10


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What is selected, as in the config's `build_mask`, by which measure, and where the tables go.

    `prior`: of rates (`ifguide.selection.algorithm`); None ranks by sums. `fdr`: tau has this false-discovery rate, in
    place of `quantile`; it wants a measure with nulls."""

    quantile: float
    window: int
    max_fraction: float
    unit: Unit
    prior: int | None
    measure: Measure
    fdr: float | None
    outlier_mass_ratio: float
    outlier_bigram_share: float
    exclude_repeated: bool
    ranking: Path
    mask: Path
    chunk_tokens: int = CHUNK_TOKENS
    run_units: int = RUN_UNITS  # these three: see `ifguide.selection.ranking`
    sample_units: int = SAMPLE_UNITS
    file_units: int = FILE_UNITS

    @property
    def scratch(self) -> Path:
        """Tables between the passes."""
        return self.mask / "scratch"

    def table(self, kind: str, name: str) -> Path:
        """A scratch table of a shard."""
        return self.scratch / f"{kind}-{name}.parquet"


class ShardFiles(NamedTuple):
    """One shard of corpus and scores; `documents` are those that begin in it. The first pass checks the digest of
    the scores, where one is given; `made_by` is the verb that makes them again."""

    name: str
    corpus: Path
    documents: Path
    scores: Path
    scores_sha256: str | None = None
    made_by: str = "score_corpus"


class Extent(NamedTuple):
    """Where a shard lies: blocks, stream positions [begin, end), and its documents, the last of which may end
    beyond it. Without documents these are 0."""

    block_size: int
    first_block: int
    num_blocks: int
    begin: int
    end: int
    first_document: int
    num_documents: int
    documents_begin: int
    last_begin: int
    documents_end: int


class Carried(NamedTuple):
    """The document that a shard begins within, and the shard that owns it."""

    doc_id: int
    begin: int
    end: int
    owner: str


@dataclass(frozen=True, kw_only=True)
class Shard:
    """A shard after the scan. `following` names the shards into which its last document goes on."""

    files: ShardFiles
    extent: Extent
    carried: Carried | None
    following: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.files.name
