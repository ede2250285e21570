"""The attack on a finished run: its damages damage, and what each file's readers are."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.attack import WAYS, attacks, damaged, readers_of

VERBS = ("score_corpus", "pretrain", "fit_factors", "evaluate", "inspect")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("alone", [True, False])
def test_every_way_changes_the_contents_and_two_keep_the_size(tmp_path: Path, way: str, alone: bool) -> None:
    path = tmp_path / "shard-00001.parquet"
    path.write_bytes(b"PAR1 some columns PAR1!")
    if not alone:
        (tmp_path / "shard-00000.parquet").write_bytes(b"PAR1 others PAR1")
    content = damaged(path, way)
    assert content != path.read_bytes()
    assert (len(content) == path.stat().st_size) == (way in ("flip", "swap"))
    assert path.read_bytes() == b"PAR1 some columns PAR1!"  # the caller writes it


def test_a_swap_of_two_equal_files_changes_it_all_the_same(tmp_path: Path) -> None:
    for name in ("a.json", "b.json"):
        (tmp_path / name).write_bytes(b"{1: 2}")
    assert damaged(tmp_path / "a.json", "swap") == b"}2 :1{"


@pytest.mark.parametrize(
    ("name", "verbs"),
    [
        ("corpus/shard-00000.parquet", ["score_corpus", "pretrain", "fit_factors", "evaluate", "inspect"]),
        ("scores/shard-00003.parquet", ["build_mask", "evaluate", "inspect", "export-scores"]),
        ("model/baseline/hf/model.safetensors", ["fit_factors", "evaluate"]),
        ("model/penalised/checkpoints/step-00000008/state/rank-0.pt", ["pretrain"]),
        ("generations/baseline/prompts/manifest.json", ["evaluate", "status"]),
        ("report/index.html", []),
    ],
)
def test_the_readers_of_a_file(name: str, verbs: list[str]) -> None:
    assert [reader.verb for reader in readers_of(name)] == verbs


def test_attacks_are_every_file_every_way_to_every_reader_and_each_verb_s_together() -> None:
    files = ["corpus/shard-00000.parquet", "corpus/shard-00001.parquet", "report/index.html"]
    made = [(reader.verb, name[-9], way) for reader, name, way in attacks(files, ["flip", "cut"])]
    both = [(shard, way) for shard in "01" for way in ("flip", "cut")]
    assert made == [(verb, *attack) for verb in VERBS for attack in both]
