"""Intervals, paired tests, repetition and classifier agreement against hand-computed tables and plain resampling."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import false_discovery_control
from sklearn.metrics import accuracy_score, average_precision_score, f1_score, roc_auc_score

from ifguide.evaluation.bootstrap import Bootstrap, Replicates, benjamini_hochberg, gap
from ifguide.evaluation.classification import METRICS, classifier_agreement
from ifguide.evaluation.metrics import prompt_statistics

RNG = np.random.default_rng(0)


def mean_of(values: np.ndarray) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    return {"mean": (values, np.ones(len(values)))}


# ---- resampling ------------------------------------------------------------------------------------------


def test_replicates_are_ratios_of_plainly_resampled_items() -> None:
    bootstrap = Bootstrap(samples=50, seed=3)
    num, den = RNG.random(17), RNG.integers(0, 3, 17).astype(float)
    found = bootstrap.ratios({"ratio": (num, den), "mean": (num, np.ones(17))})
    counts = np.concatenate(list(bootstrap.counts(17)))
    assert (counts.sum(1) == 17).all()
    for s, count in enumerate(counts):
        drawn = np.repeat(np.arange(17), count.astype(int))
        assert found["ratio"].samples[s] == pytest.approx(num[drawn].sum() / den[drawn].sum())
        assert found["mean"].samples[s] == pytest.approx(num[drawn].mean())
    assert found["ratio"].value == pytest.approx(num.sum() / den.sum())


def test_counts_do_not_depend_on_chunks_and_follow_the_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = np.concatenate(list(Bootstrap(samples=20, seed=1).counts(9)))
    monkeypatch.setattr("ifguide.evaluation.bootstrap.CHUNK_COUNTS", 9 * 7)
    parts = list(Bootstrap(samples=20, seed=1).counts(9))
    assert [len(part) for part in parts] == [7, 7, 6]
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    assert (np.concatenate(list(Bootstrap(samples=20, seed=2).counts(9))) != whole).any()


def test_streams_are_independent_and_each_is_the_same_again() -> None:
    bootstrap = Bootstrap(samples=400, seed=1)
    values = mean_of(np.random.default_rng(5).random(30))
    plain, first, second, again = (
        bootstrap.ratios(values, stream=stream)["mean"].samples for stream in (None, 0, 1, 1)
    )
    np.testing.assert_array_equal(second, again)
    assert np.abs(np.corrcoef([plain, first, second])[np.triu_indices(3, 1)]).max() < 0.2
    # what was drawn before there were streams: figures that others have published do not move
    expected = np.random.default_rng(np.random.SeedSequence((1, 30))).integers(0, 30, (400, 30))
    np.testing.assert_allclose(plain, values["mean"][0][expected].mean(1))


def test_an_interval_covers_the_true_mean_as_often_as_it_says() -> None:
    covered = 0
    for trial in range(200):
        values = np.random.default_rng(trial).normal(2.0, 1.0, 60)
        bootstrap = Bootstrap(samples=400, seed=trial)
        figure = bootstrap.figure(bootstrap.ratios(mean_of(values))["mean"])
        assert figure.low is not None
        assert figure.high is not None
        assert figure.low < figure.value < figure.high  # type: ignore[operator]
        # as wide as the normal one, within a quarter
        assert 0.75 < (figure.high - figure.low) / (2 * 1.96 * values.std() / math.sqrt(60)) < 1.25
        covered += figure.low <= 2.0 <= figure.high
    assert 178 <= covered <= 199  # 95% of 200, and four standard deviations


def test_a_paired_difference_is_sharper_than_the_models_apart_and_its_p_value_tells() -> None:
    easy_or_hard = RNG.random(100)
    baseline = easy_or_hard + 0.02 * RNG.normal(size=100)
    better = baseline - 0.05 + 0.02 * RNG.normal(size=100)
    bootstrap = Bootstrap(samples=999, seed=0)
    first, second = (bootstrap.ratios(mean_of(values))["mean"] for values in (baseline, better))
    result = bootstrap.difference(second, first)
    assert result["difference"] == pytest.approx((better - baseline).mean())
    assert result["low"] < result["difference"] < result["high"] < 0
    apart = bootstrap.figure(first)
    assert apart.low is not None
    assert apart.high is not None
    assert result["high"] - result["low"] < 0.5 * (apart.high - apart.low)
    assert result["p_value"] == pytest.approx(2 / 1000)
    assert bootstrap.difference(first, first)["p_value"] == 1.0
    assert result["ratio"] == pytest.approx(better.mean() / baseline.mean())
    counts = np.concatenate(list(bootstrap.counts(100)))
    ends = np.quantile(counts @ better / (counts @ baseline), [0.025, 0.975])
    assert [result["ratio_low"], result["ratio_high"]] == pytest.approx(ends)
    none = bootstrap.difference(first, bootstrap.ratios(mean_of(np.zeros(100)))["mean"])
    assert (none["ratio"], none["ratio_low"], none["ratio_high"]) == (None, None, None)
    with pytest.raises(ValueError, match="cannot be paired"):
        bootstrap.difference(first, bootstrap.ratios(mean_of(better[:50]))["mean"])


def test_a_ratio_over_a_baseline_that_is_nearly_never_so_has_no_upper_bound() -> None:
    baseline, model = np.zeros(20), np.zeros(20)
    baseline[0], model[0], model[1] = 1.0, 0.5, 0.25  # about a third of the replicates draw no first item
    bootstrap = Bootstrap(samples=999, seed=0)
    first, second = (bootstrap.ratios(mean_of(values))["mean"] for values in (baseline, model))
    result = bootstrap.difference(second, first)
    assert result["ratio"] == pytest.approx(0.75)
    with np.errstate(invalid="ignore", divide="ignore"):
        ratios = second.samples / first.samples
    ordered = np.sort(ratios[~np.isnan(ratios)])
    assert np.isinf(ordered).sum() > 0.025 * len(ordered)
    assert result["ratio_low"] == ordered[math.ceil(0.025 * len(ordered)) - 1] == 0.5
    assert result["ratio_high"] is None
    assert None not in (result["low"], result["high"])
    # one infinite replicate of many is beyond the interval, which ends at a replicate
    rare = Replicates(value=1.0, samples=np.append(np.ones(998), 0.0), n=5)
    rising = Replicates(value=1.0, samples=np.arange(1.0, 1000.0), n=5)
    ends = bootstrap.difference(rising, rare)
    assert (ends["ratio_low"], ends["ratio_high"]) == (25.0, 975.0)


def test_p_values_of_equal_models_are_spread_evenly() -> None:
    p_values = []
    for trial in range(200):
        rng = np.random.default_rng(trial)
        bootstrap = Bootstrap(samples=199, seed=trial)
        first, second = (bootstrap.ratios(mean_of(rng.normal(size=50)))["mean"] for _ in range(2))
        p_values.append(bootstrap.difference(second, first)["p_value"])
    assert 1 <= sum(p <= 0.05 for p in p_values) <= 24
    assert 70 <= sum(p <= 0.5 for p in p_values) <= 130


def test_p_values_of_a_family_are_corrected_as_scipy_corrects_them() -> None:
    p_values = [*RNG.random(30).round(2).tolist(), 0.001, 0.001, 0.004]
    corrected = benjamini_hochberg([None, *p_values])
    np.testing.assert_allclose([corrected[p] for p in p_values], false_discovery_control(p_values))
    assert corrected[0.001] == pytest.approx(0.001 * 33 / 2)
    assert benjamini_hochberg([0.04]) == {0.04: 0.04, None: None}
    assert corrected[None] is None


def test_of_many_equal_models_few_are_called_better() -> None:
    """Of 40 figures that do not differ two have p of .05 or less by chance, and mostly none a corrected one."""
    called = plain = 0
    for trial in range(100):
        p_values = np.random.default_rng(trial).random(40).tolist()
        plain += min(p_values) <= 0.05
        called += min(filter(None, benjamini_hochberg(p_values).values())) <= 0.05
    assert plain >= 75
    assert called <= 12


def test_what_is_undefined_is_none_and_not_a_number_is_an_error() -> None:
    bootstrap = Bootstrap(samples=10)
    empty = bootstrap.figure(bootstrap.ratios(mean_of(np.empty(0)))["mean"])
    assert (empty.value, empty.low, empty.high, empty.n) == (None, None, None, 0)
    nothing = bootstrap.ratios({"x": (np.zeros(3), np.zeros(3))})["x"]
    assert bootstrap.figure(nothing).value is None
    assert bootstrap.difference(nothing, nothing)["p_value"] is None
    with pytest.raises(ValueError, match="finite"):
        bootstrap.ratios(mean_of(np.array([1.0, np.nan])))


def test_the_gap_is_taken_within_each_replicate() -> None:
    groups = {
        "a": Replicates(value=0.5, samples=np.array([0.5, 0.1]), n=2),
        "b": Replicates(value=0.2, samples=np.array([0.4, 0.4]), n=3),
        "c": Replicates(value=0.3, samples=np.array([0.1, 0.2]), n=4),
        "none": Replicates(value=math.nan, samples=np.full(2, np.nan), n=0),
    }
    found = gap(groups)
    assert found.value == pytest.approx(0.3)
    np.testing.assert_allclose(found.samples, [0.4, 0.3])
    assert found.n == 9
    assert math.isnan(gap({}).value)


# ---- repetition ------------------------------------------------------------------------------------------


def test_repetition_and_distinct_equal_the_hand_computed_table() -> None:
    # first prompt: "a b a b" has bigrams ab ba ab; "c" has none. Second prompt: nothing at all.
    rows = prompt_statistics([[[1, 2, 1, 2], [3]], [[], []]])
    num, den = rows["rep_2"]
    assert num.tolist() == pytest.approx([1 / 3, 0])
    assert den.tolist() == [1, 0]
    assert [part.tolist() for part in rows["rep_3"]] == [[0, 0], [1, 0]]
    assert rows["rep_4"][0].tolist() == [0, 0]
    assert [part.tolist() for part in rows["distinct_1"]] == [[3 / 5, 0], [1, 0]]
    assert rows["distinct_2"][0][0] == pytest.approx(2 / 3)
    assert [part.tolist() for part in rows["tokens"]] == [[5, 0], [2, 2]]
    assert [part.tolist() for part in rows["empty"]] == [[0, 2], [2, 2]]


def test_a_collapsed_model_shows() -> None:
    rows = prompt_statistics([[[7] * 20] * 5])
    assert rows["rep_4"][0][0] / rows["rep_4"][1][0] == pytest.approx(1 - 1 / 17)
    assert rows["distinct_1"][0][0] == pytest.approx(1 / 100)


# ---- classifiers against labels --------------------------------------------------------------------------


def test_agreement_equals_scikit_learn_with_ties_and_in_every_replicate() -> None:
    scores = np.round(RNG.random(80), 1)  # many ties
    labels = RNG.random(80) < 0.2 + 0.5 * scores
    bootstrap = Bootstrap(samples=30, seed=4)
    found = classifier_agreement(scores, labels, threshold=0.5, bootstrap=bootstrap)

    def expected(rows: np.ndarray) -> list[float]:
        y, s = labels[rows], scores[rows]
        return [
            accuracy_score(y, s >= 0.5), average_precision_score(y, s), roc_auc_score(y, s), f1_score(y, s >= 0.5),
        ]  # fmt: skip

    assert [found[name]["value"] for name in METRICS] == pytest.approx(expected(np.arange(80)))
    assert (found["n"], found["positives"]) == (80, int(labels.sum()))
    order = np.argsort(-scores, kind="stable")  # replicates count texts in this order
    samples = [expected(np.repeat(order, count.astype(int))) for count in np.concatenate(list(bootstrap.counts(80)))]
    for i, name in enumerate(METRICS):
        low, high = np.quantile([sample[i] for sample in samples], [0.025, 0.975])
        assert (found[name]["low"], found[name]["high"]) == pytest.approx((low, high))


def test_agreement_of_a_perfect_and_of_a_blind_classifier() -> None:
    labels = np.array([True, False, True, False])
    bootstrap = Bootstrap(samples=20)
    perfect = classifier_agreement(labels.astype(float), labels, threshold=0.5, bootstrap=bootstrap)
    assert [perfect[name]["value"] for name in METRICS] == [1, 1, 1, 1]
    blind = classifier_agreement(np.zeros(4), labels, threshold=0.5, bootstrap=bootstrap)
    assert [blind[name]["value"] for name in METRICS] == [0.5, 0.5, 0.5, 0.0]


def test_agreement_refuses_what_it_cannot_compare() -> None:
    bootstrap = Bootstrap(samples=2)
    with pytest.raises(ValueError, match="labelled text 1 is NaN"):
        classifier_agreement(np.array([0, np.nan]), np.array([True, False]), threshold=0.5, bootstrap=bootstrap)
    with pytest.raises(ValueError, match="0 of 2 labels are positive"):
        classifier_agreement(np.zeros(2), np.zeros(2, dtype=bool), threshold=0.5, bootstrap=bootstrap)
    with pytest.raises(ValueError, match="bool labels"):
        classifier_agreement(np.zeros(2), np.zeros(2), threshold=0.5, bootstrap=bootstrap)
