"""ifguide.records.files: nothing of an input is lost without a word, and nothing else becomes a document."""

import bz2
import gzip
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from datasets import Dataset, DatasetDict

from ifguide.config import Input
from ifguide.corpus.reading import list_chunks, read_documents
from ifguide.records.files import TABLES, list_files, short_names

LINE = json.dumps({"text": "a"}).encode() + b"\n"
COMPRESS = {".gz": gzip.compress, ".bz2": bz2.compress, ".zst": lambda data: pa.compress(data, "zstd", asbytes=True)}


def write(path: Path, content: bytes = LINE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def names(folder: Path, pattern: str = "") -> list[str]:
    return [str(path.relative_to(folder)) for path in list_files(str(folder / pattern), "k")]


def texts(path: Path, **options: Any) -> list[str]:
    source = Input(path=str(path), **options)
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


@pytest.mark.parametrize(
    "other", ["b.xlsx", "a/data-00000-of-00001.arrows", "README.jsonl.xz", "noname", "c.parquet.gz"]
)
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


def test_a_pattern_enters_no_circle_and_leaves_no_link_to_nothing_out(tmp_path: Path) -> None:
    write(tmp_path / "a" / "a.jsonl")
    os.symlink("gone.jsonl", tmp_path / "a" / "b.jsonl")
    with pytest.raises(FileNotFoundError, match=r"^k: .*a/b.jsonl is a link to nothing"):
        list_files(str(tmp_path / "a" / "*.jsonl"), "k")
    (tmp_path / "a" / "b.jsonl").unlink()
    assert names(tmp_path, "**/*.jsonl") == ["a/a.jsonl"]
    for target in ("..", "."):
        os.symlink(target, tmp_path / "a" / "up")
        with pytest.raises(ValueError, match=r"^k: .* goes through a link to a folder that holds it"):
            list_files(str(tmp_path / "**" / "*.jsonl"), "k")
        (tmp_path / "a" / "up").unlink()
    os.symlink("b", tmp_path / "a" / "b")
    with pytest.raises(FileNotFoundError, match=r"^k: .*a/b is a link to nothing"):
        list_files(str(tmp_path), "k")


def test_a_pattern_that_finds_a_file_in_several_ways_takes_it_once(tmp_path: Path) -> None:
    for name in ("en/a/en/b.jsonl", "en/c.jsonl", "de/d.jsonl"):
        write(tmp_path / name)
    assert names(tmp_path, "**/en/**/*.jsonl") == ["en/a/en/b.jsonl", "en/c.jsonl"]


@pytest.mark.parametrize("remote", [False, True])
def test_a_folder_that_is_matched_below_any_number_of_folders_is_taken(
    remote: bool, tmp_path: Path, store: Path
) -> None:
    folder = (store if remote else tmp_path) / "docs"
    for name in ("a/en/x.jsonl", "a/en/en2/y.jsonl", "b/en.jsonl", "b/de/en/README.md", "b/de/z.jsonl"):
        write(folder / name)
    taken = [str(path)[len(str(folder)) + 1 :] for path in list_files(f"{folder}/**/en*", "k")]
    assert taken == ["a/en/en2/y.jsonl", "a/en/x.jsonl", "b/en.jsonl"]


@pytest.mark.parametrize("remote", [False, True])
def test_a_pattern_takes_what_is_hidden_where_it_names_it(remote: bool, tmp_path: Path, store: Path) -> None:
    folder = (store if remote else tmp_path) / ".hidden"
    for name in ("a.jsonl", ".b.jsonl", ".git/c.jsonl", ".git/.d/e.jsonl", "f/g.jsonl"):
        write(folder / name)

    def taken(pattern: str) -> list[str]:
        return [str(path)[len(str(folder)) + 1 :] for path in list_files(f"{folder}/{pattern}", "k")]

    assert taken("*.jsonl") == ["a.jsonl"]
    assert taken("**/*.jsonl") == ["a.jsonl", "f/g.jsonl"]
    assert taken("*") == ["a.jsonl", "f/g.jsonl"]
    assert taken(".*.jsonl") == [".b.jsonl"]
    assert taken("**/.git/**/*.jsonl") == [".git/c.jsonl"]
    assert taken(".git/.*/*.jsonl") == [".git/.d/e.jsonl"]


def test_the_run_s_own_directory_is_no_input_though_it_lies_in_one(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl")
    for name in ("lock.json", "corpus/shard-00000.parquet", "corpus/notes.bin"):
        write(tmp_path / "run" / name)
    for pattern in (tmp_path, tmp_path / "*", tmp_path / "**" / "*.json*"):
        assert list_files(str(pattern), "k", apart=tmp_path / "run") == [tmp_path / "a.jsonl"]
    with pytest.raises(ValueError, match=r"notes\.bin"):
        list_files(str(tmp_path), "k")


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl")
    os.mkfifo(tmp_path / "b.jsonl")
    for pattern in ("", "*.jsonl"):
        with pytest.raises(ValueError, match=r"^k: .*b.jsonl is neither a file nor a folder"):
            names(tmp_path, pattern)


@pytest.mark.parametrize("content", [b"", b"{}", b"\n\n"])
def test_an_empty_folder_or_one_of_descriptions_alone_is_an_error(tmp_path: Path, content: bytes) -> None:
    write(tmp_path / "README.md", content)
    write(tmp_path / ".hidden.jsonl", LINE)
    with pytest.raises(FileNotFoundError, match=r"^k: folder .* holds no .jsonl, .ndjson"):
        list_files(str(tmp_path), "k")


def test_tables_alone_are_read_where_texts_would_be_none(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl")
    write(tmp_path / "b.txt")
    with pytest.raises(
        ValueError, match=r"^k: not read are .*b.txt; what is read ends in .jsonl, .ndjson, .json, .parq"
    ):
        list_files(str(tmp_path), "k", TABLES)


# ---- what `datasets` saves -------------------------------------------------------------------------------


def saved(folder: Path, count: int, shards: int = 1) -> list[str]:
    """The texts of a data set of the library that is saved in `folder`, in several files."""
    rows = [f"row {i}" for i in range(count)]
    Dataset.from_dict({"id": list(range(count)), "text": rows}).save_to_disk(folder, num_shards=shards)
    return rows


def test_a_saved_data_set_is_read_by_its_files(tmp_path: Path) -> None:
    rows = saved(tmp_path / "ds", 3000, shards=3)
    assert sum(path.suffix == ".arrow" for path in (tmp_path / "ds").iterdir()) == 3
    assert texts(tmp_path / "ds") == rows
    shutil.copy(tmp_path / "ds" / "data-00000-of-00003.arrow", tmp_path / "ds" / "cache-0123456789abcdef.arrow")
    assert texts(tmp_path / "ds") == rows  # not what a `map` has kept there
    assert texts(tmp_path / "ds" / "data-00001-of-00003.arrow") == rows[1000:2000]


def test_a_saved_dictionary_of_splits_is_read_whole_and_each_by_its_folder(tmp_path: Path) -> None:
    train, test = Dataset.from_dict({"text": ["a", "b"]}), Dataset.from_dict({"text": ["c"]})
    DatasetDict({"train": train, "test": test}).save_to_disk(tmp_path)
    assert texts(tmp_path / "train") == ["a", "b"]
    assert sorted(texts(tmp_path)) == ["a", "b", "c"]


def test_an_arrow_file_of_the_other_format_is_read_too(tmp_path: Path) -> None:
    table = pa.table({"text": ["a", "b", None]})
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=1)
    assert texts(tmp_path) == ["a", "b", "column 'text' is missing"]


@pytest.mark.parametrize("left", [1.0, 0.99, 0.5, 0.01, 0])
def test_an_arrow_file_that_is_cut_off_is_named_even_between_two_batches(tmp_path: Path, left: float) -> None:
    table = pa.table({"text": [f"row {i}" for i in range(100)]})
    path = tmp_path / "a.arrow"
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=10)
    content = path.read_bytes()
    path.write_bytes(content[: int((len(content) - 8) * left)])
    with pytest.raises(ValueError, match=r"a\.arrow cannot be read as Arrow"):
        texts(path)


def test_an_arrow_file_without_the_column_is_named(tmp_path: Path) -> None:
    saved(tmp_path, 2)
    with pytest.raises(ValueError, match=r"\.arrow has no column 'body'; it has id, text"):
        texts(tmp_path, text_column="body")


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
    for name in ("a.jsonl", "a.txt", "a.json"):
        for kept in (0, 1, 10, len(content) // 2, len(content) - 1):
            with pytest.raises(ValueError, match=rf"{name}{suffix}: damaged or cut off"):
                texts(write(tmp_path / f"{name}{suffix}", content[:kept]))


def test_files_of_one_name_are_told_apart_and_a_moved_folder_keeps_its_names() -> None:
    paths = ["/data/x/10/000.jsonl", "/data/x/18/000.jsonl"]
    moved = [path.replace("/data/x", "/mnt") for path in paths]
    assert list(short_names(paths).values()) == ["10/000.jsonl", "18/000.jsonl"]
    assert list(short_names(moved).values()) == ["10/000.jsonl", "18/000.jsonl"]
    assert short_names(["/data/a.jsonl"]) == {"/data/a.jsonl": "a.jsonl"}
    assert list(short_names(["s3://b/x/a.jsonl", "s3://b/y/a.jsonl"]).values()) == ["x/a.jsonl", "y/a.jsonl"]
    assert len(set(short_names(["s3://b/a.jsonl", "/data/a.jsonl", "a.jsonl"]).values())) == 3


def test_files_of_the_run_are_taken_where_a_pattern_names_them(tmp_path: Path) -> None:
    run, text = tmp_path / "run", tmp_path / "run" / "d" / "a.jsonl"
    text.parent.mkdir(parents=True)
    text.write_text("{}\n")
    assert list_files(f"{run}/d/*.jsonl", "k", apart=run) == [text]
    with pytest.raises(FileNotFoundError, match="no file matches"):
        list_files(f"{tmp_path}/*/d/*.jsonl", "k", apart=run)
    with pytest.raises(FileNotFoundError, match=r"run \(it is the run's own\) holds no"):
        list_files(str(run), "k", apart=run)
