"""A machine that Ray says will be taken away: a training goes on on another one, and a driver there saves and ends."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from ifguide.artifacts import file_digest
from ifguide.config import to_mapping
from ifguide.interrupts import GRACE
from ifguide.stages.pretrain import pretrain
from ifguide.telemetry import METRICS, read_metrics
from tests import forked
from tests.prefork import holds
from tests.stages.conftest import ARCHITECTURE, own_environment
from tests.stages.packed import packed_run

ROOT = Path(__file__).parents[2]
# Two nodes of one CPU beside a head of none; the one that trains is drained, as Ray does with a pod that ends.
# The training is held until it is told.
DRIVER = """
import json, sys, threading, time
from pathlib import Path
import ray
from ray.cluster_utils import Cluster
from ray.core.generated import autoscaler_pb2
from ifguide.config import load_config
from ifguide.run import Run
from ifguide.stages.pretrain import pretrain
from ifguide.telemetry import METRICS, configure_logging, read_metrics

configure_logging()
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
run = Run(config=load_config(sys.argv[1], [f"cluster.address={cluster.address}"]))
metrics, said, ended = run.model("penalised") / METRICS, {}, threading.Event()

def busy():
    free = ray._private.state.available_resources_per_node()
    return [node.node_id for node in nodes if free.get(node.node_id, {}).get("CPU", 0) < 1]

def drain():
    while len(read_metrics(metrics)) < 20:
        time.sleep(0.02)
    while not said.get("first"):  # Ray tells it a moment later
        said["first"] = busy()
    client = ray._raylet.GcsClient(address=cluster.address)
    reason, deadline = autoscaler_pb2.DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION, time.time_ns() // 10**6 + 10**6
    said["drained_at"] = len(read_metrics(metrics))
    said["accepted"], _ = client.drain_node(said["first"][0], reason, "taken away", deadline)
    said["then"] = []
    while not ended.wait(0.05):  # how soon the notice is seen is Ray's: look until the training has ended
        said["then"] = sorted({*said["then"], *busy()})

thread = threading.Thread(target=drain, daemon=True)
thread.start()
pretrain(run)
ended.set()
thread.join(60)
print(json.dumps(said), flush=True)
ray.shutdown()  # before its nodes: a driver that loses them while it is connected may end with status 1 and say nothing
cluster.shutdown()
"""

WAITING = """
import sys, time
import ray
from ray.cluster_utils import Cluster
from ray.core.generated import autoscaler_pb2
from ifguide import config, interrupts
from ifguide.distributed import session

session.NOTICE_SECONDS = 0.2
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
try:
    with interrupts.handled():
        session.connect(config.Cluster(address=cluster.address))
        node = ray.get_runtime_context().get_node_id()
        reason, deadline = autoscaler_pb2.DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION, time.time_ns() // 10**6 + 10**6
        assert ray._raylet.GcsClient(address=cluster.address).drain_node(node, reason, "taken away", deadline)[0]
        time.sleep(3000)
except KeyboardInterrupt as error:
    session.disconnect()
    interrupts.end_children()
    print(error.kept)
    sys.exit(interrupts.exit_code())
"""


def run_driver(script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", script, *arguments]
    environment = {**own_environment(), GRACE: "100", **environment}
    return forked.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_a_driver_whose_machine_is_taken_away_ends_as_by_sigterm() -> None:
    done = run_driver(WAITING)
    assert (done.returncode, done.stdout) == (143, "what was finished is kept\n"), done.stderr[-3000:]


@pytest.mark.slow
def test_a_training_leaves_a_machine_that_is_taken_away_and_ends_as_if_it_had_not(tmp_path: Path) -> None:
    options = {"engine": "deepspeed", "epochs": 6, "checkpoint_steps": 1000, "resources": {"gpus": 0, "cpus": 1}}
    runs = {name: packed_run(tmp_path / name, options, architecture=ARCHITECTURE) for name in ("moved", "whole")}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(to_mapping(runs["moved"].config)))
    environment = {"RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "0.2", holds.STEPS: "20"}
    done = run_driver(DRIVER, str(tmp_path / "config.yaml"), **environment)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["accepted"]
    assert len(said["first"]) == 1
    assert set(said["then"]) - set(said["first"])  # a node that is drained and idle ends, and has no free CPU either
    (line,) = (line for line in done.stderr.splitlines() if "a machine is being taken away" in line)
    assert "the checkpoint of step " in line
    saved = int(line.partition("the checkpoint of step ")[2].split()[0])
    model = runs["moved"].model("penalised")
    steps = [row["step"] for row in read_metrics(model / METRICS)]
    assert said["drained_at"] == 20
    assert saved == 21 < steps[-1]
    assert steps == list(range(1, steps[-1] + 1))
    pretrain(runs["whole"])
    weights = [file_digest(run.model("penalised") / "hf" / "model.safetensors") for run in runs.values()]
    assert weights[0] == weights[1]
