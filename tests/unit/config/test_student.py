"""Which settings a student of the scores excludes."""

from __future__ import annotations

from pathlib import Path

import pytest

from ifguide.config import ConfigError, load_config

EXCLUDED = {
    "build_query.nulls=2": "scores no null directions",
    "build_mask.standardise=true": "scores no null directions",
    "build_mask.smoothed=true": "smooths no scores",
}


@pytest.mark.parametrize("setting", EXCLUDED)
def test_a_student_makes_neither_nulls_nor_smoothed_scores(tmp_path: Path, setting: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("score_corpus: {scorer: cascade}\n")
    assert load_config(path).score_corpus.uses_student
    with pytest.raises(ConfigError, match=rf"^score_corpus\.scorer: cascade {EXCLUDED[setting]}"):
        load_config(path, [setting])
