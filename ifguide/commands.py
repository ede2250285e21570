"""What each command does, given the options of its command line (`ifguide.cli`); returns the exit code.

Heavy packages are imported by the command that needs them: `ifguide show` does not wait for torch.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from ifguide.artifacts import MANIFEST, PLAN, hold, publish, read_manifest, remove_tree
from ifguide.config import Config, Input, load_config, to_yaml
from ifguide.pipeline import pipeline_steps, run_pipeline, run_stage
from ifguide.storage import file_sizes, location, machine_folder, subfolders
from ifguide.telemetry import log


def place(text: str) -> Path:
    """`location` of an argument; what is wrong with it is said on the command line.

    Raises:
        ArgumentTypeError: see `location`.
    """
    try:
        return location(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def local_path(text: str) -> Path:
    """The path of what is made on this machine alone.

    Raises:
        ArgumentTypeError: it is remote.
    """
    if "://" in text:
        raise argparse.ArgumentTypeError(f"{text}: it is made on this machine; name a local path, and copy it then")
    return Path(text)


def _load(options: argparse.Namespace) -> Config:
    address = [f"cluster.address={options.address}"] if getattr(options, "address", None) else []
    return load_config(options.config, [*options.overrides, *address])


def _load_checked(options: argparse.Namespace, *verbs: str) -> Config:
    """The config, after a preflight of what `verbs` use: of those that `run` does for it, if none is named."""
    config = _load(options)
    if options.no_preflight:
        return config
    from ifguide.preflight import preflight

    if options.command in ("run", "compare"):
        steps = pipeline_steps(config, until=getattr(options, "until", None))
        verbs = (*dict.fromkeys(verb for verb, _ in steps), *verbs)
    for finding in preflight(config, verbs, elsewhere=options.dry_run):
        log("preflight", f"not checked: {finding}")
    return config


def _holding(options: argparse.Namespace, config: Config) -> contextlib.AbstractContextManager[None]:
    """The run directory, while this command works in it."""
    return contextlib.nullcontext() if options.dry_run else hold(location(config.run_dir), options.command)


def run_verb(options: argparse.Namespace) -> int:
    """One verb."""
    from ifguide.run import Run

    config = _load_checked(options, options.command)
    with _holding(options, config):
        run_stage(options.command, Run(config=config), dry_run=options.dry_run)
    return 0


def evaluate(options: argparse.Namespace) -> int:
    """`evaluate`, or how well the classifiers agree with labels."""
    if not options.check_classifier:
        return run_verb(options)
    config = _load_checked(options, "check_classifier")
    if options.dry_run:
        classifiers = [config.evaluate.classifier.name, *config.evaluate.classifiers]
        files = [texts.path for texts in config.evaluate.check_data]
        log("evaluate", f"would compare {', '.join(classifiers)} with the labels of {', '.join(files)}")
        return 0
    from ifguide.evaluation.agreement import check_classifiers

    for agreement in check_classifiers(config.evaluate, config.seed):
        print(json.dumps(agreement))
    return 0


def run_all(options: argparse.Namespace) -> int:
    """Every verb in order."""
    run_pipeline(_load_checked(options), dry_run=options.dry_run, until=options.until)
    return 0


def analyse(options: argparse.Namespace) -> int:
    """The analyses of a run's models; prints their tables."""
    from ifguide.run import Run
    from ifguide.stages.analyse import analyse

    run = Run(config=_load_checked(options, "analyse"))
    with _holding(options, run.config):
        made = analyse(run, dry_run=options.dry_run)
    if made:
        print((run.analyses / "analyses.md").read_text(encoding="utf-8"), end="")
    return 0


def compare(options: argparse.Namespace) -> int:
    """A run and its comparison; prints the table."""
    from ifguide.folders import REPORT
    from ifguide.run import Run
    from ifguide.stages.compare import compare

    config = _load_checked(options, "compare")
    run = Run(config=config)
    with _holding(options, config):
        run_pipeline(config, dry_run=options.dry_run)
        made = compare(run, dry_run=options.dry_run)
    if made:
        print((run.comparison / REPORT / "comparison.md").read_text(encoding="utf-8"), end="")
    return 0


def init(options: argparse.Namespace) -> int:
    """Write a first config."""
    from ifguide.draft import draft_config

    if options.out.exists():
        raise FileExistsError(f"{options.out} exists; name another file by --out, or remove it")
    text, lines = draft_config(options.data, base=options.base, run_dir=f"runs/{options.out.stem}")
    with publish(options.out) as part:  # not before it loads
        part.write_text(text, encoding="utf-8")
        load_config(part)
    print(*lines, f"wrote {options.out}; next: ifguide run --config {options.out} --dry-run", sep="\n")
    return 0


def explain(options: argparse.Namespace) -> int:
    """Print what keys mean, or the schema."""
    from ifguide.config.reference import find_key, terminal_lines
    from ifguide.config.schema import json_schema

    if not options.schema:
        print("\n".join(terminal_lines(options.key)))
        return 0
    section, key = find_key(options.key) if options.key else (Config, None)
    if key is not None:
        raise ValueError(f"--schema: {options.key} is no section; name one, or none for the whole config")
    print(json.dumps(json_schema(section), indent=1))
    return 0


def demo(options: argparse.Namespace) -> int:
    """The made corpus, and everything on it; prints the figures."""
    from ifguide.demo.pipeline import data_folder, make_data, run_demo

    config = load_config(options.config, options.overrides)
    data_folder(config)  # refuses a place where none can be made, before it is held
    if options.dry_run:
        print(to_yaml(config))
        return 0
    with _holding(options, config):
        if options.data_only:
            log(options.command, f"made {make_data(config)}")
            return 0
        print(json.dumps(run_demo(config)))
    return 0


def fetch_data(options: argparse.Namespace) -> int:
    """Fetch the real text, or list it."""
    from ifguide.datasets.fetch import describe, fetch
    from ifguide.datasets.table import read_table

    outputs = read_table()
    if options.dry_run:
        print("\n".join(describe(outputs, options.out)))
        return 0
    fetch(outputs, options.out, source=options.source)
    return 0


def cache(options: argparse.Namespace) -> int:
    """Print what this machine has copied, or remove it."""
    folder = machine_folder()
    sizes = {path: sum(file_sizes(path).values()) for path in subfolders(folder)}
    removing = options.action == "clear"
    done = "" if not removing else "would remove " if options.dry_run else "removed "
    for path, size in sizes.items():
        of = ", ".join(sorted(inner.name for inner in path.iterdir()))
        if removing and not options.dry_run:
            remove_tree(path)
        print(f"{done}{path}: {of} ({size / 1e6:,.1f} MB)")
    print(f"{folder}: {len(sizes)} in all, {sum(sizes.values()) / 1e6:,.1f} MB")
    return 0


def completion(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Print a shell's completions of the parser's commands and flags, and of files and folders they name."""
    import shtab

    for action in _actions(parser):
        if action.type in (Path, place):
            action.complete = shtab.DIRECTORY if action.type is place else shtab.FILE  # type: ignore[attr-defined]
    print(shtab.complete(parser, options.shell))
    return 0


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """A parser's arguments, and those of its commands."""
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _actions(command)


def show(options: argparse.Namespace) -> int:
    """Print what the artifacts of a run hold."""
    folders = sorted({path.parent for name in (MANIFEST, PLAN) for path in options.run_dir.rglob(name)})
    if not folders:
        raise FileNotFoundError(f"{options.run_dir} holds no artifacts; `ifguide run` makes them")
    for folder in folders:
        name = folder.relative_to(options.run_dir).as_posix()
        if not (folder / MANIFEST).exists():
            print(f"{name:16} unfinished; run its stage again to go on")
            continue
        manifest = read_manifest(folder)
        size = sum(entry["bytes"] for entry in manifest.files.values())
        rows = ", ".join(f"{count:,} {unit}" for unit, count in manifest.rows.items())
        print(f"{name:16} {manifest.fingerprint[:12]}  {rows}  ({size / 1e6:,.1f} MB, {manifest.seconds:,.0f} s)")
        for source, fingerprint in manifest.inputs.items():
            print(f"{'':16}   from {source} {fingerprint[:12]}")
        for key, value in manifest.summary.items():
            if not isinstance(value, dict | list):
                print(f"{'':16}   {key}: {value}")
    return 0


def status(options: argparse.Namespace) -> int:
    """Print how far a run is; with --watch again and again, until it is left or done."""
    from ifguide.folders import FOLDERS
    from ifguide.status import run_status

    while True:
        run = run_status(options.run_dir, FOLDERS)
        lines = [run.as_json()] if options.json else run.lines()
        clear = "\x1b[H\x1b[2J" if options.watch and sys.stdout.isatty() else ""
        print(clear + "\n".join(lines), flush=True)
        if not options.watch or run.holder is None or run.holder_has_ended:
            return 0
        time.sleep(options.watch)


def plan(options: argparse.Namespace) -> int:
    """Print what a run takes."""
    from ifguide.planning.command import as_json, plan
    from ifguide.planning.table import as_text

    logging.getLogger("ifguide.models").setLevel(logging.WARNING)
    result = plan(
        options.config,
        options.overrides,
        corpus_tokens=options.corpus_tokens,
        gpu=options.gpu,
        gpus=options.gpus,
        price_per_hour=options.price_per_hour,
    )
    print(as_json(result) if options.json else as_text(result))
    return 0


def inspect(options: argparse.Namespace) -> int:
    """Print a run's top documents."""
    from ifguide.report.terminal import paint_for, terminal_view
    from ifguide.run import Run

    run, paint = Run(config=Config(run_dir=str(options.run_dir))), paint_for(sys.stdout)
    for line in terminal_view(run.selection, documents=options.documents, context=options.context, paint=paint):
        print(line)
    return 0


def export_scores(options: argparse.Namespace) -> int:
    """Write scores as kronfluence reads them."""
    from ifguide.interchange import export_scores

    names = {"name": options.name, "behaviour": options.behaviour}
    folder = export_scores(options.run_dir, options.out, max_gigabytes=options.max_gigabytes, **names)
    log(options.command, f"{folder}: kronfluence's Analyzer loads it as pairwise scores {options.name!r}")
    return 0


def export_mask(options: argparse.Namespace) -> int:
    """Write a mask as other trainers read it."""
    from ifguide.mask_export import export_mask

    manifest = export_mask(options.run_dir, options.out, kind=options.format, penalty=options.penalty)
    rows = ", ".join(f"{count:,} {unit}" for unit, count in manifest.rows.items())
    log(options.command, f"{options.out}: {rows}; docs/other-trainers.md shows how to train with it")
    return 0


def push(options: argparse.Namespace) -> int:
    """Send a model to the hub, or print what would be sent."""
    from ifguide.push import planned_upload, send

    upload = planned_upload(options.run_dir, options.repository, model=options.model, report=options.report)
    if options.dry_run:
        print("\n".join(upload.lines()))
        return 0
    log(options.command, f"{send(upload, private=not options.public)}: {len(upload.files) + 1} files")
    return 0


def import_mask(options: argparse.Namespace) -> int:
    """Take a mask of the paper's code for a run's own."""
    from ifguide.interchange import check_mask, import_mask
    from ifguide.run import Run

    config = _load(options)
    run, tokens = Run(config=config), _blocks(options)
    if options.dry_run:
        check_mask(options.mask, run.corpus, tokens)
        log(options.command, f"would make {run.mask} of {options.mask}, shifted by {options.shift}")
        return 0
    with _holding(options, config):
        summary = import_mask(
            options.mask,
            corpus=run.corpus,
            folder=run.mask,
            tokens=tokens,
            shift=options.shift,
            config_yaml=to_yaml(config),
        ).summary
    log(
        options.command,
        f"{summary['tokens_masked']:,} of {summary['predicted_tokens']:,} tokens masked,"
        f" {summary['tokens_dropped']:,} that carry no loss dropped; `ifguide run` goes on from {run.mask}",
    )
    return 0


def import_scores(options: argparse.Namespace) -> int:
    """Take token scores of another program for a run's own."""
    from ifguide.run import Run
    from ifguide.score_import import check_scores, import_scores

    config, tokens = _load(options), _blocks(options)
    run = Run(config=config)
    if options.dry_run:
        scores = check_scores(options.scores, run.corpus, tokens, options.query)
        log(options.command, f"would make {run.scores} of {scores.sequences:,} sequences that {scores.made_by} scored")
        return 0
    places = {"corpus": run.corpus, "folder": run.scores, "tokens": tokens, "config_yaml": to_yaml(config)}
    with _holding(options, config):
        manifest = import_scores(options.scores, query=options.query, negate=options.negate, **places)
    log(options.command, f"{manifest.rows['tokens']:,} tokens; `ifguide run` goes on from {run.scores}")
    return 0


def _blocks(options: argparse.Namespace) -> Input | None:
    """The blocks that a file of another program is of, where the command line names them."""
    return Input(path=options.tokens, tokens_column=options.tokens_column) if options.tokens else None
