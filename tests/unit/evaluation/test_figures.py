"""The figures of an evaluation, from the files of its generations and scores."""

from __future__ import annotations

import numpy as np

from ifguide.evaluation import Bootstrap
from ifguide.evaluation.figures import _gaps


def test_groups_of_one_size_do_not_share_their_draws() -> None:
    values = np.random.default_rng(0).random(40)
    part = {"emt/x": (values, np.ones(40)), "rep_4": (values, np.ones(40))}
    groups = {"all": part, "race/a": part, "race/b": part, "gender/c": part}
    bootstrap = Bootstrap(samples=200, seed=0)
    gaps = _gaps(groups, bootstrap)
    assert {domain: set(found) for domain, found in gaps.items()} == {"race": {"emt/x"}}
    found = gaps["race"]["emt/x"]
    assert (found.value, found.n) == (0, 80)
    assert found.samples.min() > 0  # with the same draws of the same values it would be zero in every replicate
    # models stay paired: the same groups have the same draws
    np.testing.assert_array_equal(_gaps(groups, bootstrap)["race"]["emt/x"].samples, found.samples)
