"""What the verbs that score have in common: their inputs, checked, and the decision how a run scores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ifguide.artifacts import Manifest, require, require_same
from ifguide.config import OWN, Config
from ifguide.config.resources import Resources
from ifguide.config.typed_yaml import result_part
from ifguide.distributed.session import connect
from ifguide.distributed.tasks import run_task
from ifguide.influence.decision import Decision, decide, describe_decision
from ifguide.influence.proxy import Beginning, ProxyFacts
from ifguide.influence.scoring_worker import ScoringSettings
from ifguide.run import Run
from ifguide.spans.tables import PackedCorpus
from ifguide.stages.proxy import read_proxy
from ifguide.storage import location
from ifguide.telemetry import log

SCORING = "scoring"  # among the options of a student
SCORING_KEYS = ("attribution", "preset", "engine", "precision", "rank", "fused", "micro_batch_blocks")


def scoring_options(config: Config) -> dict[str, Any]:
    """What exact scores depend on, of `score_corpus`."""
    options = result_part(config.score_corpus)
    return {name: options[name] for name in SCORING_KEYS}


@dataclass(frozen=True, kw_only=True)
class ScoringInputs:
    """Corpus and proxy; `inputs` are their fingerprints and those of the queries of all behaviours."""

    run: Run
    corpus: Manifest
    proxy: ProxyFacts
    beginning: Beginning
    inputs: Mapping[str, str]

    @classmethod
    def of(cls, run: Run, verb: str) -> ScoringInputs:
        """Those of a run; connects to the cluster.

        Raises:
            FileNotFoundError: a verb has not been run. MismatchError: a query is of another proxy. ValueError: the
                proxy does not read the corpus' tokens.
        """
        corpus, query = require(run.corpus, "pack_corpus"), require(run.query, "build_query")
        run.require_proxy()
        connect(run.config.cluster)
        proxy, beginning = read_proxy(run, verb)
        inputs = _queries(run, query, proxy, beginning)
        inputs |= {"corpus": corpus.fingerprint, "proxy": proxy.fingerprint, **beginning.inputs()}
        return cls(run=run, corpus=corpus, proxy=proxy, beginning=beginning, inputs=inputs)

    @property
    def packed(self) -> PackedCorpus:
        """The corpus as actors read it."""
        return PackedCorpus.of(self.run.corpus, self.corpus)

    @property
    def queries(self) -> dict[str, Path]:
        """The folder of each behaviour's query, the run's own first."""
        further = self.run.config.score_corpus.queries
        return {OWN: self.run.query} | {name: location(folder) for name, folder in further.items()}

    def settings(self, verb: str, folder: Path, resources: Resources, *, smoothed: bool = False) -> ScoringSettings:
        """What an actor scores with into `folder`, by the decision that lies there, or that is made now."""
        return ScoringSettings(
            corpus=self.packed,
            scores=folder,
            queries=self.queries,
            proxy=self.run.proxy_source,
            proxy_fingerprint=self.proxy.fingerprint,
            beginning=self.beginning,
            attribution=self.run.config.score_corpus.attribution,
            decision=Decision.read(folder) or self._decide(verb, folder, resources),
            gpus=resources.gpus,
            smoothed=smoothed,
        )

    def _decide(self, verb: str, folder: Path, resources: Resources) -> Decision:
        """Decide on a worker how the run scores, and publish it.

        Raises:
            ValueError: the chosen method does not agree with the exact one on the first blocks.
        """
        config, folders, first = self.run.config.score_corpus, list(self.queries.values()), self.corpus.names()[0]
        proxy = self.run.proxy_source, self.proxy.fingerprint, self.beginning
        decision, memory = run_task(decide, config, *proxy, folders, self.packed, first, resources=resources)
        log(verb, describe_decision(config, decision, memory))
        decision.require_agreement(config.min_agreement)
        decision.write(folder)
        return decision


def _queries(run: Run, query: Manifest, proxy: ProxyFacts, beginning: Beginning) -> dict[str, str]:
    """The fingerprints of the queries of all behaviours; all must be of the proxy."""
    require_same(
        f"the proxy of {run.query}",
        query.inputs["proxy"],
        f"the proxy {run.proxy_source.source}",
        proxy.fingerprint,
        "build the query of this proxy, or name the query's own",
    )
    beginning.require_of(run.query, query.inputs)
    inputs = {"query": query.fingerprint}
    for name, folder in run.config.score_corpus.queries.items():
        further = require(location(folder), "build_query")
        require_same(
            f"the proxy of {folder}", further.inputs["proxy"], "this run's", proxy.fingerprint, "build it of this proxy"
        )
        beginning.require_of(location(folder), further.inputs)
        inputs[f"query.{name}"] = further.fingerprint
    return inputs
