"""A run: its config, its directory, and the Ray cluster it works on."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import ray

from ifguide import artifacts
from ifguide.config import Config, ConfigError, ModelSource, result_options, to_mapping, to_yaml
from ifguide.storage import location
from ifguide.telemetry import log

BASELINE, PENALISED = "baseline", "penalised"


@dataclass(frozen=True, kw_only=True)
class Run:
    """One config in one run directory. Artifact folders are named here and nowhere else."""

    config: Config
    lent: Mapping[str, Path] = field(default_factory=dict)  # artifacts that are another run's, by name

    @property
    def folder(self) -> Path:
        """The run directory, local (then absolute) or remote: Ray workers have another working directory."""
        return location(self.config.run_dir)

    corpus = property(lambda self: self._place("corpus"))
    factors = property(lambda self: self._place("factors"))
    query = property(lambda self: self._place("query"))
    scores = property(lambda self: self._place("scores"))
    ranking = property(lambda self: self._place("ranking"))
    mask = property(lambda self: self._place("mask"))
    analyses = property(lambda self: self.folder / "analyses")
    report = property(lambda self: self.folder / self.config.evaluate.report)

    def model(self, name: str) -> Path:
        """Folder of a trained model: `baseline` or `penalised`."""
        return self._place(f"model/{name}")

    def generations(self, model: str) -> Path:
        """Folder of a model's continuations, an artifact for each prompt set."""
        return self._place(f"generations/{model}")

    def _place(self, name: str) -> Path:
        return self.lent.get(name, self.folder / name)

    def artifact_folders(self) -> dict[str, Path]:
        """All artifact folders in pipeline order, whether they exist or not."""
        return {
            "corpus": self.corpus,
            "model/baseline": self.model(BASELINE),
            "factors": self.factors,
            "query": self.query,
            "scores": self.scores,
            "ranking": self.ranking,
            "mask": self.mask,
            "model/penalised": self.model(PENALISED),
            "report": self.report,
        }

    @property
    def proxy_source(self) -> ModelSource:
        """The proxy: as configured, or the baseline this run trained."""
        if self.config.proxy_is_baseline:
            return ModelSource(source=str(self.model(BASELINE) / "hf"))
        return self.config.proxy

    def require_proxy(self) -> None:
        """Refuse to go on when the proxy should be this run's baseline and that is not there."""
        if self.config.proxy_is_baseline:
            artifacts.require(self.model(BASELINE), "pretrain --set pretrain.use_mask=false")

    def open(
        self,
        folder: Path,
        verb: str,
        *,
        keys: tuple[str, ...],
        inputs: Mapping[str, str],
        extra: Mapping[str, Any] = {},
    ) -> artifacts.Artifact:
        """Open the artifact of a verb whose result depends on the config sections `keys` and on `inputs`."""
        options = {**result_options(self.config, keys), **extra}
        return artifacts.open_artifact(
            folder, verb=verb, options=options, inputs=inputs, config_yaml=to_yaml(self.config)
        )

    def with_mask(self, use_mask: bool) -> Run:
        """The same run for one of the two models that `pretrain` makes."""
        return replace(self, config=replace(self.config, pretrain=replace(self.config.pretrain, use_mask=use_mask)))

    def borrow(self, other: Run, *names: str) -> Run:
        """This run with artifacts of another one in place of its own: folders by their names in a run directory."""
        return replace(self, lent={**self.lent, **{name: other._place(name) for name in names}})


def model_mapping(source: ModelSource) -> dict[str, Any]:
    """A model source as a plain dict, for descriptors and settings that travel to workers."""
    return to_mapping(source)


def connect(config: Config) -> None:
    """Join the cluster named by `cluster.address` or RAY_ADDRESS, or start a local one; once per process."""
    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    address = _address(config)
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # the backend warns of what Ray Data does by design
    # Stages show their own progress; workers' output stays in Ray's logs, and their errors come back.
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address:
        ray.init(address=address, **options)
        return
    ray.init(
        address="local",  # without it Ray joins whatever cluster somebody has started on this machine
        num_cpus=config.cluster.num_cpus,
        include_dashboard=False,
        _node_ip_address="127.0.0.1",
        **options,
    )


def require_resources(config: Config, verb: str, kind: str, count: int = 1, *, cpus: float, gpus: float) -> None:
    """Refuse `count` processes that this machine can never hold: Ray would wait for ever. `kind`: of `cpus_per_<kind>`.

    A cluster that was joined may grow: there it says what it waits for.

    Raises:
        ConfigError: Ray runs on this machine alone, and that is too small.
    """
    wanted = {"CPU": cpus, "GPU": gpus}
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]

    def room(*names: str) -> int:
        each = [[node.get(name, 0) / wanted[name] for name in names if wanted[name]] for node in nodes]
        return sum(int(min(shares, default=count) + 1e-6) for shares in each)

    if room("CPU", "GPU") >= count:
        return
    key = f"{verb}.{'cpus' if room('GPU') >= count else 'gpus'}_per_{kind}"
    there = " and ".join(f"{sum(node.get(name, 0) for node in nodes):g} {name}" for name in wanted)
    text = f"{key}: {count} {kind}{'s' * (count > 1)} of {cpus:g} CPU and {gpus:g} GPU asked for, there are {there}"
    if not _address(config):
        raise ConfigError(f"{text}; lower it" + (" or their number" if count > 1 else ""))
    log(verb, f"waiting for the cluster to grow: {text}", level=logging.WARNING)


def _address(config: Config) -> str | None:
    """Of the cluster to join; None where Ray runs on this machine alone."""
    return config.cluster.address or os.environ.get("RAY_ADDRESS")
