"""The ablation sweep at its smallest: a variant shares with its base all that its change leaves alone."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from bench import ablations
from bench.ablations import SWEEPS, VARIANTS, as_markdown, chosen, figures_of, made_variant, write_results
from ifguide.artifacts import MANIFEST, read_manifest
from ifguide.config import Config
from ifguide.planning.shapes import shape_of_fields, target_shape
from ifguide.stages.run import Run


@pytest.fixture
def base(copied: Callable[..., Config]) -> Run:
    """The finished run; what is trained from here on is trained in this process."""
    config = copied()
    return Run(config=replace(config, pretrain=replace(config.pretrain, engine="torch", workers=1, epochs=0.2)))


def test_sweeps_name_variants_and_every_variant_is_in_a_sweep() -> None:
    named = {name for values in SWEEPS.values() for name in values.values()}
    assert named == {ablations.BASE, *VARIANTS}
    assert chosen(["window"]) == ["window-0", "window-2"]
    assert chosen(["small-proxy", "objective"]) == ["ignore", "unlikelihood", "clipped", "small-proxy"]
    assert chosen([]) == list(VARIANTS)
    with pytest.raises(ValueError, match=r"--only: windows is neither"):
        chosen(["windows"])


@pytest.mark.skipif("IFGUIDE_SLOW" not in os.environ, reason="takes minutes; set IFGUIDE_SLOW=1 to run it")
@pytest.mark.timeout(1500)
def test_variants_share_what_they_leave_alone_and_end_in_one_table(base: Run, tmp_path: Path) -> None:
    figures = {name: [figures_of(made_variant(base, name))] for name in ("budget-0.5", "clipped", "small-proxy")}
    figures[ablations.BASE] = [figures_of(base)]
    runs = {name: base.folder / "ablations" / name for name in figures if name != ablations.BASE}
    linked = {name: {path.name for path in run.iterdir() if path.is_symlink()} for name, run in runs.items()}
    assert linked["budget-0.5"] == {"corpus", "factors", "query", "scores"}
    assert linked["clipped"] == linked["budget-0.5"] | {"ranking", "mask"}
    assert linked["small-proxy"] == {"corpus"}
    assert figures["budget-0.5"][0]["tokens_masked"] < figures[ablations.BASE][0]["tokens_masked"]
    assert figures["clipped"][0]["tokens_masked"] == figures[ablations.BASE][0]["tokens_masked"]
    proxy = read_manifest(runs["small-proxy"] / "proxy" / "model" / "baseline").summary["parameters"]
    target = target_shape(base.config)
    widths = [
        shape_of_fields("x", "x", target.skeleton.config.to_dict() | {"hidden_size": w, "intermediate_size": 2 * w})
        for w in (8, 16, 24)
    ]
    assert abs(proxy - target.parameters / 10) <= min(abs(w.parameters - target.parameters / 10) for w in widths)
    made = {name: (run / "report" / MANIFEST).stat().st_mtime_ns for name, run in runs.items()}
    assert figures_of(made_variant(base, "clipped")) == figures["clipped"][0]  # complete: nothing is made again
    assert made == {name: (run / "report" / MANIFEST).stat().st_mtime_ns for name, run in runs.items()}
    write_results(tmp_path, figures)
    table = as_markdown(figures).splitlines()
    assert [line.split(" | ")[:2] for line in table[2:]] == [
        ["| penalty", "1"],
        ["| budget", "0.5%"],
        ["| window", "1"],
        ["| objective", "penalty"],
        ["| objective", "clipped"],
        ["| proxy", "the baseline"],
        ["| proxy", "a tenth"],
    ]
    assert json.loads((tmp_path / "ablations.json").read_text())["clipped"]["emt"] == [
        round(figures["clipped"][0]["emt"], 5)
    ]
    assert (tmp_path / "ablations.png").read_bytes().startswith(b"\x89PNG")
