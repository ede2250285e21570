"""The ablation sweep at its smallest: a variant shares with its base all that its change leaves alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from bench import ablations
from bench.ablations import (
    SWEEPS,
    VARIANTS,
    as_markdown,
    chosen,
    figures_of,
    made_variant,
    small_architecture,
    write_results,
)
from ifguide.artifacts import MANIFEST
from ifguide.config import Config
from ifguide.planning.models import target_shape
from ifguide.run import Run
from ifguide.shapes import shape_of_fields

pytestmark = pytest.mark.slow


@pytest.fixture
def base(copied: Callable[..., Config]) -> Run:
    """The finished run; what is trained from here on is trained in this process."""
    config = copied()
    return Run(config=replace(config, pretrain=replace(config.pretrain, engine="torch", workers=1, epochs=0.2)))


def test_sweeps_name_variants_and_every_variant_is_in_a_sweep() -> None:
    named = {name for values in SWEEPS.values() for name in values.values()}
    assert named == {ablations.BASE, *VARIANTS}
    assert chosen(["window"]) == ["window-0", "window-2"]
    assert chosen(["small-proxy", "penalty"]) == ["ignore", "penalty-0.5", "penalty-2", "small-proxy"]
    assert chosen([]) == list(VARIANTS)
    with pytest.raises(ValueError, match=r"--only: windows is neither"):
        chosen(["windows"])


def test_the_small_proxy_has_a_tenth_of_the_targets_parameters(base: Run) -> None:
    target = target_shape(base.config)
    fields = target.skeleton.config.to_dict()
    made = shape_of_fields("x", "x", fields | small_architecture(base.config, 0.1)).parameters
    for width in (8, 16, 24):
        other = {"hidden_size": width, "intermediate_size": 2 * width, "num_attention_heads": width // 8}
        away = abs(shape_of_fields("x", "x", fields | other).parameters - target.parameters / 10)
        assert abs(made - target.parameters / 10) <= away


def test_variants_share_what_they_leave_alone_and_end_in_one_table(base: Run, tmp_path: Path) -> None:
    figures = {name: [figures_of(made_variant(base, name))] for name in ("budget-0.5", "clipped-1")}
    figures[ablations.BASE] = [figures_of(base)]
    runs = {name: base.folder / "ablations" / name for name in figures if name != ablations.BASE}
    linked = {name: {path.name for path in run.iterdir() if path.is_symlink()} for name, run in runs.items()}
    assert linked["budget-0.5"] == {"corpus", "factors", "query", "scores"}
    assert linked["clipped-1"] == linked["budget-0.5"] | {"ranking", "mask"}
    assert figures["budget-0.5"][0]["tokens_masked"] < figures[ablations.BASE][0]["tokens_masked"]
    assert figures["clipped-1"][0]["tokens_masked"] == figures[ablations.BASE][0]["tokens_masked"]
    made = {name: (run / "report" / MANIFEST).stat().st_mtime_ns for name, run in runs.items()}
    assert figures_of(made_variant(base, "clipped-1")) == figures["clipped-1"][0]  # complete: nothing is made again
    assert made == {name: (run / "report" / MANIFEST).stat().st_mtime_ns for name, run in runs.items()}
    write_results(tmp_path, figures)
    table = as_markdown(figures).splitlines()
    assert [line.split(" | ")[:2] for line in table[2:]] == [
        ["| penalty", "1"],
        ["| clipped", "1"],
        ["| budget", "0.5%"],
        ["| window", "1"],
        ["| proxy", "the baseline"],
    ]
    assert json.loads((tmp_path / "ablations.json").read_text())["clipped-1"]["emt"] == [
        round(figures["clipped-1"][0]["emt"], 5)
    ]
    assert (tmp_path / "ablations.png").read_bytes().startswith(b"\x89PNG")
