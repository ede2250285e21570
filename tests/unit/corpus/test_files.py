"""ifguide.corpus.files: nothing of an input is lost without a word, and nothing else becomes a document."""

import bz2
import gzip
import json
import os
from pathlib import Path

import pyarrow as pa
import pytest

from ifguide.config import Input
from ifguide.corpus.files import list_files, short_names
from ifguide.corpus.reading import list_chunks, read_documents

LINE = json.dumps({"text": "a"}).encode() + b"\n"
COMPRESS = {".gz": gzip.compress, ".bz2": bz2.compress, ".zst": lambda data: pa.compress(data, "zstd", asbytes=True)}


def write(path: Path, content: bytes = LINE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def names(folder: Path, pattern: str = "") -> list[str]:
    return [str(path.relative_to(folder)) for path in list_files(str(folder / pattern), "k")]


def texts(path: Path) -> list[str | None]:
    source = Input(path=str(path))
    chunks = list_chunks(source, 0, chunk_bytes=16, dotted_key="k")
    return [row.reason or row.text for chunk in chunks for row in read_documents(chunk, source, first_row=0)]


def test_what_describes_a_data_set_or_is_hidden_is_never_a_document(tmp_path: Path) -> None:
    for name in (
        "README.md", "readme.txt", "LICENSE", "dataset_infos.json", "a/state.json", "_SUCCESS", ".gitattributes",
        ".git/config.json", ".cache/huggingface/x.json", "a/.ipynb_checkpoints/b.jsonl", "._a.jsonl",
        "_temporary/c.jsonl",
    ):  # fmt: skip
        write(tmp_path / name)
    kept = ["a/b.jsonl", "a/c.JSONL", "d.ndjson", "e.jsonl.gz", "notice.jsonl"]
    for name in kept:
        write(tmp_path / name)
    assert names(tmp_path) == kept


@pytest.mark.parametrize("other", ["b.csv", "a/data-00000-of-00001.arrow", "README.jsonl.xz", "noname", "c.parquet.gz"])
def test_a_folder_with_any_other_file_is_refused_and_the_file_named(tmp_path: Path, other: str) -> None:
    write(tmp_path / "a.jsonl")
    write(tmp_path / other)
    with pytest.raises(ValueError, match=rf"^k: not read are .*{other}; what is read ends in .jsonl, .ndjson"):
        list_files(str(tmp_path), "k")
    assert names(tmp_path, "*.jsonl") == ["a.jsonl"]


def test_links_are_followed_within_a_folder_and_out_of_it(tmp_path: Path) -> None:
    write(tmp_path / "elsewhere" / "b.jsonl")
    write(tmp_path / "ds" / "disk1" / "a.jsonl")
    os.symlink("../elsewhere", tmp_path / "ds" / "disk2")
    os.symlink("disk1/a.jsonl", tmp_path / "ds" / "c.jsonl")
    assert names(tmp_path / "ds") == ["c.jsonl", "disk1/a.jsonl", "disk2/b.jsonl"]
    assert sorted(names(tmp_path / "ds", "**/*.jsonl")) == names(tmp_path / "ds")
    assert names(tmp_path / "ds", "disk*") == ["disk1/a.jsonl", "disk2/b.jsonl"]


def test_links_in_a_circle_and_to_nothing_are_named(tmp_path: Path) -> None:
    write(tmp_path / "a" / "a.jsonl")
    os.symlink("..", tmp_path / "a" / "up")
    with pytest.raises(ValueError, match=r"^k: .*a/up is a link to a folder that holds it"):
        list_files(str(tmp_path), "k")
    (tmp_path / "a" / "up").unlink()
    os.symlink("gone.jsonl", tmp_path / "a" / "b.jsonl")
    with pytest.raises(FileNotFoundError, match=r"^k: .*a/b.jsonl is a link to nothing"):
        list_files(str(tmp_path), "k")


@pytest.mark.parametrize("suffix", sorted(COMPRESS))
def test_compressed_files_give_the_rows_of_the_plain_ones(tmp_path: Path, suffix: str) -> None:
    lines = b"".join(json.dumps({"text": f"row {i}"}).encode() + b"\n" for i in range(5000))
    assert texts(write(tmp_path / f"a.jsonl{suffix}", COMPRESS[suffix](lines))) == [f"row {i}" for i in range(5000)]
    assert texts(write(tmp_path / f"a.json{suffix.upper()}", COMPRESS[suffix](LINE + LINE))) == ["a", "a"]
    assert texts(write(tmp_path / f"a.txt{suffix}", COMPRESS[suffix](b"hello"))) == ["hello"]


def test_a_compressed_file_of_several_members_is_read_to_its_end(tmp_path: Path) -> None:
    assert texts(write(tmp_path / "a.jsonl.gz", gzip.compress(LINE) + gzip.compress(LINE))) == ["a", "a"]


@pytest.mark.parametrize("suffix", sorted(COMPRESS))
def test_a_compressed_file_that_is_cut_off_is_named(tmp_path: Path, suffix: str) -> None:
    content = COMPRESS[suffix](os.urandom(40_000).hex().encode())
    for name in ("a.jsonl", "a.txt"):
        with pytest.raises(ValueError, match=rf"{name}{suffix}: damaged or cut off"):
            texts(write(tmp_path / f"{name}{suffix}", content[: len(content) // 2]))


def test_files_of_one_name_are_told_apart_and_a_moved_folder_keeps_its_names() -> None:
    paths = ["/data/x/10/000.jsonl", "/data/x/18/000.jsonl"]
    moved = [path.replace("/data/x", "/mnt") for path in paths]
    assert list(short_names(paths).values()) == ["10/000.jsonl", "18/000.jsonl"]
    assert list(short_names(moved).values()) == ["10/000.jsonl", "18/000.jsonl"]
    assert short_names(["/data/a.jsonl"]) == {"/data/a.jsonl": "a.jsonl"}
    assert list(short_names(["s3://b/x/a.jsonl", "s3://b/y/a.jsonl"]).values()) == ["x/a.jsonl", "y/a.jsonl"]
    assert len(set(short_names(["s3://b/a.jsonl", "/data/a.jsonl", "a.jsonl"]).values())) == 3
