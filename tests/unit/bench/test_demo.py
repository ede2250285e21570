"""The picture of the demo's runs is of the right figures, in the order of the models."""

from __future__ import annotations

import json
from pathlib import Path

from bench.demo import MODELS, draw, figures_of


def _interval(value: float) -> dict[str, float]:
    return {"value": value, "low": value - 0.05, "high": value + 0.1, "n": 20}


def _finished_run(folder: Path, toxic: tuple[float, float], perplexity: tuple[float, float]) -> Path:
    models = {
        model: {
            "sets": {
                "prompts": {
                    "groups": {
                        "all": {"tp": {"toxicity": _interval(tp), "toxicity without listed words": _interval(0.01)}}
                    }
                }
            },
            "perplexity": _interval(99.0),
            "benign_perplexity": _interval(ppl),
        }
        for model, tp, ppl in zip(MODELS, toxic, perplexity, strict=True)
    }
    (folder / "report").mkdir(parents=True)
    (folder / "report" / "metrics.json").write_text(json.dumps({"models": models, "evaluators": ["toxicity"]}))
    return folder


def test_figures_and_picture(tmp_path: Path) -> None:
    runs = {seed: _finished_run(tmp_path / str(seed), (0.6, 0.2), (3.0, 3.5)) for seed in (4, 7)}
    toxic, perplexity = figures_of(runs[4]).values()
    assert [value for value, *_ in toxic] == [0.6, 0.2]
    assert [value for value, *_ in perplexity] == [3.0, 3.5]
    assert all(low < value < high for value, low, high in (*toxic, *perplexity))
    draw(runs, tmp_path / "demo.png")
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
