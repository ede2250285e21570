"""Scores of bergson and kronfluence become a run's own, one position later, if they are of its blocks."""

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
import yaml
from safetensors.torch import load_file, save_file

from ifguide import schemas
from ifguide.artifacts import MismatchError, data_files, read_manifest, remove_tree
from ifguide.cli import main
from ifguide.config import OWN, BuildMask, Config, Input, config_from_mapping
from ifguide.interchange import export_scores
from ifguide.pipeline import pipeline_steps
from ifguide.run import Run
from ifguide.score_import import import_scores, read_scores
from ifguide.selection.masks import make_mask
from tests.exported import make_run
from tests.sharded import in_any_order
from tests.tokenizers import tokenizers
from tests.unit.interchange.conftest import LENGTHS, NUM_BLOCKS, T
from tests.unit.interchange.test_masks import blocks_of

Scores = list[np.ndarray]


def bergson_folder(folder: Path, scores: Scores, *, queries: int = 1, padded: bool = False, **config: Any) -> Path:
    """As bergson writes it: `scores` of each sequence, (positions, queries), in records of pairs with a flag."""
    folder.mkdir()
    size = 4 + 1
    pair = 1 << (size - 1).bit_length()
    names = [name for q in range(queries) for name in (f"score_{q}", f"written_{q}")]
    layout = {
        "names": names,
        "formats": ["float32", "bool"] * queries,
        "offsets": [place for q in range(queries) for place in (q * pair, q * pair + 4)],
        "itemsize": ((queries * pair + 7) // 8) * 8,
    }
    rows = [np.pad(each, ((0, T - 1 - len(each) if padded else 0), (0, 0))) for each in scores]
    records = np.zeros(sum(map(len, rows)), np.dtype(layout))  # type: ignore[call-overload]
    for query in range(queries):
        records[f"score_{query}"] = np.concatenate(rows)[:, query]
        records[f"written_{query}"] = True
    records.tofile(folder / "scores.bin")
    np.save(folder / "offsets.npy", np.cumsum([0, *map(len, rows)]))
    info = {"attribute_tokens": True, "num_items": len(rows), "num_rows": len(records), "num_scores": queries}
    (folder / "info.json").write_text(json.dumps({**info, "dtype": layout}))
    if config:
        (folder / "config.yaml").write_text(yaml.safe_dump({"steps": [{"score": {"score_cfg": config}}]}))
    return folder


@pytest.fixture
def scores() -> Scores:
    """Of two queries: position t of each block but its last."""
    rng = np.random.default_rng(1)
    return [rng.normal(size=(length - 1, 2)).astype(np.float32) for length in LENGTHS]


@pytest.fixture
def importing(run_dir: Path) -> Callable[..., np.ndarray]:
    """Imports a folder and gives the run's scores, (blocks, tokens)."""
    remove_tree(run_dir / "scores")
    tokens = blocks_of(run_dir, run_dir / "chunks.parquet")

    def go(path: Path, **options: Any) -> np.ndarray:
        given = {"query": None, "negate": False, "tokens": tokens, **options}
        import_scores(path, corpus=run_dir / "corpus", folder=run_dir / "scores", config_yaml="seed: 0\n", **given)
        tables = [schemas.read_table(file, schemas.scores(T)) for file in data_files(run_dir / "scores")]
        assert sum(len(table) for table in tables) == NUM_BLOCKS
        return np.concatenate([schemas.per_token_array(table, schemas.OWN_SCORES) for table in tables])

    return go


def expected(scores: Scores, query: int, sign: int = 1) -> np.ndarray:
    whole = np.zeros((NUM_BLOCKS, T), np.float32)
    for block, each in enumerate(scores):
        whole[block, 1 : len(each) + 1] = sign * each[:, query]
    return whole


@pytest.mark.parametrize("padded", [False, True])
def test_bergsons_scores_speak_of_the_next_token(
    padded: bool, scores: Scores, importing: Callable[..., np.ndarray], run_dir: Path, tmp_path: Path
) -> None:
    folder = bergson_folder(tmp_path / "b", scores, queries=2, padded=padded)
    np.testing.assert_array_equal(importing(folder, query=1), expected(scores, 1))
    manifest = read_manifest(run_dir / "scores")
    assert manifest.inputs["corpus"] == read_manifest(run_dir / "corpus").fingerprint
    assert manifest.summary["made_by"] == "bergson"
    assert manifest.summary["score_max"] == pytest.approx(max(each[:, 1].max() for each in scores))


@pytest.mark.parametrize(
    ("config", "negate", "sign"),
    [({"higher_is_better": False}, False, -1), ({"higher_is_better": True}, True, -1),
     ({"higher_is_better": False}, True, 1), ({"score": "individual"}, False, 1)],
)  # fmt: skip
def test_scores_of_the_other_sign_are_turned(
    config: dict[str, Any],
    negate: bool,
    sign: int,
    scores: Scores,
    importing: Callable[..., np.ndarray],
    tmp_path: Path,
) -> None:
    folder = bergson_folder(tmp_path / "b", [each[:, :1] for each in scores], **config)
    np.testing.assert_array_equal(importing(folder, negate=negate), expected(scores, 0, sign))


def test_scores_whose_config_turns_them_are_others(
    scores: Scores, importing: Callable[..., np.ndarray], tmp_path: Path
) -> None:
    own = [each[:, :1] for each in scores]
    importing(bergson_folder(tmp_path / "b", own, higher_is_better=True))
    turned = bergson_folder(tmp_path / "turned", own, higher_is_better=False)
    with pytest.raises(MismatchError, match=r"import_scores\.sign"):
        importing(turned)
    np.testing.assert_array_equal(importing(turned, negate=True), expected(scores, 0))  # the same as before


@pytest.mark.parametrize("behaviour", [OWN, "insult"])
def test_what_was_exported_for_kronfluence_comes_back(behaviour: str, run_dir: Path, tmp_path: Path) -> None:
    before = [schemas.read_table(path) for path in data_files(run_dir / "scores")]
    exported = export_scores(run_dir, tmp_path, name="ours", behaviour=behaviour, max_gigabytes=1.0)
    remove_tree(run_dir / "scores")
    tokens = blocks_of(run_dir, tmp_path / "chunks.parquet")
    folders = {"corpus": run_dir / "corpus", "folder": run_dir / "scores"}
    import_scores(exported, **folders, tokens=tokens, query=None, negate=False, config_yaml="seed: 0\n")
    after = [schemas.read_table(path) for path in data_files(run_dir / "scores")]
    for old, new in zip(before, after, strict=True):
        own = schemas.per_token_array(new, schemas.OWN_SCORES)
        np.testing.assert_array_equal(own, schemas.per_token_array(old, schemas.score_column(behaviour)))
        assert new.column("block_id").equals(old.column("block_id"))


def test_scores_of_several_modules_are_added(
    scores: Scores, importing: Callable[..., np.ndarray], tmp_path: Path
) -> None:
    values = torch.from_numpy(np.stack([np.pad(each, ((0, T - len(each)), (0, 0))) for each in scores]))
    parts = {"mlp": values.permute(2, 0, 1).contiguous(), "attention": 2 * values.permute(2, 0, 1).contiguous()}
    (tmp_path / "k").mkdir()
    save_file(parts, tmp_path / "k" / "pairwise_scores.safetensors")
    assert load_file(tmp_path / "k" / "pairwise_scores.safetensors")["mlp"].shape == (2, NUM_BLOCKS, T)
    np.testing.assert_allclose(importing(tmp_path / "k", query=1), 3 * expected(scores, 1), rtol=1e-6)


def damage(kind: str, folder: Path) -> None:
    info = json.loads((folder / "info.json").read_text())
    if kind == "whole sequences":
        info["attribute_tokens"] = False
    elif kind == "no counts":
        del info["num_scores"]
        info["num_items"] = None
    elif kind == "cut":
        (folder / "scores.bin").write_bytes((folder / "scores.bin").read_bytes()[:-8])
    elif kind == "no offsets":
        (folder / "offsets.npy").unlink()
    elif kind == "other offsets":
        np.save(folder / "offsets.npy", np.arange(3))
    elif kind == "no json":
        (folder / "info.json").write_text("{")
        return
    else:
        records = np.fromfile(folder / "scores.bin", np.dtype(info["dtype"]))
        records["written_0" if kind == "unwritten" else "score_0"][7] = False if kind == "unwritten" else np.nan
        records.tofile(folder / "scores.bin")
    (folder / "info.json").write_text(json.dumps(info))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("whole sequences", "attribute_tokens"),
        ("no counts", r"info\.json does not say num_scores, num_items; copy the folder again"),
        ("cut", "is damaged"),
        ("no offsets", r"it lacks offsets\.npy"),
        ("other offsets", r"offsets\.npy does not fit"),
        ("no json", r"info\.json is no JSON"),
        ("unwritten", "sequence 1 was not scored"),
        ("not finite", "a score of sequence 1 is not finite"),
    ],
)
def test_unusable_scores_are_said_in_a_line(
    kind: str, message: str, scores: Scores, importing: Callable[..., np.ndarray], tmp_path: Path
) -> None:
    folder = bergson_folder(tmp_path / "b", [each[:, :1] for each in scores])
    damage(kind, folder)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        importing(folder)


def test_scores_of_other_blocks_are_refused(
    scores: Scores, importing: Callable[..., np.ndarray], run_dir: Path, tmp_path: Path
) -> None:
    short = bergson_folder(tmp_path / "short", scores[:-1], queries=2)
    with pytest.raises(ValueError, match=r"scores 4 sequences, .* has 5 blocks"):
        importing(short, query=0)
    folder = bergson_folder(tmp_path / "b", scores, queries=2)
    with pytest.raises(ValueError, match=r"scores of 2 queries: choose one by --query, 0 to 1"):
        importing(folder)
    with pytest.raises(ValueError, match=r"--query 2: "):
        importing(folder, query=2)
    with pytest.raises(ValueError, match="does not say which tokens it is of"):
        importing(folder, query=0, tokens=None)
    others = blocks_of(run_dir, tmp_path / "others.parquet", lambda blocks: [blocks[1], *blocks[1:]])
    with pytest.raises(ValueError, match="is not block 0 of"):
        importing(folder, query=0, tokens=others)
    assert not list((run_dir / "scores").glob("*.parquet"))
    importing(folder, query=0)
    with pytest.raises(MismatchError, match=r"import_scores\.query was 0, now 1"):
        importing(folder, query=1)
    with pytest.raises(FileNotFoundError, match="holds neither"):
        read_scores(tmp_path, None)


def test_a_dry_run_refuses_what_the_command_would(
    scores: Scores, run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    remove_tree(run_dir / "scores")
    folder, short = (
        bergson_folder(tmp_path / name, own, queries=2) for name, own in (("b", scores), ("short", scores[:-1]))
    )
    tokens = Path(blocks_of(run_dir, tmp_path / "blocks.parquet").path)
    others = Path(blocks_of(run_dir, tmp_path / "others.parquet", lambda blocks: [blocks[1], *blocks[1:]]).path)

    def command(place: Path, blocks: Path | None, *options: str, of: Path = run_dir) -> str | None:
        """What a dry run and then the command say where they fail, which must be the same."""
        (tmp_path / "config.yaml").write_text(f"run_dir: {of}\n")
        arguments = ["import-scores", "--config", str(tmp_path / "config.yaml"), str(place), *options]
        arguments += ["--tokens", str(blocks)] if blocks else []
        said = []
        for further in (["--dry-run"], []):
            failed = main([*arguments, *further])
            lines = capsys.readouterr().err.splitlines()
            said.append(lines[-1] if failed else None)
            if further:
                assert not (of / "scores").exists()
        assert said[0] == said[1]
        return said[0]

    for message, said in (
        ("choose one by --query", command(folder, tokens)),
        ("scores 4 sequences, ", command(short, tokens, "--query", "0")),
        ("does not say which tokens it is of", command(folder, None, "--query", "0")),
        ("is not block 0 of", command(folder, others, "--query", "0")),
        ("pack_corpus", command(folder, tokens, "--query", "0", of=tmp_path / "nowhere")),
    ):
        assert said is not None
        assert message in said
    assert command(folder, tokens, "--query", "0") is None
    assert read_manifest(run_dir / "scores").summary["made_by"] == "bergson"


def test_a_mask_is_built_of_imported_scores(tmp_path: Path) -> None:
    texts = ["You are a clown, and everyone knows.", "The lake is calm.", "A pig!", "Cold weather, and wind, too."]
    run_dir = make_run(tmp_path / "run", texts, tokenizers()["bytes"], block_size=16, blocks_per_shard=3)
    remove_tree(run_dir / "mask")
    tables = [schemas.read_table(path) for path in data_files(run_dir / "corpus")]
    lengths = [length for table in tables for length in table.column("length").to_pylist()]
    ids = np.concatenate([schemas.per_token_array(table, "tokens") for table in tables])
    pq.write_table(
        pa.table({"input_ids": [row[:n].tolist() for row, n in zip(ids, lengths, strict=True)]}), tmp_path / "b.parquet"
    )
    rng = np.random.default_rng(2)
    scores = [rng.normal(size=(length - 1, 1)).astype(np.float32) for length in lengths]
    folders = Run(config=Config(run_dir=str(run_dir))).selection
    import_scores(
        bergson_folder(tmp_path / "bergson", scores),
        corpus=folders.corpus,
        folder=folders.scores,
        tokens=Input(path=str(tmp_path / "b.parquet"), tokens_column="input_ids"),
        query=None,
        negate=False,
        config_yaml="seed: 0\n",
    )
    options = BuildMask(quantile=0.9, max_fraction=0.08, window=0)
    made = make_mask(options, folders, config_yaml="seed: 0\n", run_tasks=in_any_order())
    masked = np.concatenate(
        [schemas.per_token_array(schemas.read_table(path), "masked") for path in data_files(folders.mask)]
    )
    own = np.zeros(masked.shape)
    for block, each in enumerate(scores):
        own[block, 1 : len(each) + 1] = each[:, 0]
    assert 0 < masked.sum() == made.rows["tokens"]
    assert own[masked].min() >= made.summary["tau"]


def test_a_run_goes_on_from_scores_of_another_program(
    scores: Scores, importing: Callable[..., np.ndarray], run_dir: Path, tmp_path: Path
) -> None:
    config = config_from_mapping({"run_dir": str(run_dir)})
    verbs = [
        "pack_corpus",
        "pretrain",
        "fit_factors",
        "build_query",
        "score_corpus",
        "build_mask",
        "pretrain",
        "evaluate",
    ]
    assert [verb for verb, _ in pipeline_steps(config)] == verbs
    importing(bergson_folder(tmp_path / "b", scores, queries=2), query=0)
    assert [verb for verb, _ in pipeline_steps(config)] == [
        "pack_corpus", "pretrain", "build_mask", "pretrain", "evaluate"
    ]  # fmt: skip
    assert [verb for verb, _ in pipeline_steps(config, until="build_mask")] == ["pack_corpus", "pretrain", "build_mask"]
    with pytest.raises(ValueError, match="--until score_corpus: import_scores stands for it"):
        pipeline_steps(config, until="score_corpus")
