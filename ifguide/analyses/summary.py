"""The table and the pictures of the analyses, from the content of `analyses.json`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Models = Mapping[str, Mapping[str, Any]]  # model -> analysis -> its figures


def as_markdown(models: Models) -> str:
    """One line a model: the lens at the last depth, the probe of the depth chosen within each fold, the attacks."""
    titles = [
        "model",
        "lens, last depth",
        "probe, depth chosen in each fold: AUROC (depths)",
        "accuracy there",
        "attacks: exact",
        "flagged",
        "flagged before",
        "loss",
    ]
    lines = [f"| {' | '.join(titles)} |", "| --- " * len(titles) + "|"]
    for model, results in models.items():
        cells = [model, "", "", "", "", "", "", ""]
        if "lens" in results:
            cells[1] = _with_interval(results["lens"]["layers"][-1], ".5f")
        if "probes" in results:
            chosen = results["probes"]["chosen"]
            cells[2] = (
                f"{_with_interval(chosen['auroc'], '.3f')} ({', '.join(map(str, sorted(set(chosen['depths']))))})"
            )
            cells[3] = _with_interval(chosen["accuracy"], ".3f")
        if "gcg" in results:
            attacks = results["gcg"]
            for place, name in enumerate(("exact", "flagged", "flagged_before", "loss"), start=4):
                cells[place] = _with_interval(attacks[name], ".2f")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def draw_lens(models: Models, path: Path) -> None:
    """The mass of the words by depth, with intervals; depth as a share of the model's own."""

    def plot(axes: Any) -> None:
        for model, results in models.items():
            _band(axes, results["lens"]["layers"], model)
        axes.set(yscale="log", ylabel="probability of the words", title="Logit lens")

    _by_depth(plot, path)


def draw_probes(models: Models, path: Path) -> None:
    """AUROC of the probes by depth, with intervals."""

    def plot(axes: Any) -> None:
        for model, results in models.items():
            _band(axes, [layer["auroc"] for layer in results["probes"]["layers"]], model)
        axes.set(ylabel="AUROC", title="Linear probes")

    _by_depth(plot, path)


def draw_gcg(models: Models, path: Path) -> None:
    """Loss of the targets before and after the attack, a point a target; below the diagonal the attack helped."""

    def plot(axes: Any) -> None:
        for model, results in models.items():
            attacks = results["gcg"]["attacks"]
            before, after = ([attack[name] for attack in attacks] for name in ("first_loss", "loss"))
            axes.scatter(before, after, label=model, alpha=0.8)
        low, high = axes.get_xlim()
        axes.plot([low, high], [low, high], color="grey", linewidth=0.8)
        axes.set(xlabel="nats a target token, first suffix", ylabel="best suffix", title="Adversarial suffixes (GCG)")

    _figure(plot, path)


def _by_depth(plot: Callable[[Any], None], path: Path) -> None:
    def with_label(axes: Any) -> None:
        axes.set_xlabel("depth (share of the blocks)")
        plot(axes)

    _figure(with_label, path)


def _figure(plot: Callable[[Any], None], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    plot(axes)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=130, format="png")  # the path may end in .part
    pyplot.close(figure)


def _band(axes: Any, figures: list[Mapping[str, Any]], model: str) -> None:
    depths = [depth / max(len(figures) - 1, 1) for depth in range(len(figures))]
    (line,) = axes.plot(depths, [figure["value"] for figure in figures], marker="o", label=model)
    low, high = ([figure[end] for figure in figures] for end in ("low", "high"))
    axes.fill_between(depths, low, high, alpha=0.2, color=line.get_color())


def _with_interval(figure: Mapping[str, Any], form: str) -> str:
    return f"{figure['value']:{form}} [{figure['low']:{form}}, {figure['high']:{form}}]"
