"""A run whose directory, corpus and prompts lie on an S3 server: the same bytes as on a disk, even if requests fail."""

from __future__ import annotations

import hashlib
import http.client
import os
import random
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from ifguide.artifacts import read_manifest
from ifguide.config import Config, config_from_mapping, to_mapping
from ifguide.distributed.ledger import LEDGER
from ifguide.run import Run
from ifguide.stages.analyse import analyse
from ifguide.storage import location, subfolders, upload_folder
from ifguide.telemetry import METRICS, read_metrics
from ifguide.training.checkpoints import CHECKPOINTS, last_checkpoint
from tests.s3_server import CREDENTIALS, s3_server
from tests.stages.conftest import ARCHITECTURE, small_config
from tests.stages.packed import packed_run, settings_of
from tests.stages.ranks import Kill, run_ranks

pytestmark = pytest.mark.slow

pytest.importorskip("moto.server")
pytest.importorskip("s3fs")

VERBS = ("pack_corpus", "fit_factors", "build_query", "score_corpus", "build_mask")
ANALYSE = {
    "methods": ["lens", "probes"],
    "max_prompts": 4,
    "folds": 2,
    "max_texts": 12,
    "actors": 1,
    "resources": {"gpus": 0},
}
COMPARE = {
    "methods": {
        "same": {"mask": "influence"},
        "filter": {"mask": "words", "objective": "ignore"},
        "dpo": {"dpo": {"min_difference": 0.02, "learning_rate": 1e-4, "batch_size": 4, "micro_batch_size": 4}},
        "rad": {"rad": {"model": "dpo", "top_k": 5}},
    },
    "samples": {"continuations": 4, "max_prompts": 12},
}
RUN = (
    "import sys; from ifguide.cli import main; sys.exit(any(main([v, '--config', sys.argv[1]]) for v in sys.argv[2:]))"
)
REFUSED = (
    b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
)


@pytest.fixture(scope="module")
def s3(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The port of an S3 server on loopback with a bucket `lake`, which holds the demo data in `data/`."""
    with s3_server(tmp_path_factory.mktemp("moto")) as port:
        fs = location("s3://lake/data").fs  # type: ignore[attr-defined]
        for name in ("corpus.jsonl", "queries.jsonl"):
            fs.put_file(str(data / name), f"lake/data/{name}")
        yield port


class Unreliable(ThreadingHTTPServer):
    """Passes requests on to the S3 server, except a share of them, drawn from a seed, that it answers with 503."""

    daemon_threads = True

    def __init__(self, port: int, share: float, seed: int):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream, self.share, self.rng = port, share, random.Random(seed)
        self.lock, self.requests, self.refused = threading.Lock(), 0, 0

    def refuses(self) -> bool:
        with self.lock:
            refused = self.rng.random() < self.share
            self.requests, self.refused = self.requests + 1, self.refused + refused
            return refused


class _Handler(BaseHTTPRequestHandler):
    server: Unreliable
    protocol_version = "HTTP/1.1"

    def _pass_on(self) -> None:
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.server.refuses():
            self._answer(503, [("Content-Type", "application/xml")], REFUSED)
            return
        upstream = http.client.HTTPConnection("127.0.0.1", self.server.upstream, timeout=600)
        upstream.request(self.command, self.path, content, dict(self.headers))
        response = upstream.getresponse()
        body = response.read()
        dropped = {"transfer-encoding", "connection", "content-length"}
        headers = [(name, value) for name, value in response.getheaders() if name.lower() not in dropped]
        length = response.getheader("Content-Length") if self.command == "HEAD" else None
        self._answer(response.status, headers, body, length)
        upstream.close()

    def _answer(self, status: int, headers: list[tuple[str, str]], body: bytes, length: str | None = None) -> None:
        self.send_response_only(status)
        for name, value in headers:
            self.send_header(name, value)
        self.send_header("Content-Length", length or str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _pass_on


def run(folder: Path, data: Path, run_dir: str, port: int, *verbs: str) -> subprocess.CompletedProcess[str]:
    """The verbs of the finished run by the command line, in a process and a Ray cluster of their own."""
    config: dict[str, Any] = small_config(data, folder / "run")
    config["run_dir"] = run_dir
    config["pack_corpus"]["inputs"][0]["path"] = "s3://lake/data/corpus.jsonl"
    config["build_query"]["prompts"] = "s3://lake/data/queries.jsonl"
    config |= {"analyse": ANALYSE, "compare": COMPARE}
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    environment = {
        **os.environ,
        **CREDENTIALS,
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "IFGUIDE_CACHE": str(folder / "cache"),
        "IFGUIDE_TESTS_IMPATIENT_S3": "1",  # tests/prefork/sitecustomize.py
    }
    environment.pop("RAY_ADDRESS", None)
    command = [sys.executable, "-c", RUN, str(path), *verbs]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def compare(on_disk: Path, remote: Path, *further: str) -> None:
    """Every file of scores and mask has the same SHA-256; the manifests say so, and so do the files."""
    for name in ("scores", "ranking", "mask", *further):
        expected, found = read_manifest(on_disk / name), read_manifest(remote / name)
        assert len(found.files) > 1
        if name == "report":  # pages hold times and places
            assert expected.summary == found.summary
            assert set(expected.files) == set(found.files)
            continue
        digests = {file: entry["sha256"] for file, entry in expected.files.items()}
        assert {file: entry["sha256"] for file, entry in found.files.items()} == digests
        for file, digest in digests.items():
            assert hashlib.sha256((remote / name / file).read_bytes()).hexdigest() == digest
        assert not (remote / name / LEDGER).exists()
    assert not (remote / "mask" / "scratch").exists()


def test_a_run_on_s3_has_the_bytes_of_a_run_on_a_disk(
    copied: Callable[..., Config], data: Path, s3: int, tmp_path: Path
) -> None:
    on_disk = Run(config=config_from_mapping({**to_mapping(copied()), "analyse": ANALYSE}))
    analyse(on_disk)
    done = run(tmp_path, data, "s3://lake/run", s3, "run", "analyse", "compare")
    assert done.returncode == 0, done.stderr[-4000:]
    remote = location("s3://lake/run")
    compare(on_disk.folder, remote, "factors", "query", "generations/penalised/prompts", "report", "analyses")
    for model in ("baseline", "penalised"):
        weights = [folder / f"model/{model}/hf/model.safetensors" for folder in (on_disk.folder, remote)]
        assert weights[0].read_bytes() == weights[1].read_bytes()
        assert f"{model} step" in done.stderr
    same = remote / "compare/same/model/penalised/hf/model.safetensors"
    assert same.read_bytes() == weights[0].read_bytes()
    compared = read_manifest(remote / "compare/report").summary
    assert set(compared) == {"baseline", "penalised", *COMPARE["methods"]}
    assert compared["same"] == compared["penalised"]
    assert compared["rad"]["emt"] != compared["dpo"]["emt"]
    again = run(tmp_path, data, "s3://lake/run", s3, "score_corpus", "pretrain", "evaluate", "analyse", "compare")
    assert again.returncode == 0
    assert again.stderr.count("complete") >= 4 + len(VERBS)
    assert not list((tmp_path / "cache").glob("training-*")) + list((tmp_path / "cache").glob("dpo-*"))


def test_a_fifth_of_the_requests_may_fail(finished: Config, data: Path, s3: int, tmp_path: Path) -> None:
    on_disk, remote = Path(finished.run_dir), location("s3://lake/faulty")
    upload_folder(on_disk / "model/baseline", remote / "model/baseline")
    proxy = Unreliable(s3, share=0.2, seed=5)
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    try:
        done = run(tmp_path, data, str(remote), proxy.server_port, *VERBS)
    finally:
        proxy.shutdown()
        proxy.server_close()
    assert done.returncode == 0, done.stderr[-4000:]
    assert proxy.refused > 50
    assert 0.1 < proxy.refused / proxy.requests < 0.3
    compare(on_disk, remote, "factors", "query")


@pytest.mark.parametrize("stage", [1, 3])
def test_machines_that_share_no_disk_train_through_the_store(stage: int, s3: int, tmp_path: Path) -> None:
    """Two ranks, a folder each, killed twice, on one machine in between: the weights of an undisturbed training."""
    options = {"epochs": 1, "heldout_blocks": 8, "checkpoint_steps": 2, "zero_stage": stage, "workers": 2}
    packed = packed_run(tmp_path, options, architecture={**ARCHITECTURE, "vocab_size": 4096})
    machines = [
        {**CREDENTIALS, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{s3}", "IFGUIDE_CACHE": str(tmp_path / f"machine{rank}")}
        for rank in range(2)
    ]
    reference = settings_of(packed, tmp_path / "reference")
    run_ranks(reference, 2)
    killed = replace(settings_of(packed, tmp_path / "killed"), folder=f"s3://lake/model-{stage}")
    folder = location(killed.folder)
    run_ranks(killed, 2, Kill(step=3, place="save", rank=1), machines=machines)
    assert last_checkpoint(folder).step == 2
    run_ranks(killed, 2, Kill(step=6, place="backward", rank=None), machines=machines)
    assert last_checkpoint(folder).step == 6
    run_ranks(killed, 2, machines=machines)
    weights = [(place / "hf" / "model.safetensors").read_bytes() for place in (folder, Path(reference.folder))]
    assert weights[0] == weights[1]
    expected = {row["step"]: row["loss"] for row in read_metrics(Path(reference.folder) / METRICS)}
    assert {row["step"]: row["loss"] for row in read_metrics(folder / METRICS)} == expected
    assert [path.name for path in subfolders(folder / CHECKPOINTS)] == [f"step-{max(expected):08d}"]
    assert not [path for machine in machines for path in Path(machine["IFGUIDE_CACHE"]).rglob("training-*")]

    reshaped = replace(killed, folder=f"s3://lake/reshaped-{stage}")
    run_ranks(reshaped, 2, Kill(step=5, place="step", rank=0), machines=machines)
    run_ranks(reshaped, 1, machines=machines)
    losses = {row["step"]: row["loss"] for row in read_metrics(location(reshaped.folder) / METRICS)}
    assert losses == pytest.approx(expected, rel=1e-4)
