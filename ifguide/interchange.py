"""Factors in, scores out, masks in: what this pipeline shares with kronfluence and with the paper's code.

- Factors: a folder `factors_<name>` as kronfluence's Analyzer writes it, whoever fitted it, for `build_query`.
- Scores: `scores_<name>` as kronfluence's Analyzer and the paper's mask builder read it, (1 query, N blocks, T).
  kronfluence speaks at position t of label t + 1 and ours of token j at j, so exported[t] = token_score[t + 1],
  and the last position is 0.
- Masks: the paper's code (github.com/ztcoalson/IF-Guide) saves one bool tensor (N blocks, T) with torch.save. Its
  trainer shifts mask and labels alike: entry j weighs the loss of predicting token j, as in our masks, so the mask
  acts here as it did there with a shift of 0. It was selected from scores at kronfluence's alignment, though, one
  token before those it means; shift 1 puts it there. A tensor does not say which tokens it is of, and any corpus of as
  many blocks would take it: the blocks that it was built on are compared with the corpus', token by token.

Cost: scores and masks are held in memory whole, 4 bytes and 1 byte a token. It fits nothing, and cannot tell whether
factors without a manifest were fitted on the proxy's very weights: it checks modules, shapes and values.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ifguide import schemas
from ifguide.artifacts import (
    Manifest,
    data_files,
    file_digest,
    open_artifact,
    publish,
    require,
    verified_files,
    write_json,
)
from ifguide.config import Input, ModelSource, check_names
from ifguide.corpus.reading import list_chunks, read_documents
from ifguide.folders import SCORES
from ifguide.influence.proxy import load_proxy
from ifguide.storage import local_copy

FACTOR_FILES = ("activation_eigenvectors", "gradient_eigenvectors", "lambda_matrix", "num_lambda_processed")
PACK_THEM = "pack the blocks that it was built on, by pack_corpus.inputs with their tokens_column"
MASK_TENSOR = "a mask is one bool tensor (blocks, tokens)"
BLOCKS = "blocks are one tensor of token ids (blocks, tokens)"
TENSOR_SUFFIXES = (".pt", ".pth", ".bin")
WRAPPERS = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})


def check_factors(folder: Path, shapes: Mapping[str, tuple[int, int]]) -> tuple[str, dict[str, str]]:
    """The fingerprint of a folder of kronfluence's factors, and each module's name in its files.

    `shapes`: module name -> (d_out, d_in [+ 1 with a bias]), as in `influence.query`. Names are found as they are, or
    without the parts that DDP, FSDP, `torch.compile` and activation checkpointing put into them.

    Raises:
        FileNotFoundError: a file is missing. ValueError: a file is damaged; a module is missing, or found twice, or its
            factors are of another shape, not finite, or of no sequence.
    """
    paths = [folder / f"{name}.safetensors" for name in FACTOR_FILES]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise FileNotFoundError(
            f"build_query.factors: {folder} has no {', '.join(missing)}; name the folder factors_<name> itself, with"
            " EK-FAC factors that kronfluence has aggregated"
        )
    names: dict[str, str] = {}
    for path in paths:
        with _opened(path) as file:
            names = names or _match_names(path, list(file.keys()), shapes)
            for name, (rows, columns) in shapes.items():
                expected = {
                    "activation_eigenvectors": (columns, columns),
                    "gradient_eigenvectors": (rows, rows),
                    "lambda_matrix": (rows, columns),
                }
                if names[name] not in file.keys():  # noqa: SIM118 (a safetensors file has no __contains__)
                    raise ValueError(f"{path} holds nothing of {names[name]}, which {paths[0].name} does")
                _check_factor(path, names[name], file.get_tensor(names[name]), expected.get(path.stem))
    digests = {path.name: file_digest(path) for path in paths}
    return sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest(), names


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A file of tensors. Raises ValueError, naming it, where it is damaged."""
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file, or it is damaged ({error}); copy or fit it again") from error


def check_proxy_factors(folder: Path, proxy: ModelSource, module_names: Sequence[str]) -> tuple[str, dict[str, str]]:
    """`check_factors` of a local or remote folder, by the shapes of the proxy's modules."""
    model = load_proxy(proxy, gpus=0)
    shapes = {}
    for name in module_names:
        module = model.get_submodule(name)
        assert isinstance(module, torch.nn.Linear), name
        shapes[name] = (module.out_features, module.in_features + (module.bias is not None))
    return check_factors(local_copy(folder), shapes)


def _match_names(path: Path, names_there: list[str], wanted: Mapping[str, Any]) -> dict[str, str]:
    plain: dict[str, list[str]] = {}
    for name in names_there:
        plain.setdefault(".".join(part for part in name.split(".") if part not in WRAPPERS), []).append(name)
    names = {}
    for name in wanted:
        candidates = [name] if name in names_there else plain.get(name, [])
        if not candidates:
            raise ValueError(
                f"{path} holds no factors of {name}, a module of the proxy, only of"
                f" {', '.join(sorted(names_there)[:3])}, ... Fit them on this proxy with its own module names, all its"
                " tracked modules"
            )
        if len(candidates) > 1:
            raise ValueError(f"{path} holds {name} more than once: {', '.join(sorted(candidates))}")
        names[name] = candidates[0]
    return names


def _check_factor(path: Path, name: str, tensor: torch.Tensor, shape: tuple[int, int] | None) -> None:
    if shape is None:
        if not int(tensor) > 0:
            raise ValueError(f"{path}: {name} was fitted on {int(tensor)} sequences")
    elif tuple(tensor.shape) != shape:
        raise ValueError(f"{path}: {name} has shape {tuple(tensor.shape)}, this proxy needs {shape}; of another proxy?")
    elif not bool(torch.isfinite(tensor).all()):
        raise ValueError(f"{path}: {name} is not finite; fit the factors again in a wider dtype")


def export_scores(run_dir: Path, out: Path, *, name: str, behaviour: str, max_gigabytes: float) -> Path:
    """Write `out`/scores_<name> for kronfluence: `pairwise_scores.safetensors` with (1, N, T) float32 under
    `all_modules`, rows by block id, and `score_arguments.json`; returns that folder.

    `Analyzer(out.name, ..., output_dir=out.parent).load_pairwise_scores(name)` reads it. The file's metadata tells
    attribution, alignment, and the fingerprints of scores and corpus.

    Raises:
        FileExistsError: the folder exists. ValueError: more than `max_gigabytes`, no such behaviour, a name that is not
            one folder's, or scores that have changed since they were made.
    """
    check_names("--name", [name], of=f"a folder in {out}")
    manifest = require(run_dir / SCORES, "score_corpus")
    schema = schemas.read_schema(next(verified_files(run_dir / SCORES)))
    column = schemas.score_column(behaviour)
    if column not in schema.names:
        behaviours = ", ".join(schemas.scored_behaviours(schema))
        raise ValueError(f"--behaviour: {behaviour!r} was not scored; {run_dir / SCORES} holds {behaviours}")
    block_size = schema.field(column).type.list_size
    num_blocks = manifest.rows["blocks"]
    gigabytes = num_blocks * block_size * 4 / 1e9
    if gigabytes > max_gigabytes:
        raise ValueError(
            f"{num_blocks:,} blocks of {block_size:,} scores are {gigabytes:,.1f} GB, more than --max-gigabytes"
            f" {max_gigabytes:g}; kronfluence reads them into memory at once"
        )
    folder = out / f"scores_{name}"
    if folder.exists():
        raise FileExistsError(f"{folder} exists; give another --name, or remove it")
    exported_QBT = torch.zeros(1, num_blocks, block_size)
    for path in verified_files(run_dir / SCORES):
        table = schemas.read_table(path, columns=["block_id", column])
        rows = torch.from_numpy(table.column("block_id").to_numpy().copy())
        scores_BT = torch.from_numpy(schemas.per_token_array(table, column).copy())
        exported_QBT[0, rows, :-1] = scores_BT[:, 1:]
    metadata = {
        "made_by": "ifguide export-scores",
        "attribution": str(manifest.summary["attribution"]),
        "alignment": "position t speaks of predicting token t + 1; the last position is 0",
        "sign": "positive: training on the token makes the behaviour likelier",
        "behaviour": behaviour,
        "scores": manifest.fingerprint,
        "corpus": manifest.inputs["corpus"],
    }
    write_json(folder / "score_arguments.json", {"compute_per_token_scores": True, "aggregate_query_gradients": True})
    with publish(folder / "pairwise_scores.safetensors") as part:
        save_file({"all_modules": exported_QBT}, part, metadata=metadata)
    return folder


def import_mask(
    path: Path, *, corpus: Path, folder: Path, tokens: Input | None, shift: int, config_yaml: str
) -> Manifest:
    """Publish the paper's mask file as the `mask/` artifact `folder` of `corpus`, where `pretrain` finds it.

    `tokens`: the blocks that the mask was built on, one a row; as they are given to `pack_corpus` to make the corpus.

    Entry j of the file masks token j + `shift` of the same block. What cannot be masked (a block's first token, its
    padding, what a shift moves out of its block) is dropped and counted in the summary.

    Raises:
        FileNotFoundError: no such file. ValueError: not such a mask, or not of this corpus' blocks.
        MismatchError: `folder` holds another mask.
    """
    blocks = require(corpus, "pack_corpus")
    masked_NT = check_mask(path, corpus, tokens)
    if abs(shift) >= masked_NT.shape[1]:
        raise ValueError(f"--shift {shift}: blocks have only {masked_NT.shape[1]} tokens")
    digest = file_digest(path)
    artifact = open_artifact(
        folder,
        verb="import_mask",
        options={"import_mask": {"shift": shift}},
        inputs={"corpus": blocks.fingerprint, "mask_file": digest},
        config_yaml=config_yaml,
    )
    if artifact.manifest:
        return artifact.manifest
    counts = np.sum(list(_write_shards(list(verified_files(corpus)), masked_NT, shift, folder)), axis=0)
    summary = {
        "source": str(path.absolute()),
        "sha256": digest,
        "tokens_of": tokens.path if tokens else None,
        "tokens_masked": int(counts[1]),
        "tokens_dropped": int(masked_NT.sum()) - int(counts[1]),
        "predicted_tokens": int(counts[2]),
    }
    rows = {"blocks": int(counts[0]), "tokens": int(counts[1])}
    return artifact.finish(data_files(folder), rows=rows, summary=summary)


def check_mask(path: Path, corpus: Path, tokens: Input | None) -> np.ndarray:
    """The (N, T) bools of a mask file, if it is of this corpus' blocks; as `import_mask`, which it raises as."""
    blocks = require(corpus, "pack_corpus")
    masked_NT, block_size = read_mask(path), int(blocks.summary["block_size"])
    if masked_NT.shape != (blocks.rows["blocks"], block_size):
        raise ValueError(
            f"{path} masks {masked_NT.shape[0]:,} blocks of {masked_NT.shape[1]:,} tokens, {corpus} has"
            f" {blocks.rows['blocks']:,} of {block_size:,}: {PACK_THEM}"
        )
    require_same_blocks(path, corpus, tokens)
    return masked_NT


def require_same_blocks(path: Path, corpus: Path, tokens: Input | None) -> None:
    """Refuse a file of another program, `path`, unless the blocks that it is of, `tokens`, are the corpus' own.

    Raises:
        ValueError: no tokens are named, or a block differs; names it. FileNotFoundError: there is no such file.
    """
    if tokens is None:
        raise ValueError(
            f"{path} does not say which tokens it is of: name the file of the blocks that it was built on, --tokens"
            " FILE (their ids in a column `input_ids`, or --tokens-column NAME)"
        )
    given = _given_blocks(tokens)
    for block, own in enumerate(_corpus_blocks(corpus)):
        where, ids = next(given, (f"what follows the last block of {tokens.path}", np.zeros(0, np.int32)))
        if not np.array_equal(own, ids[: len(own)]) or len(set(ids[len(own) :].tolist())) > 1:  # more is padding
            raise ValueError(f"{where} is not block {block} of {corpus}, so {path} is not of it: {PACK_THEM}")
    if next(given, None) is not None:
        count = require(corpus, "pack_corpus").rows["blocks"]
        raise ValueError(f"{tokens.path} has more than the {count:,} blocks of {corpus}: {PACK_THEM}")


def _corpus_blocks(corpus: Path) -> Iterator[np.ndarray]:
    """The tokens of each block, without its padding."""
    for path in verified_files(corpus):
        table = schemas.read_table(path, columns=["length", "tokens"])
        lengths = table.column("length").to_numpy()
        for length, ids in zip(lengths, schemas.per_token_array(table, "tokens"), strict=True):
            yield ids[:length]


def _given_blocks(tokens: Input) -> Iterator[tuple[str, np.ndarray]]:
    """Where each row of a file of blocks is, and its tokens."""
    if tokens.path.endswith(TENSOR_SUFFIXES):
        yield from (
            (f"{tokens.path}, row {row}", ids)
            for row, ids in enumerate(_tensor(local_copy(tokens.path), BLOCKS).numpy())
        )
        return
    for chunk in list_chunks(tokens, 0, chunk_bytes=2**62, dotted_key="--tokens"):
        for document in read_documents(chunk, tokens, first_row=0):
            where = f"{chunk.name}, row {document.row}"
            if document.tokens is None:
                raise ValueError(f"{where}: {document.reason}")
            yield where, document.tokens


def _write_shards(files: list[Path], masked_NT: np.ndarray, shift: int, folder: Path) -> Iterator[tuple[int, int, int]]:
    """Publish a mask shard for every corpus shard; yields (blocks, masked tokens, predicted tokens) of each."""
    block_size = masked_NT.shape[1]
    schema = schemas.mask(block_size)
    index = np.arange(block_size)
    source = index - shift
    inside = (source >= 0) & (source < block_size)
    for path in files:
        table = schemas.read_table(path, columns=["block_id", "length"])
        block_ids, lengths_B = table.column("block_id"), table.column("length").to_numpy()
        predicted_BT = (index >= 1) & (index < lengths_B[:, None])
        masked_BT = masked_NT[block_ids.to_numpy()][:, np.clip(source, 0, block_size - 1)] & inside & predicted_BT
        column = schemas.per_token_column(masked_BT, schema, "masked")
        with publish(folder / path.name) as part:
            pq.write_table(pa.Table.from_arrays([block_ids, column], schema=schema), part)
        yield len(masked_BT), int(masked_BT.sum()), int(predicted_BT.sum())


def read_mask(path: Path) -> np.ndarray:
    """The (N, T) bool array in a file that `torch.save` wrote: a tensor of bool, or of integers 0 and 1.

    Raises:
        FileNotFoundError: no such file. ValueError: something else is in it.
    """
    mask = _tensor(path, MASK_TENSOR)
    if mask.dtype != torch.bool and bool(((mask != 0) & (mask != 1)).any()):
        raise ValueError(f"{path} holds values other than 0 and 1; {MASK_TENSOR}")
    return mask.bool().numpy()


def _tensor(path: Path, expected: str) -> torch.Tensor:
    """The (N, T) tensor of bools or integers that a file holds. `expected`: what it should hold, for errors.

    Raises:
        FileNotFoundError: no such file. ValueError: something else is in it.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; name a tensor that torch.save wrote")
    try:
        if zipfile.is_zipfile(path):  # whose checksums torch.load does not look at
            with zipfile.ZipFile(path) as archive:
                if archive.testzip() is not None:
                    raise zipfile.BadZipFile
        tensor = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes raise whatever the unpickler stumbles on
        raise ValueError(
            f"{path} is not a tensor that torch.save wrote, or it is damaged ({type(error).__name__}); save it again"
        ) from error
    if not isinstance(tensor, torch.Tensor) or tensor.ndim != 2 or tensor.is_floating_point() or tensor.is_complex():
        content = f"{tensor.dtype} {tuple(tensor.shape)}" if isinstance(tensor, torch.Tensor) else type(tensor).__name__
        raise ValueError(f"{path} holds {content}; {expected}")
    return tensor
