"""What `score_corpus` says of scores that a student made, in words: for status and report. Light to import."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

SUMMARY = "student"  # in the summary of scores
RECHECK_SHARE = 0.1  # of the tokens: what the exact pass may read again
NAMED = 10  # sources, at most: a folder of texts has as many as it has files


def audit_lines(summary: Mapping[str, Any]) -> dict[str, str]:
    """What made the scores and what their audit found, by name; empty where all are exact."""
    said = summary.get(SUMMARY)
    if said is None:
        return {}
    whole, top = said["whole"], f"{said['top_share']:.0%}"
    figure, where = counted(cascade=said["scorer"] == "cascade")
    title = f"exact top {top} in {where}"
    worst = sorted(said["by_source"].items(), key=lambda item: _value(item[1][figure]))
    by_source = [f"{name} {interval(own[figure])}" for name, own in worst]
    lines = {
        "scores": f"{said['scorer']} with a student of kind {said['kind']}, {said['exact_blocks']:,} blocks exactly",
        "audit of the scores": f"{said['audited_blocks']:,} random blocks: Spearman {interval(whole['spearman'])} with"
        f" the exact scores, overlap of the top {top} {interval(whole['overlap'])}",
        title: interval(whole[figure]),
    }
    if len(by_source) > 1:
        lines[f"{title}, by source"] = listed(by_source, said.get("audited_sources"), between="; ")
    if said["unaudited"]:
        lines["sources without an audited block"] = listed(said["unaudited"], said.get("unaudited_sources"))
    return lines


def audit_line(summary: Mapping[str, Any]) -> str:
    """The least of it; empty where all scores are exact."""
    said = summary.get(SUMMARY)
    if said is None:
        return ""
    figure, where = counted(cascade=said["scorer"] == "cascade")
    return f"{said['scorer']}: {interval(said['whole'][figure])} of the exact top {said['top_share']:.0%} in {where}"


def counted(*, cascade: bool) -> tuple[str, str]:
    """Which figure of a certificate counts for a cascade or a student alone, and where it looks for the exact top."""
    return ("rechecked", "rechecked blocks") if cascade else ("recall", f"the student's top {RECHECK_SHARE:.0%}")


def listed(texts: Sequence[str], count: int | None = None, *, between: str = ", ") -> str:
    """The first `NAMED` of `count` texts, and how many more there are. None: there are no others than `texts`."""
    shown = texts[:NAMED]
    more = (len(texts) if count is None else count) - len(shown)
    return between.join([*shown, *([f"{more:,} more"] if more else [])])


def _value(figure: Mapping[str, Any]) -> float:
    """What figures are sorted by: undefined ones come last."""
    return math.inf if figure["value"] is None else float(figure["value"])


def interval(figure: Mapping[str, Any]) -> str:
    """A figure of a certificate with its interval."""
    if None in (figure["value"], figure["low"], figure["high"]):
        return "undefined"
    return f"{figure['value']:.3f} [{figure['low']:.3f}, {figure['high']:.3f}]"
