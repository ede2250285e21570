"""What each mask source gives for its price on real text, over a sweep of penalties and several seeds.

    python bench/real_text.py [--behaviours explicit implicit] [--seeds 0 1 2 3 4] [--penalties 0 0.5 1 2]
                              [--budgets SHARE ...] [--methods NAME ...] [--proxy smollm2|configured|SOURCE]
                              [--at 1.03] [--set a.b=c] [--record] [--recorded]

A behaviour is a config, `configs/real_text.yaml` or `configs/real_text_implicit.yaml`. Its corpus is packed and its
factors are fitted once; queries, scores and masks are of each seed. Then `ifguide compare` trains a model for every
source of the config's masks and every penalty, with the same loss, in `<run_dir>/seeds/<N>`; a penalty of 0 is
`ignore`. `--budgets` adds masks of other shares of the tokens, of the sources that have scores: what is selected unit
by unit has the quantile that leaves as many. They are points of the same front. Methods with a loss of their own,
filters, DPO and RAD are points beside the fronts. Seeds vary initial weights, the order of blocks, the queries and the
sampling. `--methods` takes some of the config's alone. Running it again resumes. `--record` keeps each seed's rows in
`bench/records/real_text`; `--recorded` takes a seed from there where it has one made with the same options.

Toxicity at equal benign perplexity is read off each front (`bench.common.fronts`), by every evaluator of the config;
the first one is what the filters learn from, the others no method has learned from. So is the margin of annotated
text: by how many nats a token what people marked has become less likely than the rest, in documents that no model has
seen (`ifguide.evaluation.annotated`); of it "over" is a difference. Intervals are of Student's t over seeds, of
logarithms of ratios.

Written to `<run_dir>/seeds`: `fronts.md`, `fronts.png`. The last line printed is one JSON object: per behaviour and
source `emt_ratio`, `tp_ratio` at `--at` by the first evaluator, `emt_ratio_independent` by `held_out`, each with its
interval, and the same over the word list's and over the run's own mask's. `ifguide fetch-data` makes the data that the
configs name.
"""

from __future__ import annotations

import argparse
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from bench.common.fronts import Interval, Point, at_perplexity, compare_sources, over_seeds
from bench.common.places import this_machine
from bench.common.proxies import source_overrides
from bench.common.recorded import Record, read_record, record_path, write_record
from ifguide.artifacts import publish
from ifguide.config import Config, load_config
from ifguide.config.compare import INFLUENCE, SCORED, Method
from ifguide.datasets import advice
from ifguide.display import markdown_table
from ifguide.evaluation.figures import MARGINS
from ifguide.folders import CORPUS, FACTORS, REPORT
from ifguide.pipeline import run_pipeline, stage
from ifguide.run import Run
from ifguide.stages.compare import compare
from ifguide.telemetry import configure_logging, log

CONFIGS = {"explicit": Path("configs/real_text.yaml"), "implicit": Path("configs/real_text_implicit.yaml")}
OWN: Literal["influence"] = "influence"  # the run's own mask among the sources
INDEPENDENT = "held_out"  # the evaluator of the configs that has other rows of the queries' kind of label
BASES = ("word_list", OWN)  # what the others are compared with, seed by seed
FIGURES = ("emt", "tp")
Rows = Sequence[Mapping[str, Any]]  # of a seed's comparison.json


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """What every mask source is trained with: each penalty, with its own mask and one of each further budget."""

    sources: Mapping[str, Method]
    penalties: Sequence[float]
    budgets: Sequence[float] = ()  # shares of the predicted tokens, for sources with scores and no budget of their own

    def lines(self, source: str) -> dict[float | None, Method]:
        """Budget -> the source's mask; None: the one that it has without."""
        method = self.sources[source]
        lines: dict[float | None, Method] = {None: method}
        if method.max_fraction is not None or method.mask not in (*SCORED, *INFLUENCE):
            return lines
        by_units = method.keeps_mask or method.selection == "units"
        for budget in self.budgets:
            own = replace(method, max_fraction=budget)
            lines[budget] = replace(own, selection="units", quantile=round(1 - budget, 6)) if by_units else own
        return lines

    def models(self, source: str) -> list[str]:
        """The names of a source's models, budget by budget, each in the order of the penalties."""
        return [model_name(source, penalty, budget) for budget in self.lines(source) for penalty in self.penalties]


def main() -> None:
    options = _options()
    configure_logging()
    results, recorded = {}, {}
    for behaviour in options.behaviours:
        overrides = [*source_overrides(options.proxy, "proxy.source"), *options.overrides]
        config = load_config(CONFIGS[behaviour], overrides)
        if options.methods is not None:
            config = replace(config, compare=replace(config.compare, methods=some_of(config, options.methods)))
        sweep = Sweep(sources=sources_of(config), penalties=options.penalties, budgets=options.budgets)
        config = replace(config, compare=replace(config.compare, methods=swept(config, sweep)))
        records = _records(behaviour, config, options) if options.recorded else {}
        seeds = []
        for seed in options.seeds:
            seeds.append(records[seed].rows if seed in records else _compared(config, seed))
            if options.record and seed not in records:
                write_record(record_path(behaviour, seed), config, _report_of(config, seed), proxy=options.proxy)
        results[behaviour] = figures_at(seeds, sweep, options.at)
        recorded[behaviour] = {seed: record.made for seed, record in records.items()}
        folder = Path(config.run_dir) / "seeds"
        with publish(folder / "fronts.md") as part:
            part.write_text(as_markdown(results[behaviour], others_of(seeds, sweep)), "utf-8")
        draw(seeds, sweep, folder / "fronts.png", at=options.at)
    shared = {name: getattr(options, name) for name in ("at", "seeds", "penalties", "budgets")}
    print(json.dumps({**results, **shared, "recorded": recorded, "machine": this_machine()}))


def _records(behaviour: str, config: Config, options: argparse.Namespace) -> dict[int, Record]:
    """The records of the seeds that have one."""
    records = {seed: read_record(record_path(behaviour, seed), config, proxy=options.proxy) for seed in options.seeds}
    return {seed: record for seed, record in records.items() if record is not None}


def _seeded(config: Config, seed: int) -> Config:
    return replace(config, seed=seed, run_dir=str(Run(config=config).folder / "seeds" / str(seed)))


def _report_of(config: Config, seed: int) -> Path:
    return Run(config=_seeded(config, seed)).comparison / REPORT


def _compared(config: Config, seed: int) -> Rows:
    """The rows of one seed's comparison, which is made where it is not there. Seeds share corpus and factors."""
    try:
        run_pipeline(replace(config, baseline=config.proxy_is_baseline), dry_run=False, until="fit_factors")
    except FileNotFoundError as error:
        raise SystemExit(f"{error}{advice(str(error))}") from error
    run = Run(config=_seeded(config, seed)).borrow(Run(config=config), CORPUS, FACTORS)
    for verb in ("build_query", "score_corpus", "build_mask"):
        stage(verb)(run)
    for use_mask in (False, True):
        stage("pretrain")(run.with_mask(use_mask))
    compare(run)
    rows: Rows = json.loads((_report_of(config, seed) / "comparison.json").read_text(encoding="utf-8"))
    log("real_text", f"seed {seed}: {json.dumps({row['model']: row['emt'][0] for row in rows})}")
    return rows


def some_of(config: Config, names: Sequence[str]) -> dict[str, Method]:
    """Some of the config's methods."""
    methods = config.compare.methods
    if unknown := sorted(set(names) - set(methods)):
        raise SystemExit(f"--methods: {', '.join(unknown)}: none of {', '.join(methods)}")
    return {name: method for name, method in methods.items() if name in names}


def sources_of(config: Config) -> dict[str, Method]:
    """The methods of the config that have a mask and the run's own loss, and the run's own mask first."""
    return {OWN: Method(mask=OWN)} | {
        name: method
        for name, method in config.compare.methods.items()
        if method.mask is not None and method.objective is None and method.penalty is None
    }


def swept(config: Config, sweep: Sweep) -> dict[str, Method]:
    """The methods of the config without a source, and one for every source, budget and penalty."""
    methods = {name: method for name, method in config.compare.methods.items() if name not in sweep.sources}
    for source in sweep.sources:
        for budget, method in sweep.lines(source).items():
            for penalty in sweep.penalties:
                own = replace(method, penalty=penalty)
                methods[model_name(source, penalty, budget)] = own if penalty else replace(own, objective="ignore")
    return methods


def model_name(source: str, penalty: float, budget: float | None = None) -> str:
    """Of a source's model in the comparison: `probe_050` for a penalty of 0.5, `probe_150bp_050` for that and a mask of
    1.5% of the tokens."""
    share = "" if budget is None else f"_{round(10_000 * budget)}bp"
    return f"{source}{share}_{round(100 * penalty):03d}"


def evaluators_of(seeds: Sequence[Rows]) -> list[str]:
    return [evaluator["name"] for evaluator in seeds[0][0]["evaluators"]]


def points_of(seeds: Sequence[Rows], sweep: Sweep) -> dict[str, dict[str, dict[str, list[list[Point]]]]]:
    """Evaluator -> figure -> source -> the points of each seed, in the order of `Sweep.models`. TP is of the first
    evaluator alone."""
    return {
        evaluator: {
            figure: {
                source: [[_point(rows, model, figure, place) for model in sweep.models(source)] for rows in seeds]
                for source in sweep.sources
            }
            for figure in (FIGURES if place == 0 else FIGURES[:1])
        }
        for place, evaluator in enumerate(evaluators_of(seeds))
    }


def margins_of(seeds: Sequence[Rows], sweep: Sweep) -> dict[str, dict[str, list[list[Point]]]]:
    """The same of `MARGINS`, where annotated text was measured, as ratios: exp(-change) is how likely it is against the
    rest, by token, over the baseline's."""
    if any(row.get("annotated") is None for rows in seeds for row in rows):
        return {}
    return {
        name: {
            source: [[_margin_point(rows, model, name) for model in sweep.models(source)] for rows in seeds]
            for source in sweep.sources
        }
        for name in MARGINS
    }


def _margin_point(rows: Rows, model: str, name: str) -> Point:
    row = _row(rows, model)
    return Point(_perplexity(rows, row), math.exp(-row["annotated"]["changes"][name]["change"][0]))


def _point(rows: Rows, model: str, figure: str, evaluator: int) -> Point:
    row = _row(rows, model)
    own, base = (each["evaluators"][evaluator][figure][0] for each in (row, rows[0]))
    toxicity = own / base if base else 1.0 if own == base else math.inf  # a baseline may have no harm
    return Point(_perplexity(rows, row), toxicity)


def _row(rows: Rows, model: str) -> Mapping[str, Any]:
    return next(row for row in rows if row["model"] == model)


def _perplexity(rows: Rows, row: Mapping[str, Any]) -> float:
    """Over the first model's."""
    ratio: float | None = row["benign_ratio"] or row["ratio"]
    if ratio is None:  # of the first model, or of guided decoding, which has its weights; else it diverged
        return 1.0 if row is rows[0] or row["fluency_of"] else math.inf
    return ratio


def figures_at(seeds: Sequence[Rows], sweep: Sweep, at: float) -> dict[str, dict[str, Any]]:
    """Source -> figures at a ratio of benign perplexities; `beyond`: in how many seeds no model of the sweep has it."""
    points = points_of(seeds, sweep)
    first, *further = points
    wanted = {"emt_ratio": points[first]["emt"], "tp_ratio": points[first]["tp"]}
    wanted |= {f"emt_ratio_{'independent' if name == INDEPENDENT else name}": points[name]["emt"] for name in further}
    wanted |= margins_of(seeds, sweep)
    result: dict[str, dict[str, Any]] = {source: {} for source in sweep.sources}
    for name, by_source in wanted.items():
        shown = _nats if name in MARGINS else _rounded
        reached = {source: [at_perplexity(seed, at) for seed in by_seed] for source, by_seed in by_source.items()}
        ratios = {source: [front.toxicity for front in fronts] for source, fronts in reached.items()}
        over = {base: compare_sources(ratios, base) for base in BASES if base in ratios}
        for source in sweep.sources:
            result[source][name] = shown(over_seeds(ratios[source]))
            result[source] |= {f"{name}_over_{base}": shown(own[source]) for base, own in over.items()}
            result[source]["beyond"] = sum(not front.inside for front in reached[source])
    return result


def _rounded(interval: Interval) -> list[float | None]:
    return [None if end is None else round(end, 4) for end in interval]


def _nats(interval: Interval) -> list[float | None]:
    """Of a ratio of likelihoods by token the nats by which they fell."""
    value, low, high = (None if end is None else round(-math.log(end), 4) + 0.0 for end in interval)  # no -0.0
    return [value, high, low]


def others_of(seeds: Sequence[Rows], sweep: Sweep) -> dict[str, dict[str, Interval]]:
    """The models that are on no front -> their figures over seeds."""
    on_fronts = {model for source in sweep.sources for model in sweep.models(source)}
    names = evaluators_of(seeds)
    figures = [("emt", 0), ("tp", 0), *(("emt", place) for place in range(1, len(names)))]
    others: dict[str, dict[str, Interval]] = {}
    for model in (row["model"] for row in seeds[0][1:] if row["model"] not in on_fronts):
        ratios = {
            f"{figure.upper()}, {names[place]}": [_point(rows, model, figure, place).toxicity for rows in seeds]
            for figure, place in figures
        }
        ratios["benign perplexity"] = [_point(rows, model, "emt", 0).perplexity for rows in seeds]
        others[model] = {name: over_seeds(values) for name, values in ratios.items()}
    return others


def as_markdown(figures: Mapping[str, Mapping[str, Any]], others: Mapping[str, Mapping[str, Interval]]) -> str:
    """A table of the sources at equal perplexity, one over each of `BASES`, and one of the other models."""
    names = [name for name in next(iter(figures.values())) if name != "beyond" and "_over_" not in name]
    titles = [name.replace("_", " ") for name in names]
    rows = [
        (source, *(_cell(values[name]) for name in names), str(values["beyond"])) for source, values in figures.items()
    ]
    tables = [markdown_table(["mask", *titles, "beyond the sweep"], rows)]
    for base in BASES:
        if base not in figures:
            continue
        rows = [
            (source, *(_cell(values[f"{name}_over_{base}"]) for name in names))
            for source, values in figures.items()
            if source != base
        ]
        tables.append(markdown_table([f"over {base}", *titles], rows))
    if others:
        titles = list(next(iter(others.values())))
        cells = [(name, *(_cell(list(values[title])) for title in titles)) for name, values in others.items()]
        tables.append(markdown_table(["model", *titles], cells))
    return "\n".join(tables)


def _cell(ends: Sequence[float | None]) -> str:
    value, low, high = ends
    if value is None:
        return ""
    return f"{value:.3f}" if low is None else f"{value:.3f} [{low:.3f}, {high:.3f}]"


def draw(seeds: Sequence[Rows], sweep: Sweep, path: Path, *, at: float) -> None:
    """A panel for each evaluator, three in a row: EMT against benign perplexity, both over the baseline's; and two more
    for how likely annotated text is.

    A line for each source, and a dashed one of the same colour for each further budget."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from PIL import Image

    points = {evaluator: by_figure["emt"] for evaluator, by_figure in points_of(seeds, sweep).items()}
    margins = margins_of(seeds, sweep)
    titles = {"margin": "annotated text: likelihood", "type_margin": "the same, types held equal"}
    points |= {titles[name]: by_source for name, by_source in margins.items()}
    wide, high = min(len(points), 3), -(-len(points) // 3)
    figure, panels = pyplot.subplots(
        high, wide, figsize=(4 * wide + 2, 3.4 * high), layout="constrained", sharex=True, sharey=True, squeeze=False
    )
    for axes in panels.flat[len(points) :]:
        axes.set_axis_off()
    for axes, (evaluator, by_source) in zip(panels.flat[: len(points)], points.items(), strict=True):
        colours = pyplot.get_cmap("tab20")
        for i, (source, by_seed) in enumerate(by_source.items()):
            means = [(over_seeds([p.perplexity for p in same]).value, over_seeds([p.toxicity for p in same]).value)
                     for same in zip(*by_seed, strict=True)]  # fmt: skip
            for first in range(0, len(means), len(sweep.penalties)):  # of each budget
                line = [(1.0, 1.0), *means[first : first + len(sweep.penalties)]]
                style = {"ls": "--", "lw": 0.8} if first else {"lw": 1.2, "label": source}
                axes.plot(*zip(*line, strict=True), marker="o", ms=3, color=colours(i), **style)
        axes.axvline(at, color="0.6", lw=0.8, ls=":")
        axes.set_title(evaluator, fontsize=10)
        axes.grid(alpha=0.3)
    figure.supxlabel("benign perplexity / the baseline's", fontsize=10)
    figure.supylabel("EMT or likelihood / the baseline's", fontsize=10)
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=100, format="png")
    pyplot.close(figure)
    with publish(path) as part:  # of few colours, a quarter of the bytes
        Image.open(drawn).convert("RGB").quantize(64).save(part, format="png", optimize=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--behaviours", nargs="+", choices=list(CONFIGS), default=list(CONFIGS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--penalties", type=float, nargs="+", default=[0.0, 0.5, 1.0, 2.0])
    parser.add_argument("--budgets", type=float, nargs="*", default=[], help="further shares of the tokens to mask")
    parser.add_argument("--methods", nargs="*", help="of the config's methods; default: all")
    parser.add_argument("--proxy", default="smollm2", help="smollm2, configured, or a source")
    parser.add_argument("--at", type=float, default=1.03, help="ratio of benign perplexities that is compared at")
    parser.add_argument("--record", action="store_true", help="keep the seeds' rows in bench/records/real_text")
    parser.add_argument("--recorded", action="store_true", help="take seeds from bench/records/real_text")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="a.b=c", help="of the config")
    return parser.parse_args()


if __name__ == "__main__":
    main()
