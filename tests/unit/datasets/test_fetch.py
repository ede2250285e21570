"""Fetching on a loopback server and from a folder: digests, ends that come early, resuming, the command itself."""

from __future__ import annotations

import hashlib
import io
import json
import socket
import tarfile
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml

from ifguide import cli
from ifguide.datasets import FOLDER, MANIFEST, advice, originals
from ifguide.datasets.fetch import describe, fetch
from ifguide.datasets.originals import DigestError, download, members_digest
from ifguide.datasets.table import Output, read_table

LINES = b'{"text":"\\u00e9"}\n'
CONVERTED = '{"text": "é"}\n'.encode()
POSTS = {"annotations_metadata.csv": b"file_id,user_id,subforum_id,num_contexts,label\n", "all_files/1_1.txt": b"a"}


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def packed(files: dict[str, bytes]) -> bytes:
    """A .tar.gz as GitHub makes them: all in one folder."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as archive:
        for path, content in files.items():
            entry = tarfile.TarInfo(f"repository-abc/{path}")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return stream.getvalue()


@dataclass
class Server:
    """A web server: contents by path; `cut` paths end after so many bytes, `fails` answers 503 so many times."""

    url: str = ""
    contents: dict[str, bytes] = field(default_factory=dict)
    cut: dict[str, int] = field(default_factory=dict)
    fails: Counter[str] = field(default_factory=Counter)
    requests: Counter[str] = field(default_factory=Counter)


@pytest.fixture
def server() -> Iterator[Server]:
    state = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            state.requests[self.path] += 1
            if state.fails[self.path]:
                state.fails[self.path] -= 1
                self.send_error(503)
            elif self.path not in state.contents:
                self.send_error(404)
            else:
                content = state.contents[self.path]
                self.send_response(200)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content[: state.cut.get(self.path, len(content))])

        def log_message(self, *_: object) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    state.url = f"http://127.0.0.1:{http.server_address[1]}/"
    yield state
    http.shutdown()
    http.server_close()
    thread.join(timeout=10)


@pytest.fixture(autouse=True)
def no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(originals.time, "sleep", lambda seconds: None)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def outputs(server: Server, tmp_path: Path) -> list[Output]:
    """A small table: JSON lines, a copy and an archive, on the server."""
    server.contents = {
        "/one/a.jsonl": LINES,
        "/one/deep/b.json": b"{}",
        "/posts.tar.gz": packed({**POSTS, "no.md": b""}),
    }
    common = {"what": "w", "licence": "l", "checked": "c"}
    one = {"a.jsonl": [len(LINES), sha256(LINES)], "deep/b.json": [2, sha256(b"{}")]}
    table = {
        "origins": {
            "one": {**common, "url": f"{server.url}one/", "files": one},
            "posts": {**common, "url": f"{server.url}posts.tar.gz",
                      "members": ["annotations_metadata.csv", "all_files/*"], "sha256": members_digest(POSTS)},
        },
        "outputs": {
            "lines.jsonl": {"converter": "json_lines", "origin": "one", "files": ["a.jsonl"],
                            "result": [len(CONVERTED), sha256(CONVERTED)]},
            "kept/b.json": {"converter": "copy", "origin": "one", "files": ["deep/b.json"]},
            "posts.jsonl": {"converter": "forum", "origin": "posts", "result": [0, sha256(b"")]},
        },
    }  # fmt: skip
    path = tmp_path / "sources.yaml"
    path.write_text(yaml.safe_dump(table, sort_keys=False))
    return read_table(path)


def files_of(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_everything_is_fetched_converted_and_listed(outputs: list[Output], tmp_path: Path) -> None:
    fetch(outputs, tmp_path / "out")
    made = files_of(tmp_path / "out")
    manifest = json.loads(made.pop("manifest.json"))
    assert made == {"lines.jsonl": CONVERTED, "kept/b.json": b"{}", "posts.jsonl": b""}
    assert {name: entry["sha256"] for name, entry in manifest["files"].items()} == {
        name: sha256(content) for name, content in made.items()
    }
    assert manifest["files"]["lines.jsonl"]["urls"] == [outputs[0].origin.url + "a.jsonl"]
    assert manifest["files"]["posts.jsonl"]["urls"] == [outputs[2].origin.url]


def test_what_is_there_is_left_alone(outputs: list[Output], server: Server, tmp_path: Path) -> None:
    del server.contents["/posts.tar.gz"]
    with pytest.raises(OSError, match=r"posts\.tar\.gz: HTTP 404"):
        fetch(outputs, tmp_path / "out")
    assert set(files_of(tmp_path / "out")) == {"lines.jsonl", "kept/b.json"}  # no manifest: not whole
    server.contents["/posts.tar.gz"] = packed(POSTS)
    server.requests.clear()
    fetch(outputs, tmp_path / "out")
    assert server.requests == {"/posts.tar.gz": 1}
    assert "manifest.json" in files_of(tmp_path / "out")


def test_a_download_with_another_digest_is_refused(outputs: list[Output], server: Server, tmp_path: Path) -> None:
    server.contents["/one/a.jsonl"] = b'{"text":"\\u00e8"}\n'
    with pytest.raises(DigestError) as refused:
        fetch(outputs, tmp_path / "out")
    for part in (f"{server.url}one/a.jsonl", sha256(LINES), sha256(server.contents["/one/a.jsonl"])):
        assert part in str(refused.value)
    assert server.requests["/one/a.jsonl"] == 1  # another file stays another file
    assert files_of(tmp_path) == {"sources.yaml": (tmp_path / "sources.yaml").read_bytes()}


def test_a_member_that_differs_is_refused(outputs: list[Output], server: Server, tmp_path: Path) -> None:
    server.contents["/posts.tar.gz"] = packed({**POSTS, "all_files/1_1.txt": b"b"})
    with pytest.raises(DigestError, match=members_digest(POSTS)):
        fetch(outputs, tmp_path / "out")


@pytest.mark.parametrize(("path", "name"), [("/one/a.jsonl", "lines.jsonl"), ("/posts.tar.gz", "posts.jsonl")])
def test_a_download_that_ends_early_is_tried_again_and_never_published(
    path: str, name: str, outputs: list[Output], server: Server, tmp_path: Path
) -> None:
    server.cut[path] = 5
    with pytest.raises(OSError, match=rf"ended after 5 of {len(server.contents[path])} bytes.*--from"):
        fetch(outputs, tmp_path / "out")
    assert server.requests[path] == 4
    assert not [path for path in files_of(tmp_path) if path.endswith((name, "manifest.json", ".part"))]
    server.cut.clear()
    fetch(outputs, tmp_path / "out")
    assert {f"out/{name}", "out/manifest.json"} <= set(files_of(tmp_path))


def test_an_archive_that_is_none_is_said(outputs: list[Output], server: Server, tmp_path: Path) -> None:
    server.contents["/posts.tar.gz"] = b"<html>sign in</html>"
    with pytest.raises(OSError, match=r"posts\.tar\.gz: not a whole \.tar\.gz"):
        fetch(outputs, tmp_path / "out")


def test_passing_errors_are_tried_again_and_final_ones_are_not(server: Server) -> None:
    server.contents["/a"] = b"x"
    server.fails["/a"] = 3
    assert download(f"{server.url}a", size=1) == b"x"
    assert server.requests["/a"] == 4
    with pytest.raises(OSError, match="HTTP 404"):
        download(f"{server.url}absent")
    assert server.requests["/absent"] == 1


def test_a_server_that_says_nothing_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(OSError, match="timed out"):
        download(f"http://127.0.0.1:{silent.getsockname()[1]}/a", timeout=0.2, waits=())


def write(folder: Path, files: dict[str, bytes]) -> None:
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)


def test_originals_from_a_folder(outputs: list[Output], server: Server, tmp_path: Path) -> None:
    source = tmp_path / "source"
    write(source / "one", {"a.jsonl": LINES, "deep/b.json": b"{}", "README": b"not named in the table"})
    write(source / "posts", POSTS)
    fetch(outputs, tmp_path / "out", source=source)
    assert files_of(tmp_path / "out")["lines.jsonl"] == CONVERTED
    assert not server.requests


def test_files_that_are_made_already_are_taken_from_a_folder(outputs: list[Output], tmp_path: Path) -> None:
    write(tmp_path / "made", {"lines.jsonl": CONVERTED, "kept/b.json": b"{}", "posts.jsonl": b""})
    fetch(outputs, tmp_path / "out", source=tmp_path / "made")
    assert files_of(tmp_path / "out")["lines.jsonl"] == CONVERTED
    (tmp_path / "made" / "lines.jsonl").write_bytes(LINES)
    with pytest.raises(DigestError, match=rf"made/lines\.jsonl.*{sha256(LINES)}.*{sha256(CONVERTED)}"):
        fetch(outputs, tmp_path / "other", source=tmp_path / "made")


def test_all_missing_originals_are_named_at_once(outputs: list[Output], tmp_path: Path) -> None:
    source = tmp_path / "source"
    write(source / "one", {"deep/b.json": b"{}"})
    with pytest.raises(FileNotFoundError) as missing:
        fetch(outputs, tmp_path / "out", source=source)
    message = str(missing.value)
    assert message.startswith("2 of 3 files were not made")
    assert str(source / "one" / "a.jsonl") in message
    assert outputs[0].origin.url + "a.jsonl" in message
    assert outputs[2].origin.url in message
    assert set(files_of(tmp_path / "out")) == {"kept/b.json"}


def test_a_file_that_was_changed_is_not_overwritten(outputs: list[Output], tmp_path: Path) -> None:
    write(tmp_path / "out", {"kept/b.json": b"[]"})
    with pytest.raises(DigestError, match=r"kept/b\.json.*move it away"):
        fetch(outputs, tmp_path / "out")
    assert (tmp_path / "out" / "kept" / "b.json").read_bytes() == b"[]"


def test_an_output_of_another_one_is_made_after_it(server: Server, outputs: list[Output], tmp_path: Path) -> None:
    tweets = b'{"id": 1, "text": "a fool", "offensive": true}\n'
    made = b'{"id": 1, "text": "a fool", "offensive_spans": [[0, 6]]}\n'
    server.contents["/one/tweets.jsonl"] = tweets
    table = yaml.safe_load((tmp_path / "sources.yaml").read_text())
    table["origins"]["one"]["files"]["tweets.jsonl"] = [len(tweets), sha256(tweets)]
    table["outputs"] = {
        "tweets.jsonl": {"converter": "copy", "origin": "one", "files": ["tweets.jsonl"]},
        "offensive.jsonl": {
            "converter": "offensive_tweets", "of": "tweets.jsonl", "result": [len(made), sha256(made)]
        },
    }  # fmt: skip
    (tmp_path / "table.yaml").write_text(yaml.safe_dump(table, sort_keys=False))
    outputs = read_table(tmp_path / "table.yaml")
    fetch(outputs, tmp_path / "out")
    assert files_of(tmp_path / "out").keys() == {"tweets.jsonl", "offensive.jsonl", MANIFEST}
    assert (tmp_path / "out" / "offensive.jsonl").read_bytes() == made
    write(tmp_path / "made", {"tweets.jsonl": tweets})  # of made files, the others come
    fetch(outputs, tmp_path / "again", source=tmp_path / "made")
    assert (tmp_path / "again" / "offensive.jsonl").read_bytes() == made
    with pytest.raises(FileNotFoundError, match=r"2 of 2 files were not made(.|\n)*offensive\.jsonl: tweets\.jsonl"):
        fetch(outputs, tmp_path / "none", source=tmp_path / "absent")
    table["outputs"] = dict(reversed(table["outputs"].items()))
    (tmp_path / "table.yaml").write_text(yaml.safe_dump(table, sort_keys=False))
    with pytest.raises(ValueError, match=r"outputs\.offensive\.jsonl\.of: there is no output 'tweets\.jsonl' before"):
        read_table(tmp_path / "table.yaml")


def test_describe_fetches_nothing(outputs: list[Output], server: Server, tmp_path: Path) -> None:
    write(tmp_path / "out", {"kept/b.json": b"{}"})
    lines = describe(outputs, tmp_path / "out")
    assert [("there" in line, "to make" in line) for line in lines[:3]] == [(False, True), (True, False), (False, True)]
    assert f"  {outputs[2].origin.url}" in lines
    assert not server.requests


def test_the_command_lists_every_file_of_the_table(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.main(["fetch-data", "--out", str(tmp_path), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert all(output.name in printed and output.origin.url in printed for output in read_table())
    assert not list(tmp_path.iterdir())


def test_the_command_says_what_is_missing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.main(["fetch-data", "--out", str(tmp_path / "out"), "--from", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("ifguide fetch-data: 28 of 28 files were not made")
    assert "olid-training-v1.0.tsv" in error


def test_a_run_without_the_data_names_the_command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert advice("no file matches data/real_text/rtp_prompts.jsonl") == "; `ifguide fetch-data` makes data/real_text"
    assert advice("no file matches somewhere/else.jsonl") == ""
    write(tmp_path / FOLDER, {"manifest.json": b"{}"})
    assert advice("no file matches data/real_text/a_typo.jsonl") == ""
