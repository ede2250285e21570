"""A target with another tokenizer: the same documents in its tokens, masked where they overlap the run's mask."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from ifguide import schemas
from ifguide.artifacts import MANIFEST, PLAN, MismatchError, data_files, read_manifest, write_json, write_manifest
from ifguide.config import Config, ConfigError, ModelSource
from ifguide.config.compare import Method
from ifguide.corpus.tables import document_table
from ifguide.folders import PENALISED
from ifguide.run import Run
from ifguide.stages.compare import _Grid, _own
from ifguide.stages.pack_corpus import pack_corpus
from ifguide.stages.pretrain import pretrain, training_data
from ifguide.tokenizer import load_tokenizer
from tests.tokenizers import byte_level, train_unigram

BLOCK_SIZE = 64


@pytest.fixture(scope="module")
def targets(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of tokenizers: SentencePiece-like, and one token a byte."""
    folder = tmp_path_factory.mktemp("tokenizers")
    texts = list(documents_of(data).values())
    train_unigram(texts, vocab_size=300).save_pretrained(folder / "unigram")
    byte_level().save_pretrained(folder / "bytes")
    return {name: str(folder / name) for name in ("unigram", "bytes")}


def documents_of(data: Path) -> dict[int, str]:
    """Row -> text of the corpus."""
    lines = (data / "corpus.jsonl").read_text(encoding="utf-8").splitlines()
    return {row: json.loads(line)["text"] for row, line in enumerate(lines)}


def with_tokenizer(copied: Callable[..., Config], tokenizer: str | None, **changes: Any) -> Config:
    """The finished run's copy with its baseline as a named proxy, and a target of `tokenizer`."""
    config = copied(drop=("model/penalised",))
    proxy = ModelSource(source=str(Run(config=config).model("baseline") / "hf"))
    return replace(config, proxy=proxy, pretrain=replace(config.pretrain, tokenizer=tokenizer, **changes))


def made(run: Run) -> Run:
    """The run that is trained on, packed and masked."""
    pack_corpus(run)
    training_data(run)
    return run.target


def flat(folder: Path, column: str) -> np.ndarray:
    tables = [schemas.read_table(path) for path in data_files(folder)]
    return np.concatenate([schemas.per_token_array(table, column) for table in tables]).reshape(-1)


def pieces(run: Run, texts: dict[int, str]) -> Iterator[tuple[int, str, list[tuple[int, int]], np.ndarray]]:
    """Each document's id, text, the characters of its tokens by its own tokenizer's offsets, and its mask."""
    tokenizer = load_tokenizer(run.tokenizer_source)
    tokens, masked = flat(run.corpus, "tokens"), flat(run.mask, "masked")
    for record in document_table(run.corpus).to_pylist():
        own = slice(record["token_start"], record["token_start"] + record["num_tokens"])
        text = texts[record["row"]]
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        assert [*encoded["input_ids"], tokenizer.eos_token_id] == tokens[own].tolist()
        yield record["doc_id"], text, encoded["offset_mapping"], masked[own]


def parts(offsets: list[tuple[int, int]], size: int) -> list[tuple[Fraction, Fraction]]:
    """The characters of each token, with what lies between it and the one before; EOS is the one behind the text.
    Tokens that stop at the same character, as the mark before a first word does, share it in equal parts."""
    stops = [stop for _, stop in offsets] + [size + 1]
    edges = [stop - Fraction(stops[j + 1 :].count(stop), stops.count(stop)) for j, stop in enumerate(stops)]
    return list(zip([Fraction(0), *edges], edges, strict=False))


@pytest.mark.parametrize("name", ["unigram", "bytes"])
def test_every_token_that_overlaps_a_span_is_masked_and_no_other(
    name: str, data: Path, targets: dict[str, str], copied: Callable[..., Config]
) -> None:
    """The oracle compares every token with every masked one of its document."""
    run = Run(config=with_tokenizer(copied, targets[name]))
    texts = documents_of(data)
    target = made(run)
    marked = {}
    for doc_id, text, offsets, masked in pieces(run, texts):
        own = parts(offsets, len(text))
        marked[doc_id] = [own[j] for j in np.flatnonzero(masked)]
    found = position = 0
    for doc_id, text, offsets, masked in pieces(target, texts):
        for j, (start, stop) in enumerate(parts(offsets, len(text))):
            overlaps = any(max(start, begin) < min(stop, end) for begin, end in marked[doc_id])
            expected = overlaps and (position + j) % BLOCK_SIZE != 0  # the first of a block has no prediction
            assert masked[j] == expected, (doc_id, j)
            found += expected
        position += len(masked)
    manifest = read_manifest(target.mask)
    assert found == manifest.summary["tokens_masked"] > 0
    assert manifest.inputs["mask"] == read_manifest(run.mask).fingerprint


def test_the_corpus_own_tokenizer_has_the_identical_mask(finished: Config, copied: Callable[..., Config]) -> None:
    source = Run(config=finished).tokenizer_source
    own = with_tokenizer(copied, source)
    own_run = Run(config=own)
    assert own_run.target is own_run
    same = str(Path(source) / "." / "..") + "/" + Path(source).name  # by another name
    run = Run(config=with_tokenizer(copied, same))
    target = made(run)
    assert target.corpus != run.corpus
    np.testing.assert_array_equal(flat(target.corpus, "tokens"), flat(run.corpus, "tokens"))
    np.testing.assert_array_equal(flat(target.mask, "masked"), flat(run.mask, "masked"))


def test_a_tokenizer_is_trained_for_the_target_and_lent_artifacts_share_what_is_made_of_them(
    data: Path, copied: Callable[..., Config], tmp_path: Path
) -> None:
    run = Run(config=with_tokenizer(copied, None, train_tokenizer=300))
    target = made(run)
    assert target.folder == run.folder / "target"
    assert len(load_tokenizer(target.tokenizer_source)) == 300 < len(load_tokenizer(run.tokenizer_source))
    assert sum(1 for _ in pieces(target, documents_of(data))) == read_manifest(run.corpus).rows["documents"]
    assert flat(target.mask, "masked").sum() == read_manifest(target.mask).summary["tokens_masked"] > 0

    written = {path: path.stat().st_mtime_ns for path in target.folder.rglob("*.parquet")}
    method = Run(config=replace(run.config, run_dir=str(tmp_path / "method")))
    shutil.copytree(run.mask, method.mask)
    own_mask = made(method.borrow(run, "corpus"))
    assert (own_mask.corpus, own_mask.mask) == (target.corpus, method.folder / "target" / "mask")
    np.testing.assert_array_equal(flat(own_mask.mask, "masked"), flat(target.mask, "masked"))
    shared = made(method.borrow(run, "corpus", "mask"))
    assert (shared.corpus, shared.mask) == (target.corpus, target.mask)
    assert {path: path.stat().st_mtime_ns for path in target.folder.rglob("*.parquet")} == written


def test_methods_that_share_a_mask_have_it_in_the_targets_tokens_before_they_are_trained(
    targets: dict[str, str], copied: Callable[..., Config]
) -> None:
    run = Run(config=with_tokenizer(copied, targets["bytes"]))
    pack_corpus(run)
    grid = _Grid(run)
    for name, penalty in (("words", 0.5), ("more", 2.0)):
        grid.add_mask(name, Method(mask="words", penalty=penalty))
    shared = {child.target.mask for child in grid.children.values()}
    assert shared == {run.folder / "compare" / "words" / "target" / "mask"}
    trained, of_corpus = (read_manifest(mask).summary for mask in (shared.pop(), grid.children["words"].mask))
    assert trained["tokens_masked"] > 0
    # the share of the tokens that are trained on, which is another one than that of the corpus' tokens
    share = trained["tokens_masked"] / trained["predicted_tokens"]
    assert share != of_corpus["tokens_masked"] / of_corpus["predicted_tokens"]
    assert [grid.made[name].masked_share for name in ("words", "more")] == [share, share]
    made(run)
    own = read_manifest(run.target.mask).summary
    assert _own(run, PENALISED).masked_share == own["tokens_masked"] / own["predicted_tokens"]


def test_spans_have_a_row_for_each_document(finished: Config) -> None:
    run = Run(config=finished)
    manifest = read_manifest(run.mask)
    files = data_files(run.mask, "spans-*.parquet")
    assert {path.name for path in files} <= set(manifest.files)
    tables = [schemas.read_table(path, schemas.SPANS) for path in files]
    ids = [doc_id for table in tables for doc_id in table.column("doc_id").to_pylist()]
    assert ids == list(range(read_manifest(run.corpus).rows["documents"]))


def test_an_interrupted_mask_goes_on_and_a_finished_one_is_kept(
    targets: dict[str, str], copied: Callable[..., Config]
) -> None:
    run = Run(config=with_tokenizer(copied, targets["bytes"]))
    target = made(run)
    manifest, masked = read_manifest(target.mask), flat(target.mask, "masked")
    written = {path.name: path.stat().st_mtime_ns for path in data_files(target.corpus)}
    (target.mask / MANIFEST).unlink()
    write_json(target.mask / PLAN, {"verb": "pretrain", "options": manifest.options, "inputs": manifest.inputs})
    data_files(target.mask)[0].unlink()
    made(run)
    np.testing.assert_array_equal(flat(target.mask, "masked"), masked)
    assert read_manifest(target.mask).fingerprint == manifest.fingerprint
    assert {path.name: path.stat().st_mtime_ns for path in data_files(target.corpus)} == written


def test_changed_documents_and_masks_without_spans_are_refused(
    data: Path, targets: dict[str, str], copied: Callable[..., Config], tmp_path: Path
) -> None:
    config = with_tokenizer(copied, targets["bytes"])
    fewer = tmp_path / "fewer.jsonl"
    lines = (data / "corpus.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    fewer.write_text("".join(lines[:-1]), encoding="utf-8")
    inputs = (replace(config.pack_corpus.inputs[0], path=str(fewer)),)
    changed = Run(config=replace(config, pack_corpus=replace(config.pack_corpus, inputs=inputs)))
    with pytest.raises(MismatchError, match=r"corpus was made from something else: .*fewer\.jsonl"):
        pack_corpus(changed)
    pack_corpus(changed.target)
    with pytest.raises(MismatchError, match="the inputs have changed"):
        training_data(changed)
    without = with_tokenizer(copied, targets["unigram"])
    for path in data_files(Run(config=without).mask, "spans-*.parquet"):
        path.unlink()
    manifest = read_manifest(Run(config=without).mask)
    files = {name: entry for name, entry in manifest.files.items() if not name.startswith("spans")}
    write_manifest(Run(config=without).mask, replace(manifest, files=files))
    (Path(without.run_dir) / "target").rename(tmp_path / "old_target")
    with pytest.raises(ValueError, match="has no character spans"):
        made(Run(config=without))


def test_a_target_whose_corpus_is_not_packed_says_what_to_run(
    targets: dict[str, str], copied: Callable[..., Config]
) -> None:
    run = Run(config=with_tokenizer(copied, targets["bytes"]))
    with pytest.raises(FileNotFoundError, match=r"target/corpus does not exist; run `ifguide pack_corpus` first"):
        pretrain(run)


def test_the_baseline_cannot_be_the_proxy_of_other_tokens(finished: Config) -> None:
    from ifguide.config import config_from_mapping, to_mapping

    for key, value in (("tokenizer", "some/other"), ("train_tokenizer", 512)):
        tree = to_mapping(finished)
        tree["pretrain"][key] = value
        with pytest.raises(ConfigError, match=rf"^pretrain\.{key}: the proxy reads"):
            config_from_mapping(tree)


def test_a_target_trains_on_its_own_tokens_and_its_card_says_on_what(
    targets: dict[str, str], copied: Callable[..., Config]
) -> None:
    run = Run(config=with_tokenizer(copied, targets["unigram"], epochs=0.1))
    pack_corpus(run)
    pretrain(run)
    folder = run.model("penalised") / "hf"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert len(tokenizer) == len(load_tokenizer(targets["unigram"])) <= model.config.vocab_size
    assert model.generate(**tokenizer("the", return_tensors="pt"), max_new_tokens=2).shape[1] > 2
    names = {path.name for path in folder.iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json", "README.md"} <= names
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["GPTNeoXForCausalLM"]
    front = yaml.safe_load((folder / "README.md").read_text().split("---\n")[1])
    known = front["ifguide"]
    assert known["corpus"]["fingerprint"] == read_manifest(run.target.corpus).fingerprint
    assert known["mask"]["inputs"]["mask"] == read_manifest(run.mask).fingerprint
    assert known["objective"]["lambda"] == run.config.pretrain.penalty
    assert known["training"]["steps"] == read_manifest(run.model("penalised")).rows["steps"]
    assert "README.md" in {Path(name).name for name in read_manifest(run.model("penalised")).files}
