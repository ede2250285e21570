"""The scaling bench: its ways of scoring run, and make the same files."""

from __future__ import annotations

from pathlib import Path

import torch

from bench.scaling import in_a_process, prepare, run_way
from ifguide.artifacts import data_files, file_digest


def test_a_bare_loop_and_an_actor_make_the_same_scores(cluster: None, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    try:
        blocks = prepare(tmp_path, shards=2, shard_seconds=0.01)
        assert blocks > 0
        assert in_a_process(0, tmp_path) > 0  # it sets what memory a process keeps
        assert run_way(1, tmp_path) > 0
    finally:
        torch.set_num_threads(threads)
    digests = [{path.name: file_digest(path) for path in data_files(tmp_path / f"scores{actors}")} for actors in (0, 1)]
    assert len(digests[0]) == 2
    assert digests[0] == digests[1]
