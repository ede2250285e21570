"""Which settings a student of the scores excludes."""

from __future__ import annotations

from pathlib import Path

import pytest

from ifguide.config import ConfigError, load_config
from ifguide.run import Run
from ifguide.stages.fit_student import fit_student

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


@pytest.mark.parametrize("setting", [*EXCLUDED, "score_corpus.queries={other: queries/other}"])
def test_of_exact_scores_no_student_is_fitted_that_could_not_make_them(tmp_path: Path, setting: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("proxy: {source: owner/name}\n")
    reason = EXCLUDED.get(setting, r"scores the run's own query alone; unset score_corpus\.queries")
    with pytest.raises(ConfigError, match=rf"^fit_student: a student {reason}"):
        fit_student(Run(config=load_config(path, [setting])))
