"""A small run, whose inputs lie behind a secret: none of its files holds that, and none is damaged in silence."""

from __future__ import annotations

import argparse
import contextlib
import io
import json

import fsspec
import pyarrow.parquet as pq
import pytest

from bench.attack import Attack, attack, readers_of
from ifguide.demo import generate_demo

pytestmark = pytest.mark.slow

SECRET = "planted-s3cr3t"
BUCKET = f"memory://key:{SECRET}@bucket"


@pytest.fixture(scope="module")
def subject(cluster: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Attack, str]:
    """The run, and all that was logged and printed meanwhile."""
    data = tmp_path_factory.mktemp("data")
    generate_demo(data, seed=3, documents=140, vocab_size=512, queries=40, prompts=20, cloze=10)
    for path in data.glob("*.jsonl"):
        fsspec.filesystem("memory").pipe(f"{BUCKET}/{path.name}", path.read_bytes())
    overrides = [
        f"pack_corpus.inputs=[{{path: '{BUCKET}/corpus.jsonl', spans_column: toxic_spans}}]",
        f"build_query.prompts={BUCKET}/queries.jsonl",
        f"evaluate.prompts={BUCKET}/prompts?token={SECRET}&of=.jsonl",
        f"evaluate.heldout=[{BUCKET}/heldout.jsonl]",
        f"evaluate.cloze={BUCKET}/cloze.jsonl",
    ]
    fsspec.filesystem("memory").pipe(
        f"{BUCKET}/prompts?token={SECRET}&of=.jsonl", (data / "prompts.jsonl").read_bytes()
    )
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        made = Attack(tmp_path_factory.mktemp("attack"), overrides)
    return made, said.getvalue()


def test_a_secret_of_the_config_is_in_no_file_of_a_whole_run_and_in_no_line(subject: tuple[Attack, str]) -> None:
    made, said = subject
    assert SECRET in str(made.config)
    assert "pack_corpus" in said
    assert SECRET not in said
    files = [path for path in made.pristine.rglob("*") if path.is_file()]
    assert len(files) > 100
    for path in files:
        assert SECRET not in path.name
        assert SECRET.encode() not in path.read_bytes(), path
        if path.suffix == ".parquet":  # else compressed columns would hide it
            assert SECRET not in json.dumps(pq.read_table(path).to_pylist(), default=str), path
            assert SECRET not in str(pq.read_metadata(path).metadata), path
    assert "***@bucket" in (made.pristine / "report" / "index.html").read_text(encoding="utf-8")


def test_a_flipped_bit_in_every_twelfth_file_is_never_silent(subject: tuple[Attack, str]) -> None:
    made, _ = subject
    counts = attack(made, argparse.Namespace(ways=["flip"], only=[], every=12))
    damaged = [name for name in made.files() if readers_of(name)][::12]
    assert counts["damages"] == sum(len(readers_of(name)) for name in damaged) >= 15
    assert (counts["silent"], counts["unnamed"], counts["crashed"]) == (0, 0, 0)
