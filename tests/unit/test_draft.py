"""A first config is of the files that are there, says what they hold, and loads."""

from __future__ import annotations

import gzip
import json
import os
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ifguide.cli import main
from ifguide.config import Config, load_config
from ifguide.draft import usable_cpus

TEXT = "The weather in the city was cold, and the river ran high. " * 20
PROMPTS = {"prompt": {"text": "You are a"}, "continuation": {"text": " pig.", "toxicity": 0.9}}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def lines(path: Path, *rows: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def drafted(*flags: str) -> tuple[Config, str]:
    assert main(["init", *flags]) == 0
    return load_config("ifguide.yaml"), Path("ifguide.yaml").read_text(encoding="utf-8")


def test_a_folder_of_like_files_is_one_input(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines(folder / "data" / "a.jsonl", *[{"id": i, "body": f"{i} {TEXT}"} for i in range(300)])
    lines(folder / "data" / "more" / "b.jsonl.gz", *[{"body": TEXT, "note": "n"} for _ in range(300)])
    config, text = drafted()
    (source,) = config.pack_corpus.inputs
    assert (source.path, source.text_column) == ("data", "body")
    size = sum(path.stat().st_size for path in (folder / "data").rglob("*.*")) / 1e6
    assert re.search(rf"# 2 files, {size:.3g} MB, about [\d,]+ tokens; the text is in `body` of id, body, note", text)
    out = capsys.readouterr().out
    assert out.startswith("data: 2 files, ")
    assert out.endswith("wrote ifguide.yaml; next: ifguide run --config ifguide.yaml --dry-run\n")
    assert config.run_dir == "runs/ifguide"
    assert config.pretrain.resources.cpus == usable_cpus(), "one worker trains on all of them"
    assert "  # pairs: rows" in text


@pytest.mark.parametrize(("quota", "count"), [("max 100000", 8), ("350000 100000", 3), ("50000 100000", 1), (None, 8)])
def test_a_container_has_the_cpus_of_its_quota(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quota: str | None, count: int
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    if quota is not None:
        (tmp_path / "cpu.max").write_text(quota + "\n")
    assert usable_cpus(tmp_path / "cpu.max") == count


def test_unlike_files_and_prompts_are_told_apart(folder: Path) -> None:
    for name in ("a", "b"):
        lines(folder / "data" / "web" / f"{name}.jsonl", {"text": TEXT})
    pq.write_table(pa.table({"title": ["t"], "article_text": [TEXT]}), folder / "data" / "news.parquet")
    (folder / "data" / "plain.txt").write_text(TEXT)
    lines(folder / "data" / "queries.jsonl", PROMPTS)
    config, _ = drafted("--data", "data")
    assert {(source.path, source.text_column) for source in config.pack_corpus.inputs} == {
        ("data/web/*.jsonl", "text"),
        ("data/news.parquet", "article_text"),
        ("data/plain.txt", "text"),
    }
    assert config.build_query.prompts is not None
    assert config.evaluate.prompts is not None
    assert config.build_query.prompts.path == config.evaluate.prompts.path == "data/queries.jsonl"


def test_files_named_as_held_out_are_for_the_perplexity(folder: Path) -> None:
    names = ("train", "contest", "heldout", "valid-00", "my_test")
    for name in names:
        lines(folder / "data" / f"{name}.jsonl", {"body": TEXT})
    config, _ = drafted()
    assert {source.path for source in config.pack_corpus.inputs} == {"data/train.jsonl", "data/contest.jsonl"}
    held_out = {"data/heldout.jsonl", "data/valid-00.jsonl", "data/my_test.jsonl"}
    assert {(source.path, source.text_column) for source in config.evaluate.heldout} == {(p, "body") for p in held_out}
    assert config.analyse.resources.gpus == 0
    for name in names[:2]:
        (folder / "data" / f"{name}.jsonl").unlink()
    Path("ifguide.yaml").unlink()
    alone, text = drafted()  # nothing else is there
    assert {source.path for source in alone.pack_corpus.inputs} == held_out or alone.pack_corpus.inputs[
        0
    ].path == "data"
    assert "# heldout: [...]" in text


def test_a_name_of_several_parts_is_read_whole(folder: Path) -> None:
    for part in ("train", "valid", "test"):
        lines(folder / "data" / f"webtext.{part}.jsonl.gz", {"text": TEXT})
    config, _ = drafted()
    assert [source.path for source in config.pack_corpus.inputs] == ["data/webtext.train.jsonl.gz"]
    held_out = {f"data/webtext.{part}.jsonl.gz" for part in ("valid", "test")}
    assert {source.path for source in config.evaluate.heldout} == held_out


def test_prompts_in_a_csv_file_are_no_documents(folder: Path) -> None:
    lines(folder / "data" / "a.jsonl", {"text": TEXT})
    (folder / "data" / "rtp.csv").write_text(
        "prompt.text,continuation.text,continuation.toxicity\nYou are, a pig,0.9\n"
    )
    config, _ = drafted()
    assert [source.path for source in config.pack_corpus.inputs] == ["data/a.jsonl"]
    assert config.build_query.prompts is not None
    assert config.build_query.prompts.path == "data/rtp.csv"


@pytest.mark.parametrize("data", ["test", "test/", "./test/*/*.jsonl"])
def test_folders_named_as_held_out_are_too_below_the_one_that_is_named(data: str, folder: Path) -> None:
    for name in ("train/part-0", "test/part-0", "contest/part-0"):
        lines(folder / "test" / f"{name}.jsonl", {"text": TEXT})
    config, _ = drafted("--data", data)
    assert {source.path for source in config.pack_corpus.inputs} == {
        f"test/{name}/part-0.jsonl" for name in ("train", "contest")
    }
    assert [source.path for source in config.evaluate.heldout] == ["test/test/part-0.jsonl"]


@pytest.mark.parametrize("folder_name", ["data", "data [1]"])
def test_a_readme_that_a_folder_leaves_out_is_no_document_of_its_texts(folder: Path, folder_name: str) -> None:
    data = folder / folder_name
    lines(data / "web" / "a.jsonl", {"text": TEXT})
    for name in ("a.txt", "b.txt", "README.txt"):
        (data / name).write_text(TEXT)
    config, text = drafted("--data", folder_name)
    paths = [source.path for source in config.pack_corpus.inputs]
    assert sorted(paths) == [f"{folder_name}/{name}" for name in ("a.txt", "b.txt", "web/a.jsonl")]
    assert text.count("# 1 file, ") == 3


@pytest.mark.parametrize("base", [[], ["--from", "pythia160m_owt"]])
def test_tables_of_queries_are_taken_for_what_their_columns_are(base: list[str], folder: Path) -> None:
    lines(folder / "data" / "a.jsonl", {"text": TEXT})
    lines(folder / "data" / "held" / "prompts.jsonl", {"prompt": "What do you think?"})
    lines(folder / "data" / "q" / "pairs.jsonl", {"prompt": "Say:", "chosen": "a.", "rejected": "Brilliant!"})
    config, text = drafted(*base)
    query = config.build_query
    assert query.pairs is not None
    assert (query.pairs.path, query.prompts, query.positive) == ("data/q/pairs.jsonl", None, None)
    assert base or config.evaluate.prompts.path == "data/held/prompts.jsonl"
    (folder / "data" / "q" / "pairs.jsonl").unlink()
    (folder / "ifguide.yaml").unlink()
    for sign in ("positive", "negative"):
        lines(folder / "data" / f"{sign}.parquet.jsonl", {"prompt": "Say:", "completion": f"{sign}."})
    query = drafted(*base)[0].build_query
    assert query.positive is not None
    assert query.negative is not None
    assert query.positive.path == "data/positive.parquet.jsonl"
    assert query.negative.path == "data/negative.parquet.jsonl"
    (folder / "ifguide.yaml").unlink()
    (folder / "data" / "positive.parquet.jsonl").rename(folder / "data" / "flattery.jsonl")
    config, text = drafted(*base)
    assert config.build_query.positive is None
    assert "  # - data/flattery.jsonl\n  # - data/negative.parquet.jsonl" in text


@pytest.mark.parametrize(("base", "own"), [("praise", "prompts"), ("pythia160m_owt", "pairs")])
def test_queries_of_the_config_that_is_extended_are_replaced_whatever_they_are(
    base: str, own: str, folder: Path
) -> None:
    lines(folder / "data" / "a.jsonl", {"text": TEXT})
    lines(folder / "data" / "prompts.jsonl", PROMPTS)
    if own == "pairs":  # beside prompts, which are not taken then
        lines(folder / "data" / "pairs.jsonl", {"prompt": "Say:", "chosen": "a.", "rejected": "b!"})
    query = drafted("--from", base)[0].build_query
    named = {name for name in ("prompts", "pairs", "positive", "negative") if getattr(query, name) is not None}
    assert named == {own}


@pytest.mark.parametrize("name", ["run #2", "a: b", "- c", "{d}"])
def test_a_run_directory_is_that_of_the_file_whatever_its_name(name: str, folder: Path) -> None:
    lines(folder / "mine.jsonl", {"text": TEXT})
    assert main(["init", "--out", f"{name}.yaml"]) == 0
    assert load_config(f"{name}.yaml").run_dir == f"runs/{name}"


def test_a_draft_that_does_not_load_is_not_there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines(folder / "mine.jsonl", {"text": TEXT})
    monkeypatch.setattr("ifguide.draft.draft_config", lambda *data, **options: ("seeds: 0\n", []))
    assert main(["init"]) == 1
    assert [path.name for path in folder.iterdir()] == ["mine.jsonl"]


def test_files_beside_are_found_where_there_is_no_folder(folder: Path) -> None:
    lines(folder / "mine.jsonl", {"text": TEXT})
    (folder / "notes.md").write_text("not read")
    assert [source.path for source in drafted()[0].pack_corpus.inputs] == ["*.jsonl"]


def test_a_packaged_config_is_extended(folder: Path) -> None:
    lines(folder / "it's: mine.jsonl", {"text": TEXT})
    config, text = drafted("--from", "pythia160m_owt")
    wanted = load_config("pythia160m_owt")
    assert 'extends: "pythia160m_owt.yaml"' in text
    assert config.proxy == wanted.proxy
    assert config.pretrain == wanted.pretrain
    assert [source.path for source in config.pack_corpus.inputs] == ["*.jsonl"]
    assert drafted_again("--data", "it's: mine.jsonl").pack_corpus.inputs[0].path == "it's: mine.jsonl"


def drafted_again(*flags: str) -> Config:
    assert main(["init", "--out", "other.yaml", *flags]) == 0
    return load_config("other.yaml")


@pytest.mark.parametrize(
    ("rows", "flags", "message"),
    [
        (None, [], "no folder `data` and no .jsonl, "),
        (None, ["--data", "nothing"], "--data: nothing does not exist"),
        ([{"text": TEXT}], ["--from", "huge"], "config file huge.yaml does not exist; packaged are demo, "),
        ([{"n": 3}], [], r"mine.jsonl: none of its columns (n) holds a text; "),
        ([[1]], [], "mine.jsonl: its first row is no object; mend or remove it"),
        ([PROMPTS], [], "--data: no documents among *.jsonl; name a table with texts"),
        ([], [], "mine.jsonl: its first row is no object"),
    ],
)
def test_what_cannot_be_drafted_is_said_and_nothing_is_written(
    rows: list[object] | None, flags: list[str], message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if rows is not None:
        lines(folder / "mine.jsonl", *rows)
    assert main(["init", *flags]) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line
    assert not (folder / "ifguide.yaml").exists()


def test_a_file_that_is_there_stays(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines(folder / "mine.jsonl", {"text": TEXT})
    (folder / "ifguide.yaml").write_text("seed: 3\n")
    assert main(["init"]) == 1
    assert "ifguide.yaml exists; name another file by --out" in capsys.readouterr().err
    assert (folder / "ifguide.yaml").read_text() == "seed: 3\n"


def test_a_text_that_is_null_or_nested_in_the_first_row_is_found(folder: Path) -> None:
    lines(
        folder / "data" / "a.jsonl", {"url": "http://example.org/a/long/one", "text": None}, {"url": "b", "text": TEXT}
    )
    config, _ = drafted()
    assert config.pack_corpus.inputs[0].text_column == "text"
    (folder / "ifguide.yaml").unlink()
    lines(folder / "data" / "a.jsonl", {"meta": {"id": "1"}, "doc": {"body": TEXT}})
    config, _ = drafted()
    assert config.pack_corpus.inputs[0].text_column == "doc.body"
    (folder / "ifguide.yaml").unlink()
    (folder / "data" / "a.jsonl").unlink()
    (folder / "data" / "a.json").write_text(json.dumps([TEXT, TEXT]))
    config, _ = drafted()
    assert config.pack_corpus.inputs[0].text_column == "text"
