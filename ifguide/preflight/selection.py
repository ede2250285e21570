"""What `build_mask` needs: a behaviour that is scored, nulls for z-scores, other runs' scores of the same corpus."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ifguide.artifacts import MANIFEST, read_manifest
from ifguide.config import OWN, Config
from ifguide.influence.query_file import NULLS
from ifguide.preflight.findings import Findings
from ifguide.selection.ensemble import find_scores, require_one_corpus
from ifguide.selection.measures import measure_of
from ifguide.storage import location


@dataclass(frozen=True, kw_only=True)
class SelectionChecks:
    """Of a run with these folders."""

    config: Config
    findings: Findings
    corpus: Path
    scores: Path

    def measure(self) -> None:
        """That scores that are there already, imported ones say, hold what the mask ranks tokens by."""
        if (self.scores / MANIFEST).exists():
            with self.findings.caught("build_mask", str(self.scores)):
                measure_of(self.config.build_mask, self.scores)

    def others(self) -> None:
        """That other runs' scores are there, and of one corpus: this run's, where it has been packed."""
        others, corpus = self.config.build_mask.others, self.corpus
        packed = (corpus / MANIFEST).exists()
        earlier: dict[str, Any] = {}
        for index, value in enumerate(others):
            name = f"others[{index}]"
            with self.findings.caught(f"build_mask.{name}", value):
                folder, manifest = find_scores(name, value, earlier)
                if packed:
                    require_one_corpus(f"{name}, {folder}", manifest, str(corpus), read_manifest(corpus).fingerprint)
                earlier[name] = folder, manifest
        if others and not packed:
            unknown = f"whether they are of {corpus}, which is not packed yet"
            self.findings.leave("build_mask.others", list(others), unknown)

    def nulls(self) -> None:
        """That the query of the mask's behaviour has null directions where z-scores are wanted."""
        options, number = self.config.build_mask, self.config.build_query.nulls
        if not options.standardise and options.fdr is None:
            return
        wanted = f"build_mask.{'standardise' if options.fdr is None else 'fdr'} wants null directions"
        if options.behaviour == OWN:
            if not number:
                self.findings.fault("build_query.nulls", number, f"{wanted}: set it to 4, say")
        elif (folder := self.config.score_corpus.queries.get(options.behaviour)) is not None:
            key = f"score_corpus.queries.{options.behaviour}"
            with self.findings.caught(key, folder):
                place = location(folder)
                if (place / MANIFEST).exists() and NULLS not in read_manifest(place).files:
                    self.findings.fault(
                        key, folder, f"{wanted}, and this query has none: build it with build_query.nulls (4, say)"
                    )

    def behaviour(self) -> None:
        """That the mask's behaviour is scored."""
        name, scored = self.config.build_mask.behaviour, (OWN, *self.config.score_corpus.queries)
        if name not in scored:
            self.findings.fault("build_mask.behaviour", name, f"not scored; choose one of {', '.join(scored)}")
