"""The options of masks that a page shows beside the run's own."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ifguide import schemas
from ifguide.config import OWN, BuildMask
from ifguide.selection.masks import shown_options

COLUMNS = schemas.scores(8, (OWN, "rude", "vain"), {OWN: 2, "vain": 3})


@pytest.mark.parametrize("changes", [{"fdr": 0.1}, {"standardise": True}, {"fdr": 0.1, "standardise": True}])
def test_z_scores_are_wanted_of_behaviours_with_nulls_alone(changes: dict[str, object]) -> None:
    options = replace(BuildMask(quantile=0.9), **changes)  # type: ignore[arg-type]
    assert shown_options(options, "rude", COLUMNS) == BuildMask(quantile=0.9, behaviour="rude")
    assert shown_options(options, "vain", COLUMNS) == replace(options, behaviour="vain")


def test_options_without_z_scores_are_those_of_every_behaviour() -> None:
    options = BuildMask(quantile=0.9, window=0)
    for behaviour in ("rude", "vain"):
        assert shown_options(options, behaviour, COLUMNS) == replace(options, behaviour=behaviour)
