"""kronfluence's own Analyzer writes the factors that are read, and reads the scores that are written."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import FactorArguments
from kronfluence.score.pairwise import load_pairwise_scores
from kronfluence.utils.state import State
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from ifguide import schemas
from ifguide.artifacts import data_files, read_manifest
from ifguide.cli import main
from ifguide.config import OWN
from ifguide.influence.factors import NextTokenTask
from ifguide.influence.query import load_factors
from ifguide.interchange import FACTOR_FILES, check_factors, export_scores
from ifguide.models import tracked_modules
from tests.tiny import random_blocks, tiny_model
from tests.unit.interchange.conftest import LENGTHS, NUM_BLOCKS, T


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


def test_scores_in_a_store_are_exported_too(run_dir: Path, store: Path, tmp_path: Path) -> None:
    for path in (run_dir / "scores").iterdir():
        (store / "scores" / path.name).write_bytes(path.read_bytes())
    assert main(["export-scores", str(store), str(tmp_path / "theirs")]) == 0
    folder = export_scores(run_dir, tmp_path / "ours", name="ifguide", behaviour=OWN, max_gigabytes=1.0)
    ours, theirs = (load_pairwise_scores(place)["all_modules"] for place in (folder, tmp_path / "theirs" / folder.name))
    assert torch.equal(ours, theirs)


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
