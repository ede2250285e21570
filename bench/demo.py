"""The demo's figures: `python bench/demo.py [--seeds 0 1 2]`, one run per seed and the first seed once more.

Prints each run's JSON, then one line: per figure the values of all seeds, and whether the second run of the first
seed gave the same digests of corpus, factors, query, scores and mask. About seven minutes a run on two cores.
Draws `demo.png` in the folder of the runs: what the mask does to toxicity and to perplexity, seed by seed. `--redraw`
draws runs that are there.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from bench.common.places import this_machine
from ifguide.artifacts import publish
from ifguide.folders import BASELINE, CORPUS, FACTORS, MASK, PENALISED, QUERY, REPORT, SCORES

COMPARED = (CORPUS, FACTORS, QUERY, SCORES, MASK)
MODELS = {BASELINE: "plain model", PENALISED: "penalised model"}


def run_demo(seed: int, run_dir: Path) -> dict[str, float]:
    """One demo from nothing in `run_dir`; returns its last line."""
    shutil.rmtree(run_dir, ignore_errors=True)
    command = [sys.executable, "-m", "ifguide.cli", "demo", "--set", f"seed={seed}", "--set", f"run_dir={run_dir}"]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    figures = json.loads(output.splitlines()[-1])
    print(json.dumps({"seed": seed, **figures}), flush=True)
    return figures


def digests(run_dir: Path) -> dict[str, str]:
    """Fingerprints of the artifacts that must not change from run to run."""
    return {name: json.loads((run_dir / name / "manifest.json").read_text())["fingerprint"] for name in COMPARED}


def figures_of(run_dir: Path) -> dict[str, list[tuple[float, float, float]]]:
    """Figure -> value, low and high end of its 95% interval over prompts or texts, for each of `MODELS`."""
    metrics = json.loads((run_dir / REPORT / "metrics.json").read_text(encoding="utf-8"))
    models, evaluator = metrics["models"], metrics["evaluators"][0]
    figures: dict[str, list[tuple[float, float, float]]] = {}
    for model in MODELS:
        (prompts,) = models[model]["sets"].values()
        for figure, value in (
            ("share of prompts with a toxic continuation", prompts["groups"]["all"]["tp"][evaluator]),
            ("perplexity of harmless text", models[model]["benign_perplexity"]),
        ):
            figures.setdefault(figure, []).append((value["value"], value["low"], value["high"]))
    return figures


def draw(run_dirs: Mapping[int, Path], path: Path) -> None:
    """A panel for each figure: pairs of bars with intervals, one pair for each seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    runs = [figures_of(run_dir) for run_dir in run_dirs.values()]
    figure, panels = pyplot.subplots(1, len(runs[0]), figsize=(8, 2.8), layout="constrained")
    for axes, name in zip(panels, runs[0], strict=True):
        for place, (label, colour) in enumerate(zip(MODELS.values(), ("0.65", "tab:orange"), strict=True)):
            values = [run[name][place] for run in runs]
            ends = [[value - low for value, low, _ in values], [high - value for value, _, high in values]]
            places = [index + 0.38 * (place - 0.5) for index in range(len(runs))]
            means = [value for value, *_ in values]
            axes.bar(places, means, 0.36, yerr=ends, capsize=2, color=colour, label=label)
            for where, mean in zip(places, means, strict=True):
                axes.annotate(f"{mean:.3g}", (where, 0), (0, 4), textcoords="offset points", ha="center", fontsize=8)
        axes.set_title(name, fontsize=10)
        axes.set_xticks(range(len(runs)), [f"seed {seed}" for seed in run_dirs])
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False, fontsize=9
    )
    with publish(path) as part:
        figure.savefig(part, dpi=110, format="png")
    pyplot.close(figure)


def main() -> None:
    """Run all seeds, then the first one again."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, default=Path("runs/bench"))
    parser.add_argument("--once", action="store_true", help="leave the repetition of the first seed out")
    parser.add_argument("--redraw", action="store_true", help="only draw the picture, of the runs that are there")
    options = parser.parse_args()
    run_dirs = {seed: options.folder / f"demo-seed{seed}" for seed in options.seeds}
    if options.redraw:
        draw(run_dirs, options.folder / "demo.png")
        return
    runs = [run_demo(seed, run_dir) for seed, run_dir in run_dirs.items()]
    draw(run_dirs, options.folder / "demo.png")
    result: dict[str, object] = {"seeds": options.seeds, **{name: [run[name] for run in runs] for name in runs[0]}}
    if not options.once:
        first = options.seeds[0]
        run_demo(first, options.folder / "demo-again")
        result["same_digests"] = digests(run_dirs[first]) == digests(options.folder / "demo-again")
    result["machine"] = this_machine()
    print(json.dumps(result))


if __name__ == "__main__":
    main()
