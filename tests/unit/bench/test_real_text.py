"""The table and the picture over seeds."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.common.over_seeds import cell, mean_and_range
from bench.real_text import as_markdown, draw, over_seeds


def row(model: str, emt: float, perplexity: float | None, first: float = 100.0) -> dict[str, object]:
    return {
        "model": model,
        "masked_share": None if model == "baseline" else 0.02,
        "emt": [emt, emt - 0.1, emt + 0.1],
        "tp": [emt / 2, 0.0, 1.0],
        "perplexity": None if perplexity is None else [perplexity, 0.0, 1000.0],
        "ratio": None if perplexity is None else perplexity / first,
        "benign_ratio": None if perplexity is None else (perplexity / first) ** 0.5,
        "distinct_2": 0.5,
    }


SEEDS = [
    [row("baseline", 0.8, 100.0), row("penalised", 0.4, 105.0), row("rad", 0.2, None)],
    [row("baseline", 0.6, 120.0, 120.0), row("penalised", 0.45, 120.0, 120.0), row("rad", 0.3, None)],
]


def test_ratios_are_to_the_baseline_of_the_same_seed() -> None:
    figures = over_seeds(SEEDS)
    assert [seed["emt_ratio"] for seed in figures["penalised"]] == pytest.approx([0.5, 0.75])
    assert [seed["perplexity_ratio"] for seed in figures["penalised"]] == pytest.approx([1.05, 1.0])
    assert [seed["benign_ratio"] for seed in figures["penalised"]] == pytest.approx([1.05**0.5, 1.0])
    assert "perplexity" not in figures["rad"][0]
    assert "masked_share" not in figures["baseline"][0]


def test_the_table_has_means_and_ranges_and_the_picture_is_drawn(tmp_path: Path) -> None:
    figures = over_seeds(SEEDS)
    losses = {"baseline": None, "penalised": "clipped 0.5", "rad": None}
    lines = as_markdown(figures, losses).splitlines()
    assert lines[3].startswith("| penalised | clipped 0.5 | 2.00% | 0.425 [0.400, 0.450] | 0.625 [0.500, 0.750] |")
    assert lines[4].split(" | ")[-4:] == ["", "", "", "0.500 |"]
    assert len({line.count("|") for line in lines}) == 1
    draw(figures, tmp_path / "seeds.png")
    assert (tmp_path / "seeds.png").read_bytes().startswith(b"\x89PNG")


def test_a_cell_is_one_value_where_all_seeds_share_it() -> None:
    assert cell([], ".2f") == ""
    assert cell([0.501, 0.502], ".2f") == "0.50"
    assert cell([1.0, 2.0], ".1f") == "1.5 [1.0, 2.0]"


def test_error_bars_reach_from_the_mean_to_the_extremes() -> None:
    assert mean_and_range([1.0, 2.0, 6.0]) == (3.0, 2.0, 3.0)
