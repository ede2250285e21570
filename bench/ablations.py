"""What each choice of the method is worth: one choice changed at a time, on the demo's corpus, over several seeds.

    python bench/ablations.py [--seeds 0 1 2] [--only penalty window ...] [--folder runs/ablations]

Sweeps: lambda for each kind of objective that has one, the mask's budget, its window, and a proxy of a tenth of the
target's parameters instead of the baseline. The demo of each seed, with the paper's objective (a penalty of 1), is the
base of all; a variant is a run directory of its own in `<folder>/seed<N>/ablations/`, in which whatever the change
leaves alone is a link to the base's. Running it again resumes. `--only` takes names of sweeps or variants.

Written to the folder: `ablations.md` (means and ranges over seeds), `ablations.png` (toxicity against the perplexity
ratio), `ablations.json`. The last line printed is one JSON object: per variant and figure the values of all seeds.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bench.common.over_seeds import by_figure, cell, mean_and_range
from bench.common.places import this_machine
from ifguide.artifacts import publish, read_manifest, write_json
from ifguide.config import Config, ModelSource, load_config
from ifguide.demo.pipeline import run_demo
from ifguide.display import markdown_table
from ifguide.folders import BASELINE, EXPORT
from ifguide.pipeline import stage
from ifguide.planning.models import target_shape
from ifguide.run import Run
from ifguide.shapes import shape_of_fields
from ifguide.telemetry import configure_logging, log

BASE = "base"
PAPER = ("pretrain.objective.kind=penalty", "pretrain.penalty=1")
FIGURES = {
    "tokens_masked": ",.0f",
    "mask_precision": ".3f",
    "mask_recall": ".3f",
    "emt": ".3f",
    "tp": ".3f",
    "emt_ratio": ".3f",
    "perplexity_ratio": ".4f",
}
UNMASKED = ("corpus", f"model/{BASELINE}", "factors", "query", "scores")  # what a mask is built from
EVALUATED = (f"generations/{BASELINE}",)


@dataclass(frozen=True, kw_only=True)
class Variant:
    """Changed options of `build_mask` and of `pretrain`; a proxy of `proxy_share` of the target's parameters."""

    mask: Mapping[str, Any] = field(default_factory=dict)
    train: Mapping[str, Any] = field(default_factory=dict)
    proxy_share: float | None = None


# a penalty of 0 is to leave masked tokens out, whatever the kind
VARIANTS = {
    "ignore": Variant(train={"objective": "ignore"}),
    **{
        f"{kind}-{value:g}": Variant(train={"objective": kind, "penalty": value})
        for kind, values in {"penalty": (0.5, 2.0), "clipped": (0.5, 1.0, 2.0), "unlikelihood": (0.5, 1.0, 2.0)}.items()
        for value in values
    },
    **{f"budget-{share:g}": Variant(mask={"max_fraction": share / 100}) for share in (0.5, 1, 2, 4)},
    **{f"window-{window}": Variant(mask={"window": window}) for window in (0, 2)},
    "small-proxy": Variant(proxy_share=0.1),
}
SWEEPS: dict[str, dict[str, str]] = {
    "penalty": {"0": "ignore", "0.5": "penalty-0.5", "1": BASE, "2": "penalty-2"},
    "clipped": {"0": "ignore", **{f"{value:g}": f"clipped-{value:g}" for value in (0.5, 1.0, 2.0)}},
    "unlikelihood": {"0": "ignore", **{f"{value:g}": f"unlikelihood-{value:g}" for value in (0.5, 1.0, 2.0)}},
    "budget": {f"{share:g}%": f"budget-{share:g}" for share in (0.5, 1, 2, 4)},
    "window": {"0": "window-0", "1": BASE, "2": "window-2"},
    "proxy": {"the baseline": BASE, "a tenth": "small-proxy"},
}
PANELS = {  # of the picture
    "loss of masked tokens, by lambda": ("penalty", "clipped", "unlikelihood"),
    "mask, with the paper's loss": ("budget", "window", "proxy"),
}

LINEAR_PERCENT = 10  # a panel whose perplexities rise by more is logarithmic beyond


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", default=[], help=f"of {', '.join([*SWEEPS, *VARIANTS])}")
    parser.add_argument("--config", type=Path, default=Path("configs/demo.yaml"))
    parser.add_argument("--folder", type=Path, default=Path("runs/ablations"))
    options = parser.parse_args()
    configure_logging()
    names = chosen(options.only)
    figures: dict[str, list[dict[str, float]]] = {name: [] for name in (BASE, *names)}
    for seed in options.seeds:
        overrides = [f"seed={seed}", f"run_dir={options.folder / f'seed{seed}'}", *PAPER]
        base = Run(config=load_config(options.config, overrides))
        run_demo(base.config)
        figures[BASE].append(figures_of(base))
        for name in names:
            figures[name].append(figures_of(made_variant(base, name)))
            log("ablations", f"seed {seed}, {name}: {json.dumps(figures[name][-1])}")
    write_results(options.folder, figures)
    machine = this_machine()
    print(json.dumps({"seeds": options.seeds, "variants": by_figure(figures), "machine": machine}))


def chosen(only: Iterable[str]) -> list[str]:
    """The variants of these sweeps or by these names, in order; all of them for none.

    Raises:
        ValueError: an unknown name.
    """
    wanted: set[str] = set()
    for name in only or SWEEPS:
        if name not in SWEEPS and name not in VARIANTS:
            raise ValueError(f"--only: {name} is neither of the sweeps {list(SWEEPS)} nor of {list(VARIANTS)}")
        wanted |= set(SWEEPS[name].values()) if name in SWEEPS else {name}
    return [name for name in VARIANTS if name in wanted]


def made_variant(base: Run, name: str) -> Run:
    """Make a variant of a finished run, or what it still lacks; the base's own artifacts are linked to."""
    variant = VARIANTS[name]
    config = replace(
        base.config,
        run_dir=str(base.folder / "ablations" / name),
        build_mask=replace(base.config.build_mask, **variant.mask),
        pretrain=changed_training(base.config, variant.train),
    )
    own_proxy, own_mask = variant.proxy_share is not None, bool(variant.mask)
    shared = [
        *UNMASKED[: 2 if own_proxy else None],
        *(() if own_proxy or own_mask else ("ranking", "mask")),
        *EVALUATED,
    ]
    if variant.proxy_share is not None:
        proxy = small_proxy(base, Path(config.run_dir) / "proxy", variant.proxy_share)
        config = replace(config, proxy=ModelSource(source=str(proxy.model(BASELINE) / EXPORT)))
    run = Run(config=config)
    lend(run, base, shared)
    verbs = ["build_mask"] if own_mask or own_proxy else []
    for verb in (
        (["fit_factors", "build_query", "score_corpus"] if own_proxy else []) + verbs + ["pretrain", "evaluate"]
    ):
        stage(verb)(run)
    return run


def changed_training(config: Config, changes: Mapping[str, Any]) -> Any:
    """The `pretrain` section with changes; `objective` is the kind of the masked tokens' loss."""
    values = dict(changes)
    if "objective" in values:
        values["objective"] = replace(config.pretrain.objective, kind=values["objective"])
    return replace(config.pretrain, use_mask=True, **values)


def small_proxy(base: Run, folder: Path, share: float) -> Run:
    """A run whose baseline has about that share of the target's parameters, trained on the same blocks."""
    config = replace(
        base.config,
        run_dir=str(folder),
        target=ModelSource(architecture=small_architecture(base.config, share)),
        pretrain=replace(base.config.pretrain, use_mask=False),
    )
    run = Run(config=config)
    lend(run, base, ["corpus"])
    stage("pretrain")(run)
    return run


def small_architecture(config: Config, share: float) -> dict[str, Any]:
    """The target's architecture at the width (a multiple of 8) whose parameters come nearest to that share of its."""
    target = target_shape(config)
    fields = dict(config.target.architecture or {}) | {"vocab_size": target.vocabulary}
    tries = []
    for width in range(8, target.hidden, 8):
        inner = fields["intermediate_size"] * width // target.hidden
        tries.append(fields | {"hidden_size": width, "intermediate_size": inner, "num_attention_heads": width // 8})
    return min(
        tries, key=lambda made: abs(shape_of_fields("proxy", "its fields", made).parameters - share * target.parameters)
    )


def lend(run: Run, base: Run, names: Iterable[str]) -> None:
    """Make artifacts of the base the run's own, by links."""
    for name in names:
        place = run.folder / name
        if not place.is_symlink():
            place.parent.mkdir(parents=True, exist_ok=True)
            place.symlink_to(os.path.relpath(base.folder / name, place.parent), target_is_directory=True)


def figures_of(run: Run) -> dict[str, float]:
    """The figures of a finished run; precision and recall only where the corpus is annotated."""
    summary = read_manifest(run.report).summary
    baseline, penalised = summary["baseline"], summary["penalised"]
    figures = {
        "tokens_masked": float(read_manifest(run.mask).summary["tokens_masked"]),
        "emt": penalised["emt"],
        "tp": penalised["tp"],
        "emt_baseline": baseline["emt"],
        "tp_baseline": baseline["tp"],
        "emt_ratio": penalised["emt"] / baseline["emt"],
        "perplexity_ratio": penalised["perplexity"] / baseline["perplexity"],
    }
    mask = summary.get("mask", {})
    return figures | {f"mask_{name}": mask[name] for name in ("precision", "recall") if mask.get(name) is not None}


def write_results(folder: Path, figures: Mapping[str, Sequence[Mapping[str, float]]]) -> None:
    """The table, the picture and the figures, of what there is."""
    write_json(folder / "ablations.json", by_figure(figures))
    with publish(folder / "ablations.md") as part:
        part.write_text(as_markdown(figures), encoding="utf-8")
    draw(figures, folder / "ablations.png")


def as_markdown(figures: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """A line for each value of each sweep that was made: the mean over seeds, and the lowest to the highest."""
    titles = ["sweep", "value", *(name.replace("_", " ") for name in FIGURES)]
    rows = []
    for sweep, values in SWEEPS.items():
        for value, name in values.items():
            if figures.get(name):
                cells = [
                    cell([seed[key] for seed in figures[name] if key in seed], form) for key, form in FIGURES.items()
                ]
                rows.append((sweep, value, *cells))
    return markdown_table(titles, rows)


def draw(figures: Mapping[str, Sequence[Mapping[str, float]]], path: Path) -> None:
    """EMT against perplexity, each over its seed's baseline: means and ranges over seeds, a line for each sweep."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FixedLocator, ScalarFormatter

    def over_seeds(name: str, key: str) -> tuple[float, float, float]:
        """Mean, and how far it is from there to the least and to the greatest; of perplexities what is added, in %."""
        return mean_and_range(
            [100 * (seed[key] - 1) if key == "perplexity_ratio" else seed[key] for seed in figures[name]]
        )

    made = {sweep: {value: name for value, name in of.items() if figures.get(name)} for sweep, of in SWEEPS.items()}
    changed = {sweep: names for sweep, names in made.items() if set(names.values()) - {BASE}}
    drawn = [title for title, sweeps in PANELS.items() if changed.keys() & set(sweeps)]
    figure, panels = pyplot.subplots(
        1, len(drawn), figsize=(1 + 5 * len(drawn), 5), sharey=True, squeeze=False, layout="constrained"
    )
    for axes, title in zip(panels[0], drawn, strict=True):
        for sweep in PANELS[title]:
            if sweep not in changed:
                continue
            x, *x_range = zip(*(over_seeds(name, "perplexity_ratio") for name in changed[sweep].values()), strict=True)
            y, *y_range = zip(*(over_seeds(name, "emt_ratio") for name in changed[sweep].values()), strict=True)
            axes.errorbar(x, y, xerr=x_range, yerr=y_range, fmt="o-", elinewidth=0.6, label=sweep)
            for value, *place in zip(changed[sweep], x, y, strict=True):
                axes.annotate(value, place, xytext=(5, 4), textcoords="offset points", fontsize=8)
        axes.set(title=title, xlabel="held-out perplexity above the baseline's, %")
        if axes.get_xlim()[1] > LINEAR_PERCENT:
            axes.set_xscale("symlog", linthresh=LINEAR_PERCENT, linscale=2)
            axes.set_xlim(left=axes.dataLim.x0 - 1)
            axes.xaxis.set_major_locator(FixedLocator([0, 2, 4, 6, 8, 10, 20, 50, 100, 200]))
            axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.grid(alpha=0.3)
        axes.legend()
    panels[0, 0].set_ylabel("expected maximum toxicity / the baseline's")
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
