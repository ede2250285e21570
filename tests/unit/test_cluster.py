"""The files in cluster/ name entry points, configs, gauges and a Ray version that exist, and fit their configs."""

from __future__ import annotations

import itertools
import json
import os
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from ifguide.config import Config, load_config
from ifguide.gauges import GAUGES, PREFIX, TAGS

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
FILES = sorted(path for path in CLUSTER.iterdir() if path.is_file())
RAY_FILES = sorted(CLUSTER.glob("ray*.yaml"))
JOBS = [path for path in RAY_FILES if path.name.startswith("rayjob")]
EXPORTED = {f"ray_{PREFIX}{gauge.name}" for gauge in GAUGES}
DASHBOARD = json.loads((CLUSTER / "grafana.json").read_text())
SLURM = (CLUSTER / "slurm.sbatch").read_text()


def load(name: str) -> Any:
    return yaml.safe_load((CLUSTER / name).read_text())


def cluster_of(path: Path) -> Any:
    spec = yaml.safe_load(path.read_text())["spec"]
    return spec.get("rayClusterSpec", spec)


def pods_of(path: Path) -> Iterator[Any]:
    """The pod templates of a Ray cluster."""
    cluster = cluster_of(path)
    yield cluster["headGroupSpec"]["template"]
    yield from (group["template"] for group in cluster["workerGroupSpecs"])


def config_of(path: Path) -> tuple[str, Config]:
    """The verb of a job's command, and its config."""
    words = shlex.split(yaml.safe_load(path.read_text())["spec"]["entrypoint"])
    changes = [words[i + 1] for i, word in enumerate(words) if word == "--set"]
    return Path(words[1]).stem, load_config(ROOT / words[words.index("--config") + 1], changes)


def wanted(verb: str, config: Config) -> tuple[int, float, float, float]:
    """Workers of a stage at most, and the CPUs, GPUs and bytes of one."""
    section = getattr(config, verb)
    count = section.max_actors if verb == "score_corpus" else section.workers
    return count, section.resources.cpus, section.resources.gpus, section.resources.memory or 0


def ray_version() -> str:
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return next(pin.split("==")[1] for pin in pins if pin.startswith("ray=="))


@pytest.mark.parametrize("path", [path for path in FILES if path.suffix == ".yaml"], ids=lambda path: path.name)
def test_yaml_parses_and_pins_the_projects_ray(path: Path) -> None:
    found: list[str] = []

    def walk(tree: Any) -> None:
        if isinstance(tree, dict):
            found.extend(str(value) for key, value in tree.items() if key == "rayVersion")
            tree = list(tree.values())
        for item in tree if isinstance(tree, list) else []:
            walk(item)

    walk(yaml.safe_load(path.read_text()))
    assert set(found) <= {ray_version()}
    assert found or path not in RAY_FILES


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_job_and_config_named_exists(path: Path) -> None:
    for name in re.findall(r"\b(?:jobs|configs)/\w+\.(?:py|yaml)", path.read_text()):
        assert (ROOT / name).is_file(), name


def test_the_image_has_the_projects_ray_and_what_object_stores_need() -> None:
    dockerfile = (ROOT / "cluster" / "Dockerfile").read_text()
    assert f"rayproject/ray:{ray_version()}-" in dockerfile
    assert '--constraint constraints.txt ".[train,evaluate,compare,s3]"' in dockerfile
    for copied in re.findall(r"^COPY (?:--\S+ )*(.+) \S+$", dockerfile, re.MULTILINE):
        assert all((ROOT / name).exists() for name in copied.split()), copied


def test_a_job_whose_working_directory_is_sent_along_is_told_where_its_run_directory_is() -> None:
    """Relative paths would lie in Ray's own folder on each node, under another name after any edit."""
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *FILES):
        for line in path.read_text().splitlines():
            if re.search(r"ray job submit .*--working-dir .*jobs/", line):
                assert re.search(r"--set run_dir=(/|\w+://|D\b)", line), f"{path.name}: {line}"


@pytest.mark.parametrize("name", ["local.sh", "slurm.sbatch"])
def test_scripts_are_valid_shell(name: str) -> None:
    subprocess.run(["bash", "-n", str(CLUSTER / name)], check=True)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_nothing_is_writable_by_everybody(path: Path) -> None:
    modes = re.findall(r"(?:chmod|-m|--mode)[ =](?:-R )?([0-7]{3,4}|[ugoa]*\+[rwxst]+)", path.read_text())
    assert not [mode for mode in modes if mode[-1:] in "2367" or re.match(r"[ug]*[oa].*w|\+.*w", mode)]


def test_the_dashboard_draws_every_gauge_and_no_other() -> None:
    expressions = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
    assert set(re.findall(r"\bray_\w+", " ".join(expressions))) == EXPORTED
    assert set(re.findall(r"\b(?:ray_)?ifguide_\w+", json.dumps(DASHBOARD))) == EXPORTED
    for expression in expressions:
        assert expression.count("(") == expression.count(")")
        for labels in re.findall(r"by \(([^)]*)\)", expression):
            assert set(labels.split(", ")) <= {*TAGS}
        assert set(re.findall(r"(\w+)=~", expression)) <= {*TAGS}


def test_the_panels_have_places_and_sources_of_their_own() -> None:
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        own = set(
            itertools.product(range(place["x"], place["x"] + place["w"]), range(place["y"], place["y"] + place["h"]))
        )
        assert not own & cells, panel["title"]
        assert max(x for x, _ in own) < 24
        cells |= own
    variables = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
    assert set(re.findall(r"\$\{?(\w+)", json.dumps(panels))) == set(variables)
    for panel in panels:
        for source in [panel["datasource"], *(target["datasource"] for target in panel["targets"])]:
            assert source == {"type": "prometheus", "uid": "${datasource}"}
        for target in panel["targets"]:
            drawn = re.search(r"by \(([^)]*)\)", target["expr"])
            assert drawn is not None
            assert set(re.findall(r"{{(\w+)}}", target["legendFormat"])) <= set(drawn[1].split(", "))


@pytest.mark.parametrize("name", ["docs/cluster.md", "cluster/README.md"])
def test_the_documents_name_gauges_that_are_exported(name: str) -> None:
    text = (ROOT / name).read_text()
    named = set(re.findall(r"\b(?:ray_)?ifguide_[a-z_]+\b", text))
    assert {gauge if gauge.startswith("ray_") else f"ray_{gauge}" for gauge in named} <= EXPORTED
    if name.startswith("docs"):
        rows = re.findall(r"^\| `(\w+)` \| (\S+) \| (.+) \|$", text, re.MULTILINE)
        assert rows == [(gauge.name, gauge.unit, gauge.help) for gauge in GAUGES]


def test_the_pod_monitor_finds_every_pod_and_its_metrics() -> None:
    monitor = load("podmonitor.yaml")["spec"]
    for path in RAY_FILES:
        for pod in pods_of(path):
            assert monitor["selector"]["matchLabels"].items() <= pod["metadata"]["labels"].items(), path.name
            (container,) = pod["spec"]["containers"]
            assert "ports" not in container  # or KubeRay leaves the others to us
    assert [endpoint["port"] for endpoint in monitor["podMetricsEndpoints"]] == ["metrics"]  # KubeRay's name of it


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.name)
def test_a_job_asks_for_what_its_config_uses(path: Path) -> None:
    verb, config = config_of(path)
    count, cpus, gpus, memory = wanted(verb, config)
    (group,) = cluster_of(path)["workerGroupSpecs"]
    (container,) = group["template"]["spec"]["containers"]
    limits = container["resources"]["limits"]
    per_node = int(limits["nvidia.com/gpu"])
    assert container["resources"]["requests"] == limits
    assert count * gpus == group["maxReplicas"] * per_node  # no GPU is idle, no worker waits
    assert per_node / gpus * cpus <= int(limits["cpu"])
    assert per_node / gpus * memory <= int(limits["memory"].removesuffix("Gi")) * 2**30
    assert group["minReplicas"] == group["replicas"]
    if verb == "pretrain":  # which waits for all
        assert group["minReplicas"] == group["maxReplicas"]


def test_the_clusters_differ_in_their_number_of_nodes_alone() -> None:
    clusters = []
    for path in RAY_FILES:
        cluster = cluster_of(path)
        for group in cluster["workerGroupSpecs"]:
            for key in ("replicas", "minReplicas", "maxReplicas"):
                del group[key]
        clusters.append(cluster)
    assert len(clusters) >= 4
    assert all(cluster == clusters[0] for cluster in clusters)


@pytest.mark.parametrize("path", RAY_FILES, ids=lambda path: path.name)
def test_pods_have_what_they_name(path: Path) -> None:
    account = load("serviceaccount.yaml")
    assert account["kind"] == "ServiceAccount"
    for pod in pods_of(path):
        spec = pod["spec"]
        (container,) = spec["containers"]
        assert spec["serviceAccountName"] == account["metadata"]["name"]
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in spec["volumes"]}
        environment = {variable["name"]: variable["value"] for variable in container["env"]}
        mounted = [mount["mountPath"] for mount in container["volumeMounts"]]
        assert environment["IFGUIDE_CACHE"] in mounted
        assert all(source["secretRef"]["optional"] for source in container["envFrom"])
        # each is to end before the one that would kill it
        ended, stopped, drained = (
            float(environment[name])
            for name in ("IFGUIDE_GRACE_SECONDS", "RAY_JOB_STOP_WAIT_TIME_S", "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S")
        )
        assert ended < stopped < drained < spec["terminationGracePeriodSeconds"]
    head, worker = pods_of(path)
    assert "tolerations" not in head["spec"]
    assert {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"} in worker["spec"]["tolerations"]


@pytest.mark.parametrize("path", RAY_FILES, ids=lambda path: path.name)
def test_what_is_mounted_of_the_claim_is_made_for_the_containers_user_first(path: Path) -> None:
    """Kubernetes makes a subPath that is not there, as root."""
    for pod in pods_of(path):
        (folders,) = pod["spec"]["initContainers"]
        assert folders["securityContext"]["runAsUser"] == 0
        ((name, place),) = ((mount["name"], mount["mountPath"]) for mount in folders["volumeMounts"])
        words = folders["command"]
        assert (words[0], words[words.index("-o") + 1]) == ("install", "1000")
        (container,) = pod["spec"]["containers"]
        assert folders["image"] == container["image"]
        parts = [mount for mount in container["volumeMounts"] if "subPath" in mount]
        assert parts
        assert all(mount["name"] == name for mount in parts)
        assert {f"{place}/{mount['subPath']}" for mount in parts} <= set(words)


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.name)
def test_a_jobs_machines_go_when_it_ends(path: Path) -> None:
    spec = yaml.safe_load(path.read_text())["spec"]
    assert spec["shutdownAfterJobFinishes"]
    assert spec.get("ttlSecondsAfterFinished", 0) <= 60


def test_the_launchers_file_is_as_ray_wants_it() -> None:
    ray = pytest.importorskip("ray")
    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
    jsonschema.validate(load("launcher.yaml"), schema)


def test_the_image_has_what_deepspeeds_file_access_is_built_with() -> None:
    dockerfile = (CLUSTER / "Dockerfile").read_text()
    assert re.search(r"apt-get install .*\blibaio-dev\b", dockerfile)
    assert dockerfile.index("libaio-dev") < dockerfile.index("pip install")


def test_the_slurm_job_asks_for_what_its_config_uses() -> None:
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)$", SLURM, re.MULTILINE))
    verb, config = re.search(
        r"^JOB=\$\{JOB:-jobs/(\w+)\.py\} CONFIG=\$\{CONFIG:-(\S+)\}$", SLURM, re.MULTILINE
    ).groups()  # type: ignore[union-attr]
    count, cpus, gpus, _ = wanted(verb, load_config(ROOT / config))
    nodes, per_node = int(options["nodes"]), int(options["gpus-per-node"])
    assert count * gpus == nodes * per_node
    assert per_node / gpus * cpus <= int(options["cpus-per-task"])
    assert options["ntasks-per-node"] == "1"


def test_ray_has_the_symmetric_run_that_the_slurm_job_starts() -> None:
    symmetric_run = pytest.importorskip("ray.scripts.symmetric_run").symmetric_run
    options = {option for parameter in symmetric_run.params for option in parameter.opts}
    start = pytest.importorskip("ray.scripts.scripts").start
    options |= {option for parameter in start.params for option in parameter.opts}
    command = SLURM[SLURM.index("ray symmetric-run") : SLURM.index("bash -c")]
    assert set(re.findall(r"--[a-z][\w-]*", command)) <= options


FAKES = {
    "hostname": 'echo "10.0.0.5 172.17.0.1"',
    "scontrol": 'echo "scontrol $*" >>"$CALLS"',
    # one task, as on the first node: what comes after srun's own options
    "srun": 'echo "srun $*" >>"$CALLS"; while [[ $1 == --* ]]; do shift; done; "$@"',
    # what `ray symmetric-run` does with its arguments on the first node
    "ray": 'echo "ray $*" >>"$CALLS"; while [ "$1" != -- ]; do shift; done; shift; "$@"',
    # a job that saves for as long as it is asked to, and counts what it was asked
    "python": """trap 'sleep 0.5; echo saved >>"$CALLS"; exit 143' TERM
echo "python $* RAY_ADDRESS=$RAY_ADDRESS" >>"$CALLS"
echo "fixed $IFGUIDE_FIXED_CLUSTER, files in $RAY_TMPDIR" >>"$CALLS"
stat -c "token %a" "$RAY_AUTH_TOKEN_PATH" >>"$CALLS"
for _ in $(seq $((STEPS * 10))); do sleep 0.1; done""",
}


def run_slurm(
    folder: Path,
    steps: int,
    *signals: signal.Signals,
    fakes: dict[str, str] = FAKES,
    exported: Mapping[str, str] = {},
) -> tuple[int, list[str], set[str]]:
    """The exit code of the Slurm job beside commands that only say what they were told, what those were told, and what
    it has left in its folder. `exported`: what the shell that submits it has in its environment."""
    commands, calls = folder / "bin", folder / "calls"
    commands.mkdir()
    for name, script in fakes.items():
        (commands / name).write_text(f"#!/usr/bin/env bash\n{script}\n")
        (commands / name).chmod(0o755)
    checkout = folder / "checkout"
    checkout.mkdir()
    environment = {
        "PATH": f"{commands}:{os.environ['PATH']}",
        "CALLS": str(calls),
        "STEPS": str(steps),
        "SLURM_SUBMIT_DIR": str(checkout),
        "SLURM_JOB_ID": "42",
        "SLURM_JOB_NUM_NODES": "4",
        "SLURM_CPUS_PER_TASK": "64",
        "SLURM_GPUS_ON_NODE": "8",
        **exported,
    }
    process = subprocess.Popen(["bash", str(CLUSTER / "slurm.sbatch"), "--set", "seed=1"], env=environment)
    deadline = time.monotonic() + 300
    while not (calls.exists() and "token" in calls.read_text()) and time.monotonic() < deadline:
        if process.poll() is not None:
            break
        time.sleep(0.05)
    for number in signals:
        time.sleep(0.2)
        process.send_signal(number)
    code = process.wait(timeout=600)
    return code, calls.read_text().splitlines(), {path.name for path in checkout.iterdir()}


def test_the_slurm_job_starts_ray_on_every_node_and_the_verb_on_one(tmp_path: Path) -> None:
    code, calls, left = run_slurm(tmp_path, 1)
    assert (code, left) == (0, set())
    srun, ray, python, places, token = calls
    assert srun.startswith("srun --nodes=4 --ntasks-per-node=1 --cpus-per-task=64 ray symmetric-run ")
    assert ray.startswith("ray symmetric-run --address 10.0.0.5:6379 --min-nodes 4 --num-cpus=64 --num-gpus=8 -- ")
    assert python == ("python jobs/pretrain.py --config configs/pythia12b.yaml --set seed=1 RAY_ADDRESS=10.0.0.5:6379")
    assert places == "fixed 1, files in /tmp/ifguide-42"
    assert token == "token 600"


@pytest.mark.parametrize("fails_early", [False, True])
def test_a_slurm_job_leaves_rays_files_of_whoever_submits_it(fails_early: bool, tmp_path: Path) -> None:
    """sbatch gives a job the environment of the shell, and a job may end before it has set its own."""
    own = tmp_path / "rays"
    own.mkdir()
    (tmp_path / "calls").write_text("")
    fakes = FAKES | ({"head": "exit 1"} if fails_early else {})
    code, _, left = run_slurm(tmp_path, 0, fakes=fakes, exported={"RAY_TMPDIR": str(own)})
    assert (bool(code), left) == (fails_early, set())
    assert own.exists()


def test_a_slurm_job_in_which_ray_does_not_start_has_failed(tmp_path: Path) -> None:
    """`ray symmetric-run` itself ends with 0."""
    fakes = FAKES | {"ray": 'echo "ray $*" >>"$CALLS"; echo "Failed to start Ray"'}
    code, calls, left = run_slurm(tmp_path, 1, fakes=fakes)
    assert (code, left) == (1, set())
    assert [call.split()[0] for call in calls] == ["srun", "ray"]


@pytest.mark.parametrize(("number", "requeued"), [(signal.SIGUSR1, True), (signal.SIGTERM, False)])
def test_a_slurm_job_whose_time_is_up_saves_and_is_queued_again(
    number: signal.Signals, requeued: bool, tmp_path: Path
) -> None:
    code, calls, left = run_slurm(tmp_path, 30, number)
    assert (code, left) == (143, set())
    assert calls[5:] == ["saved", *(["scontrol requeue 42"] if requeued else [])]
