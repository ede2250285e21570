"""Token scores of other programs become a run's own: `ifguide import-scores`, after which `build_mask` selects by them.

- bergson (0.9 and later, `attribute_tokens`): a folder with `info.json`, `offsets.npy` and `scores.bin`, a record of
  (score, written) pairs for each scored position; those of sequence i are records offsets[i] to offsets[i + 1].
  Its `config.yaml` says whether more is a stronger proponent; scores for which less is are negated.
- kronfluence: a folder `scores_<name>` with `pairwise_scores.safetensors`, (queries, blocks, tokens) for each module or
  for all; those of modules are added.

Both speak at position t of predicting token t + 1, so token_score[t + 1] = score[t]. Sequences must be the corpus'
blocks, which the file of their tokens shows, token by token, as for masks. Positive scores must mean that training on
the token makes the behaviour likelier: `negate` turns scores that mean the opposite.

Cost: one shard in memory; files are memory-mapped. It cannot tell which query and proxy the scores are of.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from safetensors import SafetensorError, safe_open

from ifguide import schemas
from ifguide.artifacts import Manifest, data_files, file_digest, open_artifact, publish, require, verified_files
from ifguide.config import Input
from ifguide.interchange import require_same_blocks

VERB = "import_scores"
PAIRWISE = "pairwise_scores.safetensors"
BERGSON = ("info.json", "offsets.npy", "scores.bin")


class ForeignScores(Protocol):
    """Scores of one query: `made_by`, the `files` they lie in, how many `sequences`, and their `sign`."""

    made_by: str
    files: tuple[str, ...]
    sequences: int
    sign: int

    def of(self, sequence: int, positions: int) -> np.ndarray:
        """The scores of the first `positions` positions of a sequence, float32. ValueError: there are fewer."""


class ImportedShard(NamedTuple):
    """What a shard of scores holds."""

    blocks: int
    tokens: int
    lowest: float
    highest: float


def import_scores(
    path: Path, *, corpus: Path, folder: Path, tokens: Input | None, query: int | None, negate: bool, config_yaml: str
) -> Manifest:
    """Publish the scores in the folder `path` as the `scores/` artifact `folder` of `corpus`.

    tokens: the blocks that were scored, one a row; as they are given to `pack_corpus` to make the corpus.
    query: which of several queries, from 0; None: there is one.

    Raises:
        FileNotFoundError: no such folder or file. ValueError: scores of another kind, unfinished, not finite, of other
            blocks, or of several queries. MismatchError: `folder` holds others.
    """
    packed, scores = require(corpus, "pack_corpus"), check_scores(path, corpus, tokens, query)
    digest = sha256("".join(file_digest(path / name) for name in scores.files).encode()).hexdigest()
    sign = -scores.sign if negate else scores.sign
    artifact = open_artifact(
        folder,
        verb=VERB,
        options={VERB: {"query": query, "sign": sign}},
        inputs={"corpus": packed.fingerprint, "score_files": digest},
        config_yaml=config_yaml,
    )
    if artifact.manifest:
        return artifact.manifest
    shards = list(_write_shards(list(verified_files(corpus)), scores, sign, path, folder))
    summary = {
        "source": str(path.absolute()),
        "made_by": scores.made_by,
        "attribution": "not recorded",
        "negated": sign < 0,
        "score_min": min(shard.lowest for shard in shards),
        "score_max": max(shard.highest for shard in shards),
    }
    rows = {name: sum(getattr(shard, name) for shard in shards) for name in ("blocks", "tokens")}
    return artifact.finish(data_files(folder), rows=rows, summary=summary)


def check_scores(path: Path, corpus: Path, tokens: Input | None, query: int | None) -> ForeignScores:
    """What the folder `path` of scores holds, if they are of this corpus' blocks; as `import_scores`, which it raises
    as. The scores themselves are not read."""
    packed, scores = require(corpus, "pack_corpus"), read_scores(path, query)
    if scores.sequences != packed.rows["blocks"]:
        raise ValueError(f"{path} scores {scores.sequences:,} sequences, {corpus} has {packed.rows['blocks']:,} blocks")
    require_same_blocks(path, corpus, tokens)
    return scores


def _write_shards(
    shards: list[Path], scores: ForeignScores, sign: int, path: Path, folder: Path
) -> Iterator[ImportedShard]:
    """Publish a shard of scores for each of the corpus."""
    for shard in shards:
        table = schemas.read_table(shard, columns=["block_id", "length", "tokens"])
        block_ids, lengths = (table.column(name).to_pylist() for name in ("block_id", "length"))
        block_size = table.schema.field("tokens").type.list_size
        scores_BT = np.zeros((len(lengths), block_size), np.float32)
        for row, (block, length) in enumerate(zip(block_ids, lengths, strict=True)):
            scores_BT[row, 1:length] = sign * scores.of(block, length - 1)
            if not np.isfinite(scores_BT[row]).all():
                raise ValueError(f"{path}: a score of sequence {block} is not finite; score it again in a wider dtype")
        schema = schemas.scores(block_size)
        column = schemas.per_token_column(scores_BT, schema, schemas.OWN_SCORES)
        with publish(folder / shard.name) as part:
            pq.write_table(pa.Table.from_arrays([table.column("block_id"), column], schema=schema), part)
        yield ImportedShard(len(lengths), sum(lengths), float(scores_BT.min()), float(scores_BT.max()))


def read_scores(path: Path, query: int | None) -> ForeignScores:
    """What a folder of scores holds. Raises as `import_scores`."""
    if (path / PAIRWISE).is_file():
        return KronfluenceScores(path, query)
    if missing := [name for name in BERGSON if not (path / name).is_file()]:
        raise FileNotFoundError(
            f"{path} holds neither {PAIRWISE}, as kronfluence writes it, nor all that bergson does: it lacks"
            f" {', '.join(missing)}"
        )
    return BergsonScores(path, query)


def _chosen(path: Path, query: int | None, count: int) -> int:
    if query is None and count != 1:
        raise ValueError(f"{path} holds scores of {count} queries: choose one by --query, 0 to {count - 1}")
    if query is not None and not 0 <= query < count:
        raise ValueError(f"--query {query}: {path} holds scores of {count} queries, 0 to {count - 1}")
    return query or 0


class BergsonScores:
    """A store of bergson's; see the module."""

    made_by = "bergson"
    files: tuple[str, ...] = BERGSON

    def __init__(self, path: Path, query: int | None):
        self.path = path
        info = _json(path / "info.json")
        if not info.get("attribute_tokens"):
            raise ValueError(f"{path} holds scores of whole sequences; let bergson score tokens: attribute_tokens")
        lacking = [name for name in ("num_scores", "num_rows", "num_items") if not isinstance(info.get(name), int)]
        if lacking:
            raise ValueError(f"{path / 'info.json'} does not say {', '.join(lacking)}; copy the folder again")
        self.query = _chosen(path, query, info["num_scores"])
        with contextlib.suppress(ImportError):
            import ml_dtypes  # noqa: F401  # teaches numpy bfloat16
        try:
            kind: Any = np.dtype(info["dtype"])
            self.offsets = np.load(path / "offsets.npy")
            self.records = np.memmap(path / "scores.bin", dtype=kind, mode="r", shape=(info["num_rows"],))
        except (TypeError, ValueError, KeyError) as error:
            raise ValueError(
                f"{path} is damaged, or of a dtype that numpy lacks ({error}): ml_dtypes has more"
            ) from error
        self.sequences = len(self.offsets) - 1
        if (self.sequences, self.offsets[-1]) != (info["num_items"], info["num_rows"]) or (
            np.diff(self.offsets) < 0
        ).any():
            raise ValueError(f"{path / 'offsets.npy'} does not fit info.json; copy the folder again")
        self.sign = 1 if _more_is_stronger(path) else -1

    def of(self, sequence: int, positions: int) -> np.ndarray:
        start, stop = (int(end) for end in self.offsets[sequence : sequence + 2])
        if stop - start < positions:
            raise ValueError(
                f"{self.path} scores {stop - start} positions of sequence {sequence}, whose block needs {positions}"
            )
        rows = self.records[start : start + positions]
        if not rows[f"written_{self.query}"].all():
            raise ValueError(f"{self.path}: sequence {sequence} was not scored; let bergson finish")
        return rows[f"score_{self.query}"].astype(np.float32)


def _more_is_stronger(path: Path) -> bool:
    """What the command that bergson keeps beside its scores says; without it, as its default is."""
    config = path / "config.yaml"
    if not config.is_file():
        return True
    try:
        steps = yaml.safe_load(config.read_text(encoding="utf-8"))["steps"]
        options = [
            command["score_cfg"] for step in steps for command in step.values() if "score_cfg" in (command or {})
        ]
    except (yaml.YAMLError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{config} is no config of bergson's ({error}); restore it, or remove it") from error
    return all(option.get("higher_is_better", True) for option in options[:1])


class KronfluenceScores:
    """Pairwise scores of kronfluence; see the module."""

    made_by, sign = "kronfluence", 1
    files: tuple[str, ...] = (PAIRWISE,)

    def __init__(self, path: Path, query: int | None):
        self.path = path
        try:
            with safe_open(path / PAIRWISE, framework="pt", device="cpu") as file:
                self.names = list(file.keys())
                shapes = {tuple(file.get_slice(name).get_shape()) for name in self.names}
        except SafetensorError as error:
            raise ValueError(f"{path / PAIRWISE} is damaged ({error}); copy or make it again") from error
        if len(shapes) != 1 or len(shape := next(iter(shapes))) != 3:
            raise ValueError(f"{path / PAIRWISE} has shapes {sorted(shapes)}; let kronfluence score tokens:"
                             " compute_per_token_scores")  # fmt: skip
        queries, self.sequences, self.positions = shape
        self.query = _chosen(path, query, queries)
        self.file = safe_open(path / PAIRWISE, framework="pt", device="cpu")

    def of(self, sequence: int, positions: int) -> np.ndarray:
        if self.positions < positions:
            raise ValueError(f"{self.path} scores {self.positions} positions, blocks need {positions}")
        parts = [self.file.get_slice(name)[self.query, sequence, :positions].float().numpy() for name in self.names]
        return np.stack(parts).sum(axis=0, dtype=np.float32)


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}); copy the folder again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no object; copy the folder again")
    return content
