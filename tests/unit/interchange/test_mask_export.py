"""Masks leave in every format as they are in the run, whole or not at all."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from datasets import load_from_disk

from ifguide import mask_export
from ifguide.artifacts import data_files, read_manifest, verify_folder
from ifguide.cli import main
from ifguide.config import Input, ModelSource
from ifguide.interchange import import_mask, read_mask
from ifguide.mask_export import FORMATS, export_mask
from ifguide.models import load_model
from ifguide.spans.mapping import mask_of_spans, spans_of_mask, token_edges
from ifguide.storage import upload_folder
from ifguide.training.blocks import TrainingBlocks, flatten_blocks
from ifguide.training.lm_loss import LanguageModelLoss
from ifguide.training.objective import Objective
from ifguide.training.signed_loss import objective
from tests.exported import finish, make_run
from tests.tiny import GPT_NEOX
from tests.tokenizers import TEXTS, tokenizers

TEXTS_HERE = [*TEXTS, "pig", "", *TEXTS]
T = 16


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run of a few documents in blocks of 16 tokens, three in a shard, a tenth of them masked."""
    return make_run(tmp_path / "run", TEXTS_HERE, tokenizers()["bpe"], block_size=T, blocks_per_shard=3)


def blocks_of(run_dir: Path) -> TrainingBlocks:
    """What `pretrain` reads."""
    flatten_blocks(run_dir / "corpus", run_dir / "mask", run_dir / "flat")
    return TrainingBlocks(run_dir / "flat")


@pytest.mark.parametrize("kind", FORMATS)
def test_an_export_says_what_it_is_of_and_is_the_same_each_time(kind: str, run_dir: Path, tmp_path: Path) -> None:
    manifest = export_mask(run_dir, tmp_path / "out", kind=kind)
    assert manifest == read_manifest(tmp_path / "out")
    assert export_mask(run_dir, tmp_path / "again", kind=kind).fingerprint == manifest.fingerprint
    corpus, mask = (read_manifest(run_dir / name) for name in ("corpus", "mask"))
    assert manifest.inputs == {"corpus": corpus.fingerprint, "mask": mask.fingerprint}
    assert manifest.rows["masked"] == mask.rows["tokens"] > 0
    unit = "documents" if kind == "spans" else "blocks"
    assert manifest.rows[unit] == corpus.rows[unit]
    found = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*")}
    assert found == {*manifest.files, "manifest.json", "config.yaml"}
    verify_folder(tmp_path / "out")


def test_flat_files_hold_the_blocks_and_their_mask(run_dir: Path, tmp_path: Path) -> None:
    export_mask(run_dir, tmp_path / "out", kind="npy")
    tokens, mask, lengths = (np.load(tmp_path / "out" / f"{name}.npy") for name in ("tokens", "mask", "lengths"))
    blocks = blocks_of(run_dir)
    assert (tokens.dtype, mask.dtype, lengths.dtype) == (np.int32, np.uint8, np.int32)
    assert np.array_equal(tokens, blocks.tokens)
    assert np.array_equal(mask, blocks.masked)
    assert np.array_equal(lengths, blocks.lengths)


def test_a_folder_of_datasets_has_signed_labels_and_weights(run_dir: Path, tmp_path: Path) -> None:
    export_mask(run_dir, tmp_path / "out", kind="hf", penalty=0.5)
    rows = load_from_disk(str(tmp_path / "out")).with_format("numpy")[:]
    blocks = blocks_of(run_dir)
    predicted = (np.arange(T) >= 1) & (np.arange(T) < blocks.lengths[:, None])
    assert not predicted.all()
    labels = np.where(predicted, np.where(blocks.masked, -101 - blocks.tokens, blocks.tokens), -100)
    assert np.array_equal(np.stack(rows["input_ids"]), blocks.tokens)
    assert np.array_equal(np.stack(rows["labels"]), labels)
    assert np.array_equal(np.stack(rows["loss_weight"]), predicted * np.where(blocks.masked, -0.5, 1.0))


def test_documents_that_do_not_see_each_other_are_apart_in_transformers_too(tmp_path: Path) -> None:
    """The loss of a model that reads the exported rows is that of `pretrain`, whose documents are apart."""
    config = "seed: 0\npretrain: {document_attention: true}\n"
    shape = {"block_size": T, "blocks_per_shard": 3, "config_yaml": config}
    run_dir = make_run(tmp_path / "run", TEXTS_HERE, tokenizers()["bpe"], **shape)
    for kind in ("hf", "npy", "paper"):
        export_mask(run_dir, tmp_path / kind, kind=kind)
    rows = load_from_disk(str(tmp_path / "hf")).with_format("torch")[:]
    flatten_blocks(run_dir / "corpus", run_dir / "mask", tmp_path / "flat", documents=True)
    blocks = TrainingBlocks(tmp_path / "flat")
    every = np.arange(len(blocks.tokens))
    count = blocks.predicted_tokens(every)
    assert int((rows["labels"] != -100).sum()) == count < blocks.lengths.sum() - len(every)
    assert np.array_equal(np.load(tmp_path / "npy" / "position_ids.npy"), rows["position_ids"].numpy())
    model = load_model(ModelSource(architecture={**GPT_NEOX, "vocab_size": len(tokenizers()["bpe"])})).double()
    taken = blocks.take(every)
    tokens, lengths, mask, documents = (torch.from_numpy(values) for values in taken if values is not None)
    own = LanguageModelLoss(model, Objective(kind="penalty", penalty=0.5))(tokens, lengths, mask, count, documents)[0]
    outputs = model(input_ids=rows["input_ids"], position_ids=rows["position_ids"], use_cache=False)
    assert objective(outputs, rows["labels"], kind="penalty", penalty=0.5).item() == pytest.approx(own.item(), rel=1e-9)
    seen = objective(model(input_ids=rows["input_ids"]), rows["labels"], kind="penalty", penalty=0.5).item()
    assert seen != pytest.approx(own.item(), rel=1e-4)


def test_the_papers_files_come_back_as_the_same_mask(run_dir: Path, tmp_path: Path) -> None:
    export_mask(run_dir, tmp_path / "out", kind="paper")
    assert torch.load(tmp_path / "out" / "mask.pt", weights_only=True).dtype == torch.bool
    assert np.array_equal(read_mask(tmp_path / "out" / "mask.pt"), blocks_of(run_dir).masked)
    tokens = Input(path=str(tmp_path / "out" / "tokens.pt"))
    folders = {"corpus": run_dir / "corpus", "folder": tmp_path / "back"}
    manifest = import_mask(tmp_path / "out" / "mask.pt", **folders, tokens=tokens, shift=0, config_yaml="")
    assert manifest.summary["tokens_dropped"] == 0
    for path in data_files(run_dir / "mask"):
        assert pq.read_table(path).equals(pq.read_table(tmp_path / "back" / path.name))


@pytest.mark.parametrize("name", ["bpe", "unigram", "bytes"])
def test_spans_make_the_mask_of_any_tokenizer(name: str, run_dir: Path, tmp_path: Path) -> None:
    """By the rule that the page gives: a token is masked where its characters overlap a span."""
    export_mask(run_dir, tmp_path / "out", kind="spans")
    rows = pq.read_table(tmp_path / "out" / "spans.parquet").to_pylist()
    assert [(row["doc_id"], row["source"], row["num_chars"]) for row in rows] == [
        (i, "test", len(text)) for i, text in enumerate(TEXTS_HERE)
    ]
    masked = blocks_of(run_dir).masked
    assert masked is not None
    stream, begin = masked.reshape(-1), 0
    for row, text in zip(rows, TEXTS_HERE, strict=True):
        source, other = (stops_of(text, each) for each in ("bpe", name))
        own = spans_of_mask(stream[begin : begin + len(source)], token_edges(source))
        found = np.array([[span["start"], span["stop"]] for span in row["spans"]]).reshape(-1, 2)
        assert np.array_equal(found, own)
        assert np.array_equal(mask_of_spans(found, token_edges(other)), mask_of_spans(own, token_edges(other)))
        begin += len(source)


def stops_of(text: str, name: str) -> np.ndarray:
    offsets = tokenizers()[name](text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    return np.array([*np.maximum.accumulate([stop for _, stop in offsets] or [0])[: len(offsets)], len(text) + 1])


@pytest.mark.parametrize("kind", FORMATS)
def test_a_run_in_an_object_store_is_exported_to_local_files(
    kind: str, run_dir: Path, tmp_path: Path, store: Path
) -> None:
    upload_folder(run_dir, store / "run")
    here, there = (
        export_mask(place, tmp_path / place.parent.name / kind, kind=kind) for place in (run_dir, store / "run")
    )
    assert there.fingerprint == here.fingerprint
    with pytest.raises(ValueError, match="export to a local folder, and copy that"):
        export_mask(store / "run", store / "out", kind=kind)


def other_corpus(run_dir: Path) -> None:
    other = make_run(run_dir.parent / "other", TEXTS_HERE[:2], tokenizers()["bpe"], block_size=T, blocks_per_shard=3)
    shutil.rmtree(run_dir / "corpus")
    (other / "corpus").rename(run_dir / "corpus")


def flipped(run_dir: Path) -> None:
    path = run_dir / "mask" / "shard-00001.parquet"
    content = path.read_bytes()
    path.write_bytes(content[:100] + bytes([content[100] ^ 1]) + content[101:])


def miscounted(run_dir: Path) -> None:
    folder = run_dir / "mask"
    (folder / "manifest.json").unlink()
    finish(folder, "build_mask", {"corpus": read_manifest(run_dir / "corpus").fingerprint}, rows={"tokens": 1})


def token_ids(run_dir: Path) -> None:
    folder, corpus = run_dir / "corpus", read_manifest(run_dir / "corpus")
    inputs = [{"path": "ids.parquet", "tokens_column": "input_ids"}]
    options = {"pack_corpus": {**corpus.options["pack_corpus"], "inputs": inputs}}
    (folder / "manifest.json").unlink()
    finish(folder, "pack_corpus", {}, rows=corpus.rows, options=options, summary=corpus.summary)


@pytest.mark.parametrize(
    ("damage", "kind", "message"),
    [
        (
            lambda run_dir: shutil.rmtree(run_dir / "mask"),
            "npy",
            r"mask does not exist; run `ifguide build_mask` first",
        ),
        (lambda run_dir: (run_dir / "mask" / "manifest.json").unlink(), "hf", r"run `ifguide build_mask` first"),
        (lambda run_dir: shutil.rmtree(run_dir / "corpus"), "paper", r"run `ifguide pack_corpus` first"),
        (other_corpus, "npy", r"the corpus of .*mask .* is not .*corpus"),
        (flipped, "npy", r"shard-00001.parquet has changed since it was made"),
        (flipped, "spans", r"shard-00001.parquet has changed since it was made"),
        (miscounted, "paper", r"'masked': \d+\} were exported where .*'masked': 1\} are expected"),
        (miscounted, "spans", r"'masked': \d+\} were exported where .*'masked': 1\} are expected"),
        (token_ids, "spans", r"documents that came as token ids have no characters; export npy, hf or paper"),
    ],
)
def test_what_cannot_be_exported_is_said_in_a_line_and_leaves_nothing(
    damage: Callable[[Path], Any],
    kind: str,
    message: str,
    run_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    damage(run_dir)
    before = sorted(tmp_path.iterdir())
    assert main(["export-mask", str(run_dir), str(tmp_path / "out"), "--format", kind]) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert re.search(message, line), line
    assert sorted(tmp_path.iterdir()) == before


def test_a_folder_that_is_there_is_left_alone(run_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(FileExistsError, match=r"out exists; name a folder that does not"):
        export_mask(run_dir, tmp_path / "out", kind="npy")
    assert not list((tmp_path / "out").iterdir())
    with pytest.raises(ValueError, match=r"--penalty -1: must be 0 or more"):
        export_mask(run_dir, tmp_path / "new", kind="hf", penalty=-1)
    with pytest.raises(ValueError, match=r"--format arrow: choose one of spans, npy, hf, paper"):
        export_mask(run_dir, tmp_path / "new", kind="arrow")


def test_an_export_that_ends_half_way_is_not_there(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(part: Path, *_: Any) -> None:
        (part / "tokens.npy").write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setitem(mask_export.FORMATS, "npy", fail)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(OSError, match="no space left"):
        export_mask(run_dir, tmp_path / "out", kind="npy")
    assert sorted(tmp_path.iterdir()) == before
