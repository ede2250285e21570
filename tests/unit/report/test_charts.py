"""The charts of the report page alone."""

from __future__ import annotations

from ifguide.report.charts import PALETTE, charts_of
from ifguide.report.contents import Behaviour, ScoreHistogram
from ifguide.selection.fdr import LARGEST
from tests.unit.report.sample_report import minimal_data


def test_a_tau_that_no_token_exceeds_does_not_stretch_the_histogram() -> None:
    def drawn(tau: float) -> str:
        histogram = ScoreHistogram(bin_edges=(0.0, 1.0, 2.0), counts=(1, 2), tau=tau)
        data = minimal_data(behaviours=(Behaviour(name="b", histogram=histogram),))
        return str(charts_of(data, {"only": PALETTE[0]})["scores"][0])

    assert "τ = 1.5" in drawn(1.5)
    nothing = drawn(LARGEST)
    assert "no token is above τ" in nothing
    assert "with no token above tau" in nothing
    assert "e+38" not in nothing
    assert nothing.count("2.0") == drawn(1.5).count("2.0") > 0  # the axis is that of the scores
