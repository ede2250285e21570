"""`ifguide inspect`: the top documents of a run in a terminal, masked tokens in red."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ifguide.artifacts import require
from ifguide.config import OWN
from ifguide.display import visible
from ifguide.report.view import ShownDocument, View, selected
from ifguide.selection.folders import SelectionFolders
from ifguide.selection.outliers import dominant_line, outlier_line

RED, DIM, BOLD, RESET = "\x1b[1;31m", "\x1b[2m", "\x1b[1m", "\x1b[0m"


def terminal_view(folders: SelectionFolders, *, documents: int, context: int) -> Iterator[str]:
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
        f"tau {summary['tau']:.6g} of the {view.measure_name}, {summary['units_masked']:,} {summary['unit']}s touched,"
        f" {summary['tokens_masked']:,} of {summary['predicted_tokens']:,} tokens masked"
    )
    yield outlier_line(summary, manifest.options["build_mask"])
    if dominant := dominant_line(summary, manifest.options["build_mask"]):
        yield f"{RED}{dominant}{RESET}"
    for document in view.top_documents(documents):
        yield ""
        masked = int(document.masked.sum())
        source = f"{BOLD}{document.rank}. {visible(document.source)}{RESET}"
        yield f"{source} rank score {document.rank_score:.4f}, {masked} masked"
        yield _coloured(document, context)


def _coloured(document: ShownDocument, context: int) -> str:
    places = np.flatnonzero(document.masked)
    shown = np.zeros(len(document.texts), dtype=bool)
    for place in places:
        shown[max(0, place - context) : place + context + 1] = True
    pieces, skipping = [], False
    for text, masked, near in zip(document.texts, document.masked, shown, strict=True):
        if not near:
            if not skipping:
                pieces.append(f"{DIM} ... {RESET}")
            skipping = True
            continue
        skipping = False
        pieces.append(f"{RED}{visible(text)}{RESET}" if masked else visible(text))
    return "".join(pieces)
