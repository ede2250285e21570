"""The command line: `ifguide <verb> --config F [--set a.b=c ...] [--dry-run] [--address A]`, the same flags everywhere.

`ifguide run` does every verb in order; running again resumes. `plan` says beforehand what that takes. `show`, `status`
and `inspect` read a run directory, `export-mask` takes its mask to other trainers, `push` its model to the hub.
`export-scores`, `import-scores` and `import-mask` exchange scores and masks with kronfluence, bergson and the paper's
code. `demo` makes its own data and runs the whole pipeline on them, `fetch-data` gets the real text of
`configs/real_text.yaml`. `cache` and `completion` look after this machine and its shell. The scripts in `jobs/` call
`main` too.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NoReturn

from ifguide import commands, extras, interrupts
from ifguide.config import OWN, VERBS, redact
from ifguide.datasets import FOLDER, advice
from ifguide.storage import is_store_error
from ifguide.telemetry import configure_logging

USER_ERRORS = (ValueError, OSError)  # the latter of files: not there, not writable, no space left
PRINTING = ("show", "status", "inspect", "plan", "config", "completion")  # commands that do nothing else
SHELLS = ("bash", "zsh", "tcsh")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, or 1 with one line of what is wrong and what to do."""
    options = _parser().parse_args(arguments)
    configure_logging()
    logging.getLogger("ray").setLevel(logging.WARNING)
    try:
        with interrupts.handled():
            code: int = options.function(options)
            sys.stdout.flush()
            return code
    except KeyboardInterrupt as error:
        return _interrupted(options.command, error)
    except USER_ERRORS as error:
        if isinstance(error, BrokenPipeError) and options.command in PRINTING:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # nobody reads on, as behind `| head`
            return 0
        print(f"ifguide {options.command}: {redact(str(error))}{advice(str(error))}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        if (missing := extras.advice(error)) is None:
            raise
        print(f"ifguide {options.command}: {missing}", file=sys.stderr)
        return 1
    except Exception as error:
        from ifguide.distributed.tasks import StageError

        if interrupts.requested():  # it ended something that fails now
            return _interrupted(options.command, error)

        if not isinstance(error, StageError) and not is_store_error(error):
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


class _Parser(argparse.ArgumentParser):
    """Says how a config is named where none is."""

    def error(self, message: str) -> NoReturn:
        hint = f", as in `{self.prog} --config mine.yaml`" if message.endswith("required: --config") else ""
        super().error(message + hint)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="ifguide", description="Influence-function-guided detoxification of LMs")
    parser.add_argument("--version", action="version", version=f"ifguide {_version()}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="command")

    def command(name: str, text: str) -> argparse.ArgumentParser:
        return subparsers.add_parser(name, help=text, description=text)

    verbs = {verb: command(verb, VERB_HELP[verb]) for verb in VERBS}
    for verb in VERBS:
        _add_config_flags(verbs[verb], commands.evaluate if verb == "evaluate" else commands.run_verb)
    verbs["evaluate"].add_argument(
        "--check-classifier", action="store_true", help="only compare the classifiers with the labels in check_data"
    )
    run = command("run", "every verb in order; running again resumes")
    _add_config_flags(run, commands.run_all)
    run.add_argument("--until", choices=VERBS, help="the last verb to run; pretrain: the masked one (default: all)")
    _add_config_flags(command("compare", "run, then train and measure compare.methods too"), commands.compare)
    looked = command("analyse", "logit lens, linear probes, adversarial suffixes of a run's models")
    _add_config_flags(looked, commands.analyse)
    show = command("show", "what each artifact of a run directory holds")
    show.add_argument("run_dir", type=commands.place)
    show.set_defaults(function=commands.show)
    status = command("status", "how far each stage of a run is, at any time, from its files alone")
    status.add_argument("run_dir", type=commands.place)
    status.add_argument("--json", action="store_true", help="one JSON object")
    status.add_argument(
        "--watch",
        type=float,
        nargs="?",
        const=5.0,
        metavar="SECONDS",
        help="again every so often, while it is worked on",
    )
    status.set_defaults(function=commands.status)
    _add_plan_flags(command("plan", "hours, cost, storage and memory of every stage, beforehand"))
    inspect = command("inspect", "the top documents of a run, masked tokens in red")
    inspect.add_argument("run_dir", type=commands.place)
    inspect.add_argument("--documents", type=int, default=10, help="how many (default 10)")
    inspect.add_argument("--context", type=int, default=60, help="tokens shown around masked ones (default 60)")
    inspect.set_defaults(function=commands.inspect)
    export = command("export-scores", "a run's token scores in kronfluence's own format")
    export.add_argument("run_dir", type=commands.place)
    export.add_argument(
        "out", type=commands.local_path, help="folder of a kronfluence analysis; scores_NAME is made in it"
    )
    export.add_argument("--name", default="ifguide", help="what kronfluence knows the scores by (default ifguide)")
    export.add_argument(
        "--behaviour", default=OWN, help="one of the behaviours scored (default: own, the run's own query)"
    )
    export.add_argument("--max-gigabytes", type=float, default=8.0, help="refuse more than this (default 8)")
    export.set_defaults(function=commands.export_scores)
    masks = command("export-mask", "a run's mask as other trainers read it")
    masks.add_argument("run_dir", type=commands.place, help="or its folder target, of a target with another tokenizer")
    masks.add_argument("out", type=commands.place, help="the folder to make")
    masks.add_argument(
        "--format", required=True, choices=("spans", "npy", "hf", "paper"), help="docs/other-trainers.md"
    )
    masks.add_argument("--penalty", type=float, default=1.0, help="hf: minus the weight of a masked token (default 1)")
    masks.set_defaults(function=commands.export_mask)
    pushed = command("push", "a trained model to the Hugging Face hub, its figures on its card")
    pushed.add_argument("run_dir", type=commands.place)
    pushed.add_argument("repository", metavar="OWNER/NAME")
    pushed.add_argument("--model", choices=("penalised", "baseline"), default="penalised", help="default: penalised")
    pushed.add_argument("--report", default="report", help="folder of its figures in the run (default report)")
    pushed.add_argument("--public", action="store_true", help="for everybody to see; else the repository is private")
    pushed.add_argument("--dry-run", action="store_true", help="say what would be sent, offline")
    pushed.set_defaults(function=commands.push)
    imported = command("import-mask", "a mask saved by the paper's code becomes the run's mask")
    _add_config_flags(imported, commands.import_mask, preflight=False)
    imported.add_argument("mask", type=Path, help="a .pt file: one bool tensor (blocks, tokens)")
    imported.add_argument(
        "--shift", type=int, default=0, help="tokens to move it right: 0 acts as in the paper's code (default)"
    )
    _add_tokens_flags(imported)
    scored = command("import-scores", "token scores of bergson or kronfluence become the run's own")
    _add_config_flags(scored, commands.import_scores, preflight=False)
    scored.add_argument("scores", type=Path, help="the folder that the program wrote")
    scored.add_argument("--query", type=int, help="which of several queries, from 0")
    scored.add_argument("--negate", action="store_true", help="high scores mean the behaviour gets less likely")
    _add_tokens_flags(scored)
    init = command("init", "write a first config of the documents that are found")
    init.add_argument("--data", action="append", default=[], metavar="GLOB", help="files, a folder or a pattern")
    init.add_argument(
        "--from", dest="base", metavar="NAME", help="extend a packaged config; `ifguide config` lists them"
    )
    init.add_argument(
        "--out",
        type=commands.local_path,
        default=Path("ifguide.yaml"),
        help="the file to write (default ifguide.yaml)",
    )
    init.set_defaults(function=commands.init)
    keys = command("config", "the keys of a config: type, default, bounds, meaning")
    keys.add_argument("key", nargs="?", metavar="SECTION[.KEY]", help="default: the sections")
    keys.add_argument("--schema", action="store_true", help="JSON Schema of the config, or of a section: for editors")
    keys.set_defaults(function=commands.explain)
    demo = command("demo", "make the embedded corpus and run everything on it")
    demo.add_argument("--config", type=Path, default=Path("configs/demo.yaml"), help="default: the packaged one")
    demo.add_argument("--set", dest="overrides", action="append", default=[], metavar="a.b=c")
    demo.add_argument("--dry-run", action="store_true")
    demo.add_argument("--data-only", action="store_true", help="make the corpus and the prompts, and run nothing")
    demo.set_defaults(function=commands.demo)
    _add_fetch_flags(command("fetch-data", "the real text of configs/real_text.yaml"))
    cache = command("cache", "this machine's copies of remote files: what each takes")
    cache.add_argument("action", nargs="?", choices=("clear",), help="remove all of them; no run may be using them")
    cache.add_argument("--dry-run", action="store_true", help="say what `clear` would remove")
    cache.set_defaults(function=commands.cache)
    completion = command("completion", "print the shell's completion script")
    completion.add_argument("shell", choices=SHELLS)
    completion.set_defaults(function=lambda options: commands.completion(options, _parser()))
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
    "fit_student": "a cheaper scorer that learns from a sample, for score_corpus.scorer: student or cascade",
    "score_corpus": "one influence score per token",
    "build_mask": "rank documents, mask tokens (Algorithm 1)",
    "evaluate": "generate, classify, measure; the report page",
}


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, required=True, help="YAML file, or the name of a packaged one")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="a.b=c", help="override a key")


def _add_config_flags(
    parser: argparse.ArgumentParser, function: Callable[[argparse.Namespace], int], *, preflight: bool = True
) -> None:
    _add_config(parser)
    parser.add_argument("--dry-run", action="store_true", help="check the config and say what would be done")
    parser.add_argument("--address", help="Ray cluster to join (default: RAY_ADDRESS, else a local one)")
    if preflight:
        parser.add_argument("--no-preflight", action="store_true", help="skip the checks before a run")
    parser.set_defaults(function=function)


def _add_tokens_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tokens", metavar="FILE", help="the blocks that it was built on: a table of token ids, or a .pt tensor"
    )
    parser.add_argument("--tokens-column", default="input_ids", help="the table's column (default input_ids)")


def _add_plan_flags(parser: argparse.ArgumentParser) -> None:
    _add_config(parser)
    parser.add_argument(
        "--corpus-tokens", type=float, help="default: of the packed corpus, else from the inputs' bytes"
    )
    parser.add_argument("--gpu", help="type (h100, a100, ...) or cpu; default h100, cpu if no stage asks for GPUs")
    parser.add_argument("--gpus", type=int, help="workers of every stage (default: the config's)")
    parser.add_argument("--price-per-hour", type=float, help="of one GPU, in any currency")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    parser.set_defaults(function=commands.plan)


def _add_fetch_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", type=commands.local_path, default=FOLDER, help=f"the folder to make (default {FOLDER})"
    )
    parser.add_argument("--from", dest="source", type=Path, help="folder of originals or of made files: no download")
    parser.add_argument("--dry-run", action="store_true", help="list files, origins and licences; fetch nothing")
    parser.set_defaults(function=commands.fetch_data)


if __name__ == "__main__":
    sys.exit(main())
