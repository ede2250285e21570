"""The verbs in order, each a stage of `ifguide.stages`."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable
from typing import Any

from ifguide.artifacts import hold, standing
from ifguide.config import VERBS, Config
from ifguide.run import STANDS_FOR, Run
from ifguide.telemetry import log


def run_pipeline(config: Config, *, dry_run: bool, until: str | None = None) -> None:
    """Every verb in order, up to `until`. The baseline is trained when it is wanted or serves as the proxy."""
    run, steps = Run(config=config), pipeline_steps(config, until=until)
    if brought := run.brought_in:
        log("run", f"{brought} made what {', '.join(STANDS_FOR[brought])} would make: they are left out")
    with contextlib.nullcontext() if dry_run else hold(run.folder, "run"):
        for verb, step in steps:
            run_stage(verb, step, dry_run=dry_run)
    if not dry_run and until in (None, VERBS[-1]):
        log("run", f"done: open {run.report / 'index.html'}")


def pipeline_steps(config: Config, *, until: str | None = None) -> list[tuple[str, Run]]:
    """The verbs that a config runs, in order, each with the run that it is given. Those are left out in whose place
    scores or a mask have come from elsewhere.

    Raises:
        ValueError: `until` is none of them.
    """
    run = Run(config=config)
    steps: list[tuple[str, Run]] = [("pack_corpus", run)]
    if config.baseline:
        steps.append(("pretrain", run.with_mask(False)))
    if config.build_query.factors is None:
        steps.append(("fit_factors", run))
    steps.append(("build_query", run))
    if config.score_corpus.uses_student:
        steps.append(("fit_student", run))
    steps += [(verb, run) for verb in ("score_corpus", "build_mask")]
    steps += [("pretrain", run.with_mask(True)), ("evaluate", run)]
    brought = run.brought_in
    stood_for = STANDS_FOR[brought] if brought else ()
    steps = [(verb, own) for verb, own in steps if verb not in stood_for]
    if until is not None:
        places = [place for place, (verb, _) in enumerate(steps) if verb == until]
        if not places:
            reason = f"{brought} stands for it" if until in stood_for else "this config does not run it"
            raise ValueError(f"--until {until}: {reason}")
        steps = steps[: places[-1] + 1]
    return steps


def run_stage(verb: str, run: Run, *, dry_run: bool) -> None:
    """One verb. A dry run says what is there of it already.

    Raises:
        MismatchError: it was made with other options.
    """
    if dry_run:
        folder = run.made_by(verb)
        state = standing(folder, run.options(verb))
        if state == "complete":
            log(verb, f"{folder} is complete, and is left alone unless its inputs have changed")
            return
        if state == "begun":
            log(verb, f"{folder} is begun, and is gone on with")
    stage(verb)(run, dry_run=dry_run)


def stage(verb: str) -> Callable[..., Any]:
    """The function of a verb; imported late, so that `--help` and `show` start at once."""
    assert verb in VERBS, verb
    return getattr(importlib.import_module(f"ifguide.stages.{verb}"), verb)
