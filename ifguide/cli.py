"""The command line: `ifguide <verb> --config F [--set a.b=c ...] [--dry-run] [--address A]`, the same flags everywhere.

`ifguide run` does every verb in order; running again resumes. `plan` says beforehand what that takes. `show`, `status`
and `inspect` read a run directory, `export-mask` takes its mask to other trainers, `export-scores` and `import-mask`
exchange scores and masks with kronfluence and the paper's code, `demo` makes its own data and runs the whole pipeline
on them, `fetch-data` gets the real text of `configs/real_text.yaml`. The scripts in `jobs/` call `main` too.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from ifguide import extras, interrupts
from ifguide.artifacts import MANIFEST, PLAN, hold, read_manifest, write_text
from ifguide.config import OWN, VERBS, Config, Input, load_config, redact, to_yaml
from ifguide.datasets import FOLDER, advice
from ifguide.pipeline import pipeline_steps, run_pipeline, stage
from ifguide.storage import location
from ifguide.telemetry import configure_logging, log

USER_ERRORS = (ValueError, OSError)  # the latter of files: not there, not writable, no space left
STORE_ERRORS = "botocore."  # modules of what s3fs raises besides: no credentials, no connection


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, or 1 with one line of what is wrong and what to do."""
    options = _parser().parse_args(arguments)
    configure_logging()
    logging.getLogger("ray").setLevel(logging.WARNING)
    try:
        with interrupts.handled():
            return options.function(options)
    except KeyboardInterrupt as error:
        return _interrupted(options.command, error)
    except USER_ERRORS as error:
        print(f"ifguide {options.command}: {redact(str(error))}{advice(str(error))}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        if (missing := extras.advice(error)) is None:
            raise
        print(f"ifguide {options.command}: {missing}", file=sys.stderr)
        return 1
    except Exception as error:
        from ifguide.distributed.shards import StageError

        if interrupts.requested():  # it ended something that fails now
            return _interrupted(options.command, error)

        if not isinstance(error, StageError) and not type(error).__module__.startswith(STORE_ERRORS):
            raise
        print(f"ifguide {options.command}: {redact(str(error))}", file=sys.stderr)
        return 1


def _interrupted(command: str, error: BaseException) -> int:
    """Say what is kept, end what this process has started, and give the exit code."""
    kept = getattr(error, "kept", interrupts.KEPT)
    print(f"ifguide {command}: interrupted: {kept}; the same command goes on from there", file=sys.stderr)
    session = sys.modules.get("ifguide.distributed.session")
    if session is not None:
        session.disconnect()
    interrupts.end_children()
    return interrupts.exit_code()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ifguide", description="Influence-function-guided detoxification of LMs")
    parser.add_argument("--version", action="version", version=f"ifguide {_version()}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    verbs = {verb: commands.add_parser(verb, help=VERB_HELP[verb]) for verb in VERBS}
    for verb in VERBS:
        _add_config_flags(verbs[verb], _evaluate if verb == "evaluate" else _run_verb)
    verbs["evaluate"].add_argument(
        "--check-classifier", action="store_true", help="only compare the classifiers with the labels in check_data"
    )
    run = commands.add_parser("run", help="every verb in order; running again resumes")
    _add_config_flags(run, _run_all)
    run.add_argument("--until", choices=VERBS, help="the last verb to run (default: all)")
    _add_config_flags(commands.add_parser("compare", help="run, then train and measure compare.methods too"), _compare)
    looked = commands.add_parser("analyse", help="logit lens, linear probes, adversarial suffixes of a run's models")
    _add_config_flags(looked, _analyse)
    show = commands.add_parser("show", help="what each artifact of a run directory holds")
    show.add_argument("run_dir", type=location)
    show.set_defaults(function=_show)
    status = commands.add_parser("status", help="how far each stage of a run is, at any time, from its files alone")
    status.add_argument("run_dir", type=location)
    status.set_defaults(function=_status)
    _add_plan_flags(commands.add_parser("plan", help="hours, cost, storage and memory of every stage, beforehand"))
    inspect = commands.add_parser("inspect", help="the top documents of a run, masked tokens in red")
    inspect.add_argument("run_dir", type=location)
    inspect.add_argument("--documents", type=int, default=10, help="how many (default 10)")
    inspect.add_argument("--context", type=int, default=60, help="tokens shown around masked ones (default 60)")
    inspect.set_defaults(function=_inspect)
    export = commands.add_parser("export-scores", help="a run's token scores in kronfluence's own format")
    export.add_argument("run_dir", type=location)
    export.add_argument("out", type=Path, help="folder of a kronfluence analysis; scores_NAME is made in it")
    export.add_argument("--name", default="ifguide", help="what kronfluence knows the scores by (default ifguide)")
    export.add_argument(
        "--behaviour", default=OWN, help="one of the behaviours scored (default: own, the run's own query)"
    )
    export.add_argument("--max-gigabytes", type=float, default=8.0, help="refuse more than this (default 8)")
    export.set_defaults(function=_export_scores)
    masks = commands.add_parser("export-mask", help="a run's mask as other trainers read it")
    masks.add_argument("run_dir", type=location, help="or its folder target, of a target with another tokenizer")
    masks.add_argument("out", type=location, help="the folder to make")
    masks.add_argument(
        "--format", required=True, choices=("spans", "npy", "hf", "paper"), help="docs/other-trainers.md"
    )
    masks.add_argument("--penalty", type=float, default=1.0, help="hf: minus the weight of a masked token (default 1)")
    masks.set_defaults(function=_export_mask)
    imported = commands.add_parser("import-mask", help="a mask saved by the paper's code becomes the run's mask")
    _add_config_flags(imported, _import_mask, preflight=False)
    imported.add_argument("mask", type=Path, help="a .pt file: one bool tensor (blocks, tokens)")
    imported.add_argument(
        "--shift", type=int, default=0, help="tokens to move it right: 0 acts as in the paper's code (default)"
    )
    imported.add_argument(
        "--tokens", metavar="FILE", help="the blocks that the mask was built on: a table of token ids, or a .pt tensor"
    )
    imported.add_argument("--tokens-column", default="input_ids", help="the table's column (default input_ids)")
    init = commands.add_parser("init", help="write a first config of the documents that are found")
    init.add_argument("--data", action="append", default=[], metavar="GLOB", help="files, a folder or a pattern")
    init.add_argument(
        "--from", dest="base", metavar="NAME", help="extend a packaged config; `ifguide config` lists them"
    )
    init.add_argument("--out", type=Path, default=Path("ifguide.yaml"), help="the file to write (default ifguide.yaml)")
    init.set_defaults(function=_init)
    keys = commands.add_parser("config", help="the keys of a config: type, default, bounds, meaning")
    keys.add_argument("key", nargs="?", metavar="SECTION[.KEY]", help="default: the sections")
    keys.add_argument("--schema", action="store_true", help="JSON Schema of the config, or of a section: for editors")
    keys.set_defaults(function=_config)
    demo = commands.add_parser("demo", help="make the embedded corpus and run everything on it")
    demo.add_argument("--config", type=Path, default=Path("configs/demo.yaml"), help="default: the packaged one")
    demo.add_argument("--set", dest="overrides", action="append", default=[], metavar="a.b=c")
    demo.add_argument("--dry-run", action="store_true")
    demo.add_argument("--data-only", action="store_true", help="make the corpus and the prompts, and run nothing")
    demo.set_defaults(function=_demo)
    _add_fetch_flags(commands.add_parser("fetch-data", help="the real text of configs/real_text.yaml"))
    return parser


def _version() -> str:
    try:
        return version("ifguide")
    except PackageNotFoundError:  # a checkout on the path
        return "not installed"


VERB_HELP = {
    "pack_corpus": "tokenise documents and pack them into blocks",
    "pretrain": "train the target with the mask's penalty (or plainly: --set pretrain.use_mask=false)",
    "fit_factors": "EK-FAC factors of the proxy",
    "build_query": "the preconditioned query direction",
    "score_corpus": "one influence score per token",
    "build_mask": "rank documents, mask tokens (Algorithm 1)",
    "evaluate": "generate, classify, measure; the report page",
}


def _add_config_flags(
    parser: argparse.ArgumentParser, function: Callable[[argparse.Namespace], int], *, preflight: bool = True
) -> None:
    parser.add_argument("--config", type=Path, required=True, help="YAML file, or the name of a packaged one")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="a.b=c", help="override a key")
    parser.add_argument("--dry-run", action="store_true", help="check the config and say what would be done")
    parser.add_argument("--address", help="Ray cluster to join (default: RAY_ADDRESS, else a local one)")
    if preflight:
        parser.add_argument("--no-preflight", action="store_true", help="do not look first at what would fail later")
    parser.set_defaults(function=function)


def _add_plan_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, required=True, help="YAML file, or the name of a packaged one")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="a.b=c", help="override a key")
    parser.add_argument(
        "--corpus-tokens", type=float, help="default: of the packed corpus, else from the inputs' bytes"
    )
    parser.add_argument("--gpu", help="type (h100, a100, ...) or cpu; default h100, cpu if no stage asks for GPUs")
    parser.add_argument("--gpus", type=int, help="workers of every stage (default: the config's)")
    parser.add_argument("--price-per-hour", type=float, help="of one GPU, in any currency")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    parser.set_defaults(function=_plan)


def _add_fetch_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=FOLDER, help=f"the folder to make (default {FOLDER})")
    parser.add_argument("--from", dest="source", type=Path, help="folder of originals or of made files: no download")
    parser.add_argument("--dry-run", action="store_true", help="list files, origins and licences; fetch nothing")
    parser.set_defaults(function=_fetch_data)


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


def _run_verb(options: argparse.Namespace) -> int:
    from ifguide.run import Run

    config = _load_checked(options, options.command)
    with _holding(options, config):
        stage(options.command)(Run(config=config), dry_run=options.dry_run)
    return 0


def _evaluate(options: argparse.Namespace) -> int:
    if not options.check_classifier:
        return _run_verb(options)
    from ifguide.evaluation.agreement import check_classifiers

    config = _load_checked(options, "check_classifier")
    for agreement in check_classifiers(config.evaluate, config.seed):
        print(json.dumps(agreement))
    return 0


def _run_all(options: argparse.Namespace) -> int:
    run_pipeline(_load_checked(options), dry_run=options.dry_run, until=options.until)
    return 0


def _analyse(options: argparse.Namespace) -> int:
    from ifguide.run import Run
    from ifguide.stages.analyse import analyse

    run = Run(config=_load_checked(options, "analyse"))
    with _holding(options, run.config):
        made = analyse(run, dry_run=options.dry_run)
    if made:
        print((run.analyses / "analyses.md").read_text(encoding="utf-8"), end="")
    return 0


def _compare(options: argparse.Namespace) -> int:
    from ifguide.run import Run
    from ifguide.stages.compare import compare

    config = _load_checked(options, "compare")
    run = Run(config=config)
    with _holding(options, config):
        run_pipeline(config, dry_run=options.dry_run)
        made = compare(run, dry_run=options.dry_run)
    if made:
        print((run.folder / "compare" / "report" / "comparison.md").read_text(encoding="utf-8"), end="")
    return 0


def _init(options: argparse.Namespace) -> int:
    from ifguide.draft import draft_config

    if options.out.exists():
        raise FileExistsError(f"{options.out} exists; name another file by --out, or remove it")
    text, lines = draft_config(options.data, base=options.base, run_dir=f"runs/{options.out.stem}")
    write_text(options.out, text)
    load_config(options.out)
    print(*lines, f"wrote {options.out}; next: ifguide run --config {options.out} --dry-run", sep="\n")
    return 0


def _config(options: argparse.Namespace) -> int:
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


def _demo(options: argparse.Namespace) -> int:
    from ifguide.demo.pipeline import make_data, run_demo

    config = load_config(options.config, options.overrides)
    if options.dry_run:
        print(to_yaml(config))
        return 0
    with _holding(options, config):
        if options.data_only:
            log(options.command, f"made {make_data(config)}")
            return 0
        print(json.dumps(run_demo(config)))
    return 0


def _fetch_data(options: argparse.Namespace) -> int:
    from ifguide.datasets.fetch import describe, fetch
    from ifguide.datasets.table import read_table

    outputs = read_table()
    if options.dry_run:
        print("\n".join(describe(outputs, options.out)))
        return 0
    fetch(outputs, options.out, source=options.source)
    return 0


def _show(options: argparse.Namespace) -> int:
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


def _status(options: argparse.Namespace) -> int:
    from ifguide.run import FOLDERS
    from ifguide.status import run_status

    for line in run_status(options.run_dir, FOLDERS):
        print(line)
    return 0


def _plan(options: argparse.Namespace) -> int:
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


def _inspect(options: argparse.Namespace) -> int:
    from ifguide.report.terminal import terminal_view
    from ifguide.run import Run

    run = Run(config=Config(run_dir=str(options.run_dir)))
    for line in terminal_view(run.selection, documents=options.documents, context=options.context):
        print(line)
    return 0


def _export_scores(options: argparse.Namespace) -> int:
    from ifguide.interchange import export_scores

    names = {"name": options.name, "behaviour": options.behaviour}
    folder = export_scores(options.run_dir, options.out, max_gigabytes=options.max_gigabytes, **names)
    log(options.command, f"{folder}: kronfluence's Analyzer loads it as pairwise scores {options.name!r}")
    return 0


def _export_mask(options: argparse.Namespace) -> int:
    from ifguide.mask_export import export_mask

    manifest = export_mask(options.run_dir, options.out, kind=options.format, penalty=options.penalty)
    rows = ", ".join(f"{count:,} {unit}" for unit, count in manifest.rows.items())
    log(options.command, f"{options.out}: {rows}; docs/other-trainers.md shows how to train with it")
    return 0


def _import_mask(options: argparse.Namespace) -> int:
    from ifguide.interchange import check_mask, import_mask
    from ifguide.run import Run

    config = _load(options)
    run = Run(config=config)
    tokens = Input(path=options.tokens, tokens_column=options.tokens_column) if options.tokens else None
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
        f" {summary['tokens_dropped']:,} that carry no loss dropped; `ifguide pretrain` uses {run.mask}",
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
