"""How far `ifguide plan` is from runs that were made: the relative error of the predicted seconds, stage by stage.

    python bench/plan_error.py RUN_DIR[=CONFIG] ... [--gpu cpu]

A run is planned from the config that its manifests hold (or CONFIG, where an older version made the run) and from its
own number of tokens; nothing else of it is used. Error = predicted / actual - 1, `within` is the share of stages whose
actual time lies in the predicted range. Predicted and actual seconds of every stage go to stderr; one JSON object is
printed last. A run that `measurements.yaml` was taken from says little of the error.

Runs resumed or made beside other work took longer than they had to: the manifests do not tell.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from ifguide.artifacts import MANIFEST, read_manifest
from ifguide.config import ConfigError
from ifguide.planning.command import plan

# A stage -> the artifacts whose times add up to its own; ranking and mask are made together.
ARTIFACTS = {
    "pack_corpus": ["corpus"],
    "fit_factors": ["factors"],
    "build_query": ["query"],
    "score_corpus": ["scores"],
    "build_mask": ["mask"],
    "pretrain": ["model/baseline", "model/penalised"],
    "evaluate": ["report"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN_DIR[=CONFIG]")
    parser.add_argument("--gpu", default="cpu", help="the machine the runs were made on (default cpu)")
    options = parser.parse_args()
    runs = [compare(*_split(text), gpu=options.gpu) for text in options.runs]
    errors: dict[str, list[float]] = {}
    within = []
    for run in runs:
        for stage, entry in run.items():
            errors.setdefault(stage, []).append(entry["predicted"] / entry["actual"] - 1)
            within.append(entry["low"] <= entry["actual"] <= entry["high"])
    result: dict[str, Any] = {stage: round(statistics.median(values), 2) for stage, values in errors.items()}
    everything = [abs(value) for values in errors.values() for value in values]
    result |= {
        "median_absolute_error": round(statistics.median(everything), 2),
        "within": round(sum(within) / len(within), 2),
        "runs": len(runs),
    }
    print(json.dumps(result))


def _split(text: str) -> tuple[Path, Path | None]:
    folder, _, config = text.partition("=")
    return Path(folder), Path(config) if config else None


def compare(run: Path, config: Path | None, *, gpu: str) -> dict[str, dict[str, float]]:
    """Of each finished stage of a run: `actual`, `predicted`, `low`, `high`, in seconds.

    Raises:
        SystemExit: no corpus, or a config that this version cannot read.
    """
    if not (run / "corpus" / MANIFEST).is_file():
        raise SystemExit(f"{run}: no finished corpus; name a run directory")
    corpus = read_manifest(run / "corpus")
    overrides = [f"pack_corpus.block_size={corpus.summary['block_size']}"]
    source = config or next(path for path in sorted(run.rglob("config.yaml")) if (path.parent / MANIFEST).is_file())
    if "vocab_size" in corpus.summary:
        overrides.append(f"target.architecture.vocab_size={corpus.summary['vocab_size']}")
    if (run / "factors" / MANIFEST).is_file():
        overrides.append(f"fit_factors.sample_blocks={read_manifest(run / 'factors').rows['blocks']}")
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "config.yaml"
        copy.write_text(source.read_text())
        try:
            stages = plan(copy, overrides, corpus_tokens=float(corpus.rows["tokens"]), gpu=gpu)["stages"]
        except ConfigError as error:
            raise SystemExit(f"{source}: {error}\nname the config as {run}=CONFIG") from error
    entries = {}
    for stage in stages:
        folders = [run / name for name in ARTIFACTS[stage["stage"]] if (run / name / MANIFEST).is_file()]
        if not folders or len(folders) < len(ARTIFACTS[stage["stage"]]):
            continue
        if stage["stage"] == "score_corpus" and "method" not in read_manifest(folders[0]).summary:
            print(f"{run}: scored by an older method, left out", file=sys.stderr)
            continue
        hours = stage["hours"]
        entry = {
            "actual": sum(read_manifest(path).seconds for path in folders),
            "predicted": 3600 * hours["expected"],
            "low": 3600 * hours["low"],
            "high": 3600 * hours["high"],
        }
        entries[stage["stage"]] = entry
        print(
            f"{run} {stage['stage']:13} actual {entry['actual']:8.1f} s  predicted {entry['predicted']:8.1f}"
            f" ({entry['low']:.1f} - {entry['high']:.1f})",
            file=sys.stderr,
        )
    return entries


if __name__ == "__main__":
    main()
