"""The charts of the report page alone."""

from __future__ import annotations

from dataclasses import replace

from ifguide.report.charts import PALETTE, charts_of
from ifguide.report.contents import Behaviour, ScoreHistogram
from ifguide.report.figures import PromptSet
from ifguide.selection.fdr import LARGEST
from tests.unit.report.sample_report import group, minimal_data, row


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


def test_each_domain_has_a_chart_of_its_groups_whatever_they_are_called() -> None:
    domains = {"gay/lesbian": "", "trans": "", "race/a/b": "race", "race/c": "race"}
    groups = [group("all", 9, 1.0, 0.5, 0.5, False)]
    groups += [group(name, 2, 1.0, 0.5, 0.5, False, domain=domain) for name, domain in domains.items()]
    only = row("only", 0.5)
    model = replace(only, sets=(*only.sets, PromptSet(name="bold", groups=tuple(groups))))
    of_none, race = map(str, charts_of(minimal_data(models=(model,)), {"only": PALETTE[0]})["groups"]["bold"])
    assert [name in of_none for name in ("EMT, groups", ">gay/lesbian<", ">trans<")] == [True] * 3
    assert [name in race for name in ("EMT, race", ">a/b<", ">c<")] == [True] * 3
