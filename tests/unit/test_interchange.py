"""kronfluence's own Analyzer writes the factors that are read and reads the scores that are written; masks are read
as the paper's code saves them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset
from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import FactorArguments
from kronfluence.score.pairwise import load_pairwise_scores
from kronfluence.utils.state import State
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from ifguide import schemas
from ifguide.artifacts import MismatchError, data_files, open_artifact, read_manifest
from ifguide.cli import main
from ifguide.config import OWN, Input
from ifguide.influence.factors import NextTokenTask
from ifguide.influence.query import load_factors
from ifguide.interchange import FACTOR_FILES, check_factors, check_mask, export_scores, import_mask, read_mask
from ifguide.models import tracked_modules
from ifguide.training.blocks import TrainingBlocks, flatten_blocks
from tests.tiny import random_blocks, tiny_model

T, LENGTHS = 6, (6, 6, 6, 6, 4)
NUM_BLOCKS = len(LENGTHS)


def analyzer_of(model: PreTrainedModel, root: Path, name: str = "analysis") -> Analyzer:
    State._reset_state()
    task = NextTokenTask(tracked_modules(model).names)
    return Analyzer(name, prepare_model(model, task), task, cpu=True, disable_tqdm=True, output_dir=str(root))


def shapes_of(model: PreTrainedModel) -> dict[str, tuple[int, int]]:
    shapes = {}
    for name in tracked_modules(model).names:
        module = model.get_submodule(name)
        assert isinstance(module, nn.Linear)
        shapes[name] = (module.out_features, module.in_features + (module.bias is not None))
    return shapes


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Factors that kronfluence's Analyzer fitted by itself."""
    root = tmp_path_factory.mktemp("kronfluence")
    blocks, lengths = random_blocks(4, 8)
    dataset = [
        {"input_ids": torch.from_numpy(tokens).long(), "lengths": torch.tensor(int(length)), "rows": torch.tensor(row)}
        for row, (tokens, length) in enumerate(zip(blocks, lengths, strict=True))
    ]
    analyzer = analyzer_of(tiny_model("gpt_neox"), root)
    analyzer.fit_all_factors("theirs", dataset, per_device_batch_size=2, factor_args=FactorArguments())
    State._reset_state()
    return root / "analysis" / "factors_theirs"


@pytest.fixture
def rewritten(fitted: Path, tmp_path: Path) -> Callable[..., Path]:
    """The factors' files again, each passed through `change(file name, tensors)`."""

    def rewrite(change: Callable[[str, dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Path:
        for name in FACTOR_FILES:
            save_file(change(name, load_file(fitted / f"{name}.safetensors")), tmp_path / f"{name}.safetensors")
        return tmp_path

    return rewrite


def test_factors_that_kronfluence_fitted_are_found_under_their_names(fitted: Path) -> None:
    shapes = shapes_of(tiny_model("gpt_neox"))
    fingerprint, names = check_factors(fitted, shapes)
    assert names == {name: name for name in shapes}
    assert len(fingerprint) == 64
    factors = load_factors(fitted, list(names.values()))
    assert {name: tuple(factor.lambda_mean.shape) for name, factor in factors.items()} == shapes


@pytest.mark.parametrize("wrapped", ["module.{}", "_orig_mod.module.{}"])
def test_names_are_found_behind_wrappers(wrapped: str, rewritten: Callable[..., Path]) -> None:
    shapes = shapes_of(tiny_model("gpt_neox"))
    folder = rewritten(lambda _, tensors: {wrapped.format(name): tensor for name, tensor in tensors.items()})
    assert check_factors(folder, shapes)[1] == {name: wrapped.format(name) for name in shapes}


def test_the_fingerprint_is_of_the_files_not_of_their_place(
    fitted: Path, rewritten: Callable[..., Path], tmp_path: Path
) -> None:
    shapes = shapes_of(tiny_model("gpt_neox"))
    before = check_factors(fitted, shapes)[0]
    assert check_factors(shutil.copytree(fitted, tmp_path / "copy"), shapes)[0] == before
    scaled = rewritten(lambda name, tensors: {k: v * 2 if name == "lambda_matrix" else v for k, v in tensors.items()})
    assert check_factors(scaled, shapes)[0] != before


def broken(kind: str, name: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    first = sorted(tensors)[0]
    if kind == "missing" and name == "lambda_matrix":
        return {key: value for key, value in tensors.items() if key != first}
    if kind == "nan" and name == "lambda_matrix":
        return {**tensors, first: torch.full_like(tensors[first], torch.nan)}
    if kind == "count" and name == "num_lambda_processed":
        return {**tensors, first: torch.zeros_like(tensors[first])}
    if kind == "other":
        return {f"transformer.{key}": value for key, value in tensors.items()}
    return tensors


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", r"lambda_matrix.safetensors holds nothing of gpt_neox"),
        ("nan", r"lambda_matrix.safetensors: gpt_neox.* is not finite"),
        ("count", r"was fitted on 0 sequences"),
        ("other", r"holds no factors of gpt_neox.*only of transformer\.gpt_neox"),
    ],
)
def test_unusable_factors_are_refused_by_file_and_module(
    kind: str, message: str, rewritten: Callable[..., Path]
) -> None:
    folder = rewritten(lambda name, tensors: broken(kind, name, tensors))
    with pytest.raises(ValueError, match=message):
        check_factors(folder, shapes_of(tiny_model("gpt_neox")))


def test_a_name_that_two_wrapped_modules_share_is_refused(rewritten: Callable[..., Path]) -> None:
    def twice(_: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {f"{wrap}.{key}": value.clone() for wrap in ("module", "_orig_mod") for key, value in tensors.items()}

    with pytest.raises(ValueError, match=r"more than once: _orig_mod\.gpt_neox.*, module\.gpt_neox"):
        check_factors(rewritten(twice), shapes_of(tiny_model("gpt_neox")))


def test_factors_of_another_width_are_refused(fitted: Path) -> None:
    shapes = {name: (rows, columns + 1) for name, (rows, columns) in shapes_of(tiny_model("gpt_neox")).items()}
    with pytest.raises(ValueError, match=r"has shape .* this proxy needs"):
        check_factors(fitted, shapes)


def test_a_damaged_file_of_factors_is_named(fitted: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(fitted, tmp_path / "cut")
    path = folder / "lambda_matrix.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"lambda_matrix\.safetensors is no safetensors file, or it is damaged"):
        check_factors(folder, shapes_of(tiny_model("gpt_neox")))


def test_the_analysis_folder_instead_of_its_factors_is_refused(fitted: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"name the folder factors_<name> itself"):
        check_factors(fitted.parent, shapes_of(tiny_model("gpt_neox")))


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run of two shards with a corpus and scores, the scores of two behaviours."""
    generator = np.random.default_rng(0)
    index = np.arange(T)
    for name, verb, inputs in (("corpus", "pack_corpus", {}), ("scores", "score_corpus", {"corpus": "c" * 64})):
        folder = tmp_path / "run" / name
        artifact = open_artifact(folder, verb=verb, options={}, inputs=inputs, config_yaml="")
        for shard, rows in enumerate((range(3), range(3, NUM_BLOCKS))):
            ids = pa.array(rows, pa.int64())
            lengths = np.array([LENGTHS[row] for row in rows], np.int32)
            if name == "corpus":
                schema = schemas.blocks(T, annotated=False)
                tokens = generator.integers(3, 40, (len(rows), T)).astype(np.int32)
                arrays = [ids, pa.array(lengths), schemas.per_token_column(tokens, schema, "tokens")]
            else:
                schema = schemas.scores(T, [OWN, "insult"])
                valid = (index >= 1) & (index < lengths[:, None])
                values = [
                    np.where(valid, generator.normal(size=(len(rows), T)), 0).astype(np.float32) for _ in range(2)
                ]
                columns = zip(schema.names[1:], values, strict=True)
                arrays = [ids, *(schemas.per_token_column(array, schema, column) for column, array in columns)]
            pq.write_table(pa.Table.from_arrays(arrays, schema=schema), folder / f"shard-{shard:05d}.parquet")
        summary = {"block_size": T} if name == "corpus" else {"attribution": "position"}
        artifact.finish(folder.glob("*.parquet"), rows={"blocks": NUM_BLOCKS}, summary=summary)
    return tmp_path / "run"


def stored_scores(run_dir: Path, column: str) -> np.ndarray:
    tables = [schemas.read_table(path) for path in sorted((run_dir / "scores").glob("*.parquet"))]
    return np.concatenate([schemas.per_token_array(table, column) for table in tables])


@pytest.mark.parametrize("behaviour", [OWN, "insult"])
def test_kronfluences_loaders_give_the_scores_one_position_earlier(
    behaviour: str, run_dir: Path, tmp_path: Path
) -> None:
    arguments = ["export-scores", str(run_dir), str(tmp_path / "analysis"), "--name", "ours"]
    assert main(arguments + (["--behaviour", behaviour] if behaviour != OWN else [])) == 0
    stored = torch.from_numpy(stored_scores(run_dir, schemas.score_column(behaviour)))
    analyzer = analyzer_of(tiny_model("gpt_neox"), tmp_path)
    loaded = analyzer.load_pairwise_scores("ours")
    State._reset_state()
    assert loaded is not None
    assert set(loaded) == {"all_modules"}
    exported = loaded["all_modules"]
    assert exported.shape == (1, NUM_BLOCKS, T)
    assert torch.equal(exported[0, :, :-1], stored[:, 1:])
    assert bool((exported[:, :, -1] == 0).all())
    assert bool((exported[0, -1, LENGTHS[-1] - 1 :] == 0).all())
    folder = tmp_path / "analysis" / "scores_ours"
    assert torch.equal(load_pairwise_scores(folder)["all_modules"], exported)
    score_arguments = analyzer.load_score_args("ours")
    assert score_arguments is not None
    assert score_arguments.compute_per_token_scores
    with safe_open(folder / "pairwise_scores.safetensors", framework="pt") as file:
        metadata = file.metadata()
    assert "predicting token t + 1" in metadata["alignment"]
    assert metadata["scores"] == read_manifest(run_dir / "scores").fingerprint


def test_an_export_is_refused_beyond_its_size_twice_or_of_an_unknown_behaviour(run_dir: Path, tmp_path: Path) -> None:
    options = {"name": "ours", "behaviour": OWN, "max_gigabytes": 1.0}
    with pytest.raises(ValueError, match=r"5 blocks of 6 scores are .* more than --max-gigabytes 1e-07"):
        export_scores(run_dir, tmp_path, **{**options, "max_gigabytes": 1e-7})
    with pytest.raises(ValueError, match=r"'rudeness' was not scored; .* holds own, insult"):
        export_scores(run_dir, tmp_path, **{**options, "behaviour": "rudeness"})
    export_scores(run_dir, tmp_path, **options)
    with pytest.raises(FileExistsError, match=r"scores_ours exists"):
        export_scores(run_dir, tmp_path, **options)


@pytest.mark.parametrize("name", ["../ours", "a/b", "", "/tmp/ours", ".."])
def test_an_export_stays_in_its_folder(run_dir: Path, tmp_path: Path, name: str) -> None:
    before = set(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=r"^--name: .* names a folder in"):
        export_scores(run_dir, tmp_path / "out", name=name, behaviour=OWN, max_gigabytes=1.0)
    assert set(tmp_path.rglob("*")) == before


def test_an_export_of_changed_scores_names_the_file(run_dir: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run_dir, copy)
    path = data_files(copy / "scores")[-1]
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=path.name):
        export_scores(copy, tmp_path / "out", name="ours", behaviour=OWN, max_gigabytes=1.0)
    assert not list((tmp_path / "out").glob("*/*.safetensors"))


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
    with pytest.raises(ValueError, match=r"m\.pt does not say which tokens it masks: name .* --tokens FILE"):
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
