"""Masks are read as the paper's code saves them, and only for the blocks that they were built on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset

from ifguide import schemas
from ifguide.artifacts import MismatchError, data_files, read_manifest
from ifguide.config import Input, config_from_mapping
from ifguide.interchange import check_mask, import_mask, read_mask
from ifguide.pipeline import pipeline_steps
from ifguide.training.blocks import TrainingBlocks, flatten_blocks
from tests.unit.interchange.conftest import LENGTHS, NUM_BLOCKS, T


def saved_mask(path: Path, *places: tuple[int, int], dtype: torch.dtype = torch.bool) -> Path:
    """A mask as the paper's code saves it: one tensor (blocks, tokens)."""
    mask = torch.zeros(NUM_BLOCKS, T, dtype=dtype)
    for block, index in places:
        mask[block, index] = True
    torch.save(mask, path)
    return path


def given_blocks(run_dir: Path) -> list[list[int]]:
    """The blocks as the paper's code has them; the last one is shorter."""
    tables = [schemas.read_table(path) for path in data_files(run_dir / "corpus")]
    blocks = np.concatenate([schemas.per_token_array(table, "tokens") for table in tables])
    return [ids[:length].tolist() for ids, length in zip(blocks, LENGTHS, strict=True)]


def blocks_of(run_dir: Path, path: Path, change: Callable[[list[list[int]]], Any] = lambda blocks: blocks) -> Input:
    """A file of the blocks that the run's corpus was packed of, after a change."""
    pq.write_table(pa.table({"input_ids": change(given_blocks(run_dir))}), path)
    return Input(path=str(path), tokens_column="input_ids")


def imported(run_dir: Path, path: Path, shift: int = 0) -> set[tuple[int, int]]:
    """What `pretrain` gets of the mask."""
    tokens = blocks_of(run_dir, path.with_name("chunks.parquet"))
    folders = {"corpus": run_dir / "corpus", "folder": run_dir / "mask"}
    import_mask(path, **folders, tokens=tokens, shift=shift, config_yaml="seed: 0\n")
    blocks = path.with_suffix(".blocks")
    flatten_blocks(run_dir / "corpus", run_dir / "mask", blocks)
    masked = TrainingBlocks(blocks).masked
    assert masked is not None
    return {(int(block), int(index)) for block, index in np.argwhere(masked)}


def test_a_run_goes_on_from_a_mask_of_the_papers_code(run_dir: Path, tmp_path: Path) -> None:
    imported(run_dir, saved_mask(tmp_path / "mask.pt", (1, 2)))
    steps = pipeline_steps(config_from_mapping({"run_dir": str(run_dir)}))
    assert [verb for verb, _ in steps] == ["pack_corpus", "pretrain", "pretrain", "evaluate"]


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64])
def test_a_mask_acts_on_the_tokens_whose_loss_it_weighed(dtype: torch.dtype, run_dir: Path, tmp_path: Path) -> None:
    """The paper's trainer weighs labels[1:] with mask[1:]: index 0 weighs nothing, and neither does padding."""
    path = saved_mask(tmp_path / "m.pt", (0, 0), (0, 1), (2, 5), (3, 2), (4, 3), (4, 4), dtype=dtype)
    assert imported(run_dir, path) == {(0, 1), (2, 5), (3, 2), (4, 3)}
    manifest = read_manifest(run_dir / "mask")
    assert manifest.inputs["corpus"] == read_manifest(run_dir / "corpus").fingerprint
    assert manifest.summary["tokens_masked"] == 4
    assert manifest.summary["tokens_dropped"] == 2
    assert manifest.summary["source"] == str(path)
    assert manifest.summary["sha256"] == manifest.inputs["mask_file"]
    assert manifest.summary["predicted_tokens"] == sum(length - 1 for length in LENGTHS)


@pytest.mark.parametrize(
    ("shift", "expected"), [(1, {(0, 1), (0, 2), (4, 3)}), (-1, {(2, 4), (4, 1)}), (4, {(0, 4), (0, 5)})]
)
def test_a_shift_moves_within_the_block(
    shift: int, expected: set[tuple[int, int]], run_dir: Path, tmp_path: Path
) -> None:
    path = saved_mask(tmp_path / "m.pt", (0, 0), (0, 1), (2, 5), (4, 2))
    assert imported(run_dir, path, shift) == expected


def test_another_file_or_shift_into_the_same_run_is_refused(run_dir: Path, tmp_path: Path) -> None:
    path = saved_mask(tmp_path / "m.pt", (0, 1))
    assert imported(run_dir, path) == imported(run_dir, path)
    with pytest.raises(MismatchError, match=r"import_mask.shift was 0, now 1"):
        imported(run_dir, path, 1)
    with pytest.raises(MismatchError, match=r"mask_file was"):
        imported(run_dir, saved_mask(tmp_path / "other.pt", (0, 2)))


@pytest.mark.parametrize("shape", [(NUM_BLOCKS - 1, T), (NUM_BLOCKS, T + 1)])
def test_a_mask_of_another_corpus_is_refused_with_both_sizes(
    shape: tuple[int, int], run_dir: Path, tmp_path: Path
) -> None:
    torch.save(torch.zeros(shape, dtype=torch.bool), tmp_path / "m.pt")
    with pytest.raises(ValueError, match=rf"masks {shape[0]} blocks of {shape[1]} tokens, .* has 5 of 6"):
        imported(run_dir, tmp_path / "m.pt")
    assert not (run_dir / "mask").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda blocks: [*blocks[:2], [*blocks[2][:-1], 0], *blocks[3:]], r"chunks.parquet, row 2 is not block 2 of"),
        (lambda blocks: blocks[::-1], r"chunks.parquet, row 0 is not block 0"),
        (lambda blocks: [[*block[1:], 0] for block in blocks], r"row 0 is not block 0"),
        (lambda blocks: blocks[:-1], r"what follows the last block of .*chunks.parquet is not block 4"),
        (lambda blocks: [*blocks, blocks[0]], r"has more than the 5 blocks of"),
        (lambda blocks: [*blocks[:4], blocks[4] + [7, 8]], r"row 4 is not block 4"),  # what would have been packed
        (lambda blocks: [*blocks[:4], None], r"row 4: column 'input_ids' is missing"),
    ],
)
def test_a_mask_of_as_many_blocks_but_other_tokens_is_refused(run_dir: Path, tmp_path: Path, change, message) -> None:
    path = saved_mask(tmp_path / "m.pt", (0, 1))
    folders = {"corpus": run_dir / "corpus", "folder": run_dir / "mask"}
    tokens = blocks_of(run_dir, tmp_path / "chunks.parquet", change)
    with pytest.raises(ValueError, match=message):
        import_mask(path, **folders, tokens=tokens, shift=0, config_yaml="")
    with pytest.raises(ValueError, match=r"m\.pt does not say which tokens it is of: name .* --tokens FILE"):
        import_mask(path, **folders, tokens=None, shift=0, config_yaml="")
    assert not (run_dir / "mask").exists()


@pytest.mark.parametrize("kind", ["saved", "jsonl", "pt"])
def test_the_blocks_may_be_of_any_format_and_padded(run_dir: Path, tmp_path: Path, kind: str) -> None:
    rows = [ids + [0] * (T - len(ids)) for ids in given_blocks(run_dir)]
    if kind == "saved":  # as the paper's code keeps them
        Dataset.from_dict({"input_ids": rows, "labels": rows}).save_to_disk(tmp_path / "chunks")
    elif kind == "jsonl":
        (tmp_path / "chunks.jsonl").write_text("".join(json.dumps({"input_ids": ids}) + "\n" for ids in rows))
    else:
        torch.save(torch.tensor(rows), tmp_path / "chunks.pt")
    place = tmp_path / ("chunks" if kind == "saved" else f"chunks.{kind}")
    tokens = Input(path=str(place), tokens_column="input_ids")
    mask = check_mask(saved_mask(tmp_path / "m.pt", (1, 2)), run_dir / "corpus", tokens)
    assert np.argwhere(mask).tolist() == [[1, 2]]


def test_blocks_that_are_no_token_ids_are_said_to_be_none(run_dir: Path, tmp_path: Path) -> None:
    torch.save(torch.zeros(5, T), tmp_path / "chunks.pt")
    with pytest.raises(ValueError, match=r"chunks\.pt holds torch\.float32 .*; blocks are one tensor of token ids"):
        check_mask(saved_mask(tmp_path / "m.pt", (1, 2)), run_dir / "corpus", Input(path=str(tmp_path / "chunks.pt")))


class Untrusted:
    def __reduce__(self):
        return (print, ("this must never run",))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (torch.full((2, 3), 2), "values other than 0 and 1"),
        (torch.zeros(2, 3), r"holds torch.float32 \(2, 3\)"),
        (torch.zeros(2, 3, 4, dtype=torch.bool), "one bool tensor"),
        ({"mask": torch.zeros(2, 3, dtype=torch.bool)}, "holds dict"),
        (Untrusted(), "is not a tensor that torch.save wrote"),
    ],
)
def test_what_is_no_mask_is_refused_and_never_run(
    content: object, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(content, tmp_path / "m.pt")
    with pytest.raises(ValueError, match=message):
        read_mask(tmp_path / "m.pt")
    assert "never run" not in capsys.readouterr().out


@pytest.mark.parametrize("content", [b"", b"not a zip file", b"PK\x03\x04 cut short"])
def test_a_damaged_mask_file_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "m.pt").write_bytes(content)
    with pytest.raises(ValueError, match=r"m\.pt is not a tensor"):
        read_mask(tmp_path / "m.pt")
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pt does not exist"):
        read_mask(tmp_path / "nowhere.pt")


def test_no_flipped_bit_and_no_cut_of_a_mask_file_passes_for_another_mask(tmp_path: Path) -> None:
    path = saved_mask(tmp_path / "m.pt", (0, 3), (2, 1))
    whole, content = read_mask(path), path.read_bytes()
    damages = [content[:size] for size in range(0, len(content), 37)]
    for place in range(0, len(content), 13):
        damages.append(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])

    def refusal(damaged: bytes) -> str | None:
        path.write_bytes(damaged)
        try:
            assert np.array_equal(read_mask(path), whole)  # what the file does not need was hit
        except ValueError as error:
            return str(error)
        return None

    refusals = [text for text in map(refusal, damages) if text is not None]
    assert all("m.pt" in text for text in refusals)
    assert len(refusals) > len(damages) / 4
