"""`ifguide inspect`: the top documents of a run, masked tokens in red, or in ⟦ ⟧ where there are no colours."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from typing import NamedTuple, TextIO

import numpy as np

from ifguide.artifacts import require
from ifguide.config import OWN
from ifguide.display import visible, visible_pieces
from ifguide.report.view import ShownDocument, View, selected
from ifguide.selection.fdr import LARGEST
from ifguide.selection.folders import SelectionFolders
from ifguide.selection.outliers import dominant_line, outlier_line

RED, DIM, BOLD, RESET = "\x1b[1;31m", "\x1b[2m", "\x1b[1m", "\x1b[0m"


class Paint(NamedTuple):
    """What stands before and after each kind of text."""

    masked: tuple[str, str]
    gap: tuple[str, str]
    head: tuple[str, str]
    warning: tuple[str, str]


COLOURS = Paint(masked=(RED, RESET), gap=(DIM, RESET), head=(BOLD, RESET), warning=(RED, RESET))
PLAIN = Paint(masked=("⟦", "⟧"), gap=("", ""), head=("", ""), warning=("", ""))


def paint_for(stream: TextIO) -> Paint:
    """Colours on a terminal; the variables NO_COLOR and FORCE_COLOR, where not empty, decide before that."""
    if os.environ.get("NO_COLOR"):
        return PLAIN
    return COLOURS if os.environ.get("FORCE_COLOR") or stream.isatty() else PLAIN


def terminal_view(folders: SelectionFolders, *, documents: int, context: int, paint: Paint = COLOURS) -> Iterator[str]:
    """Lines for a terminal: a head for each document, then its tokens within `context` of a masked one.

    Raises:
        FileNotFoundError: the run has no mask yet.
    """
    manifest = require(folders.mask, "build_mask")
    summary = selected(manifest, folders.mask)
    if manifest.verb != "build_mask":
        made = f"imported from {visible(summary['source'])}" if "source" in summary else f"made by {manifest.verb}"
        share = f"{summary['tokens_masked']:,} of {summary['predicted_tokens']:,}"
        yield f"{share} tokens masked, {made}; there is no ranking to show"
        return
    if summary["behaviour"] != OWN:
        yield f"behaviour {visible(summary['behaviour'])}"
    view = View(folders)
    yield (
        f"{_tau_line(summary['tau'], view.measure_name)}, {summary['units_masked']:,} {summary['unit']}s touched,"
        f" {summary['tokens_masked']:,} of {summary['predicted_tokens']:,} tokens masked"
    )
    yield outlier_line(summary, manifest.options["build_mask"])
    if dominant := dominant_line(summary, manifest.options["build_mask"]):
        yield _within(paint.warning, dominant)
    for document in view.top_documents(documents):
        yield ""
        masked = int(document.masked.sum())
        source = _within(paint.head, f"{document.rank}. {visible(document.source)}")
        yield f"{source} rank score {document.rank_score:.4f}, {masked} masked"
        yield _painted(document, context, paint)


def _tau_line(tau: float, measure: str) -> str:
    return f"no {measure} is above tau" if tau == LARGEST else f"tau {tau:.6g} of the {measure}"


def _painted(document: ShownDocument, context: int, paint: Paint) -> str:
    places = np.flatnonzero(document.masked)
    shown = np.zeros(len(document.texts), dtype=bool)
    for place in places:
        shown[max(0, place - context) : place + context + 1] = True
    tokens = zip(visible_pieces(document.texts), document.masked.tolist(), shown.tolist(), strict=True)
    pieces = []
    for (masked, near), run in itertools.groupby(tokens, key=lambda token: token[1:]):
        if near:
            text = "".join(token for token, _, _ in run)
            pieces.append(_within(paint.masked, text) if masked else text)
        else:
            pieces.append(_within(paint.gap, " ... "))
    return "".join(pieces)


def _within(marks: tuple[str, str], text: str) -> str:
    return f"{marks[0]}{text}{marks[1]}"
