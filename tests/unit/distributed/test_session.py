"""What a cluster cannot hold is refused where no machine can join, and waited for elsewhere."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import pytest
import ray

from ifguide.config import Cluster, ConfigError
from ifguide.config.resources import WorkerResources
from ifguide.distributed import metrics
from ifguide.distributed.network import GLOO, interface_of, name_interface
from ifguide.distributed.session import FIXED, require_resources


@pytest.fixture
def two_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    node = {"Alive": True, "Resources": {"CPU": 64.0, "GPU": 8.0, "memory": 100.0 * 2**30}}
    monkeypatch.setattr(ray, "nodes", lambda: [node, node])
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.5:6379")
    monkeypatch.delenv(FIXED, raising=False)


@pytest.mark.usefixtures("two_nodes")
def test_only_a_cluster_that_may_grow_is_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one = WorkerResources(cpus=4, gpus=1)
    require_resources(Cluster(), "pretrain", one, 32)
    monkeypatch.setenv(FIXED, "1")
    require_resources(Cluster(), "pretrain", one, 16)
    with pytest.raises(ConfigError, match=r"pretrain\.resources\.gpus: 32 processes .* there are 128 CPU and 16 GPU"):
        require_resources(Cluster(), "pretrain", one, 32)
    fits, large = (WorkerResources(cpus=4, gpus=0, memory=size * 2**30) for size in (50, 120))
    require_resources(Cluster(), "pretrain", fits, 4)
    with pytest.raises(
        ConfigError, match=r"resources\.memory: 5 processes .* 50 GiB asked for, .* 200 GiB on 2 machines"
    ):
        require_resources(Cluster(), "pretrain", fits, 5)
    with pytest.raises(ConfigError, match=r"^build_mask\.resources\.memory: 1 process of 4 CPU and 0 GPU and 120 GiB "):
        require_resources(Cluster(), "build_mask", large)


def test_the_interface_of_an_address_is_named_to_gloo_unless_it_is_named_already(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loopback = interface_of("127.0.0.1")
    assert loopback is not None
    monkeypatch.delenv(GLOO, raising=False)
    name_interface("192.0.2.1")
    assert GLOO not in os.environ, "an address that this machine has not"
    name_interface("127.0.0.1")
    assert os.environ[GLOO] == loopback
    monkeypatch.setenv(GLOO, "ib0")
    name_interface("127.0.0.1")
    assert os.environ[GLOO] == "ib0"


def test_a_folder_of_any_name_is_a_tag_that_ray_takes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[dict[str, str]] = []
    monkeypatch.setattr(metrics.Gauge, "set", lambda self, value, tags: seen.append(tags))
    with contextlib.closing(metrics.RayMetrics("pack_corpus", tmp_path / "Jürgen" / "项目")) as sink:
        sink({"unit": "shards", "done": 1})
    assert seen
    assert all(tag.isascii() for tags in seen for tag in tags.values())
    assert seen[0]["artifact"].endswith("J\\xfcrgen/\\u9879\\u76ee")
