"""The certificate against scipy and hand counts; and that it does not pass a student that is wrong."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy.stats import pearsonr, spearmanr

from ifguide import schemas
from ifguide.evaluation.bootstrap import Bootstrap
from ifguide.student import certificate as of_certificate
from ifguide.student.auditing import certify_files
from ifguide.student.certificate import FIGURES, Audit, certify, wilson

BLOCK, SOURCES = 32, ("forum", "news", "books")
QUICK = Bootstrap(samples=200)


def audit(blocks: int = 120, *, noise: float = 0.3, seed: int = 0) -> Audit:
    """Blocks of two sources in turn, with a good student that rechecks its own top tenth; no block is of a book."""
    rng = np.random.default_rng(seed)
    count = blocks * BLOCK
    exact = rng.normal(size=count) ** 3
    student = exact + noise * rng.normal(size=count)
    number = np.repeat(np.arange(blocks), BLOCK)
    return Audit(
        exact_N=exact,
        student_N=student,
        rechecked_N=student >= np.quantile(student, 0.9),
        blocks_N=1000 + 7 * number,
        sources_N=number % 2,
        sources=SOURCES,
    )


def wrong_on(source: int, given: Audit) -> Audit:
    """The same, but the student's scores of one source are dealt out anew within it."""
    rows = np.flatnonzero(given.sources_N == source)
    student = given.student_N.copy()
    student[rows] = np.random.default_rng(5).permutation(student[rows])
    return replace(given, student_N=student, rechecked_N=student >= np.quantile(student, 0.9))


def test_the_figures_are_those_of_the_tokens() -> None:
    given = audit(noise=1.5)
    certificate = certify(given, bootstrap=QUICK)
    for rows, found in [
        (np.arange(len(given.exact_N)), certificate.whole),
        *((given.sources_N == number, certificate.by_source[SOURCES[number]]) for number in (0, 1)),
    ]:
        exact, student = given.exact_N[rows], given.student_N[rows]
        assert found.pearson.value == pytest.approx(pearsonr(exact, student)[0], abs=1e-12)
        assert found.spearman.value == pytest.approx(spearmanr(exact, student)[0], abs=1e-12)
        assert found.tokens == len(exact)
    count = 0.02 * len(given.exact_N)
    whole = int(count)
    top, student_top = (np.argsort(-own)[: whole + 1] for own in (given.exact_N, given.student_N))
    weight = np.append(np.ones(whole), count - whole)
    partial = dict(zip(student_top.tolist(), weight.tolist(), strict=True))
    overlap = sum(own * partial.get(token, 0.0) for token, own in zip(top.tolist(), weight.tolist(), strict=True))
    assert certificate.whole.overlap.value == pytest.approx(overlap / count)
    assert certificate.whole.rechecked.value == pytest.approx(weight @ given.rechecked_N[top] / count)
    tenth = len(given.student_N) // 10
    in_tenth = np.isin(top, np.argsort(-given.student_N)[:tenth])
    assert certificate.whole.recall.value == pytest.approx(weight @ in_tenth / count)
    assert certificate.whole.top_tokens == round(count)
    assert (certificate.unaudited, certificate.unaudited_sources) == (["books"], 1)
    assert certificate.audited_sources == 2
    assert certificate.rechecked_share == pytest.approx(0.1, abs=1e-3)


def test_a_good_student_passes_and_an_interval_holds_its_figure() -> None:
    certificate = certify(audit(), bootstrap=QUICK)
    assert certificate.shortfalls(0.9, cascade=True) == certificate.shortfalls(0.9, cascade=False) == []
    for fidelity in (certificate.whole, *certificate.by_source.values()):
        for figure in (fidelity.pearson, fidelity.spearman, fidelity.overlap, fidelity.recall, fidelity.rechecked):
            assert figure.value is not None
            assert figure.low is not None
            assert figure.high is not None
            assert figure.low <= figure.value <= figure.high


def test_a_student_that_is_wrong_on_one_source_falls_below_the_bound() -> None:
    good, wrong = certify(audit(), bootstrap=QUICK), certify(wrong_on(1, audit()), bootstrap=QUICK)
    assert good.whole.rechecked.low is not None
    assert wrong.whole.rechecked.low is not None
    assert good.whole.rechecked.low >= 0.9 > wrong.whole.rechecked.low
    assert wrong.by_source["forum"].rechecked.value > 0.9  # type: ignore[operator]
    assert [text.split(":")[0] for text in wrong.shortfalls(0.9, cascade=True)] == ["all sources", "news"]


def test_of_a_student_alone_its_own_top_counts_and_of_a_cascade_what_was_rechecked() -> None:
    nothing = replace(audit(), rechecked_N=np.zeros(len(audit().exact_N), dtype=bool))
    certificate = certify(nothing, bootstrap=QUICK)
    assert certificate.shortfalls(0.9, cascade=False) == []
    assert "0.000" in certificate.shortfalls(0.9, cascade=True)[0]
    assert "in rechecked blocks" in certificate.shortfalls(0.9, cascade=True)[0]


def test_a_small_source_that_is_wrong_is_named_where_the_whole_hides_it() -> None:
    given = audit(400)
    few = replace(given, sources_N=((given.blocks_N - 1000) // 7 % 20 == 0).astype(np.int64))
    certificate = certify(wrong_on(1, few), bootstrap=QUICK)
    assert certificate.shortfalls(0.85, cascade=True)[0].startswith("news: ")
    assert certificate.whole.rechecked.low is not None
    assert certificate.whole.rechecked.low > 0.85


def test_the_bound_holds_for_the_corpus_that_the_audit_was_drawn_from() -> None:
    corpus = audit(1500, noise=1.0)
    truth = certify(corpus, bootstrap=Bootstrap(samples=2)).whole
    held = 0
    for seed in range(40):
        chosen = np.random.default_rng(seed).choice(1500, 60, replace=False)
        rows = np.isin((corpus.blocks_N - 1000) // 7, chosen)
        arrays = {name: getattr(corpus, name)[rows] for name in vars(corpus) if name.endswith("_N")}
        found = certify(replace(corpus, **arrays), bootstrap=Bootstrap(samples=100)).whole
        held += all(
            getattr(found, name).low <= getattr(truth, name).value <= getattr(found, name).high
            for name in ("recall", "rechecked", "overlap")
        )
    assert held >= 34  # of 40, and 95% each


def test_order_does_not_matter() -> None:
    given = audit(40)
    shuffled = np.random.default_rng(1).permutation(len(given.exact_N))
    arrays = {name: getattr(given, name)[shuffled] for name in vars(given) if name.endswith("_N")}
    first, second = (certify(own, bootstrap=QUICK).as_json() for own in (given, replace(given, **arrays)))
    for name in FIGURES:
        for end in ("value", "low", "high"):
            assert second["whole"][name][end] == pytest.approx(first["whole"][name][end], abs=1e-9)


def test_all_found_in_few_blocks_is_no_certainty() -> None:
    given = audit(10, noise=0.0)
    rechecked = certify(given, bootstrap=QUICK).whole.rechecked
    assert rechecked.value == 1
    assert rechecked.low is not None
    assert 0.5 < rechecked.low < 0.75
    assert wilson(1.0, 10)[0] == pytest.approx(0.722, abs=1e-3)


def test_ties_of_the_student_are_no_overlap() -> None:
    given = audit()
    constant = certify(replace(given, student_N=np.zeros(len(given.exact_N))), bootstrap=QUICK)
    assert constant.whole.overlap.value == pytest.approx(0.02)
    assert constant.whole.spearman.value is None
    assert constant.whole.pearson.low is None


def test_what_is_no_audit_is_refused() -> None:
    given = audit(4)
    with pytest.raises(ValueError, match="exact scores of the audit are not finite"):
        certify(replace(given, exact_N=np.full(len(given.exact_N), np.nan)))
    with pytest.raises(ValueError, match="same tokens"):
        replace(given, student_N=given.student_N[:-1])
    with pytest.raises(ValueError, match="two tokens"):
        Audit(**{name: getattr(given, name)[:1] if name.endswith("_N") else SOURCES for name in vars(given)})


def test_of_many_sources_those_with_the_most_tokens_have_figures_and_ten_that_are_not_audited_are_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(of_certificate, "MOST_SOURCES", 3)
    given = audit(40)
    names = [f"file {i:03d}" for i in range(100)]
    blocks_N = (given.blocks_N - 1000) // 7
    found = certify(replace(given, sources_N=np.minimum(blocks_N % 11, 7) + 1, sources=names), bootstrap=QUICK)
    assert list(found.by_source) == ["file 001", "file 002", "file 008"]  # the last has four times as many as others
    assert found.audited_sources == 8
    assert found.unaudited == ["file 000", *names[9:18]]
    assert found.unaudited_sources == 92
    assert str(found).endswith("; no block of file 000, " + ", ".join(names[9:18]) + ", 82 more")


def test_the_source_of_each_token_is_read_from_files(tmp_path: Path) -> None:
    given = audit(40)
    parts = []
    for number, rows in enumerate(np.array_split(np.arange(len(given.exact_N)), 3)):
        sources = [SOURCES[place] for place in given.sources_N[rows]]
        columns = [given.blocks_N[rows], rows, sources, given.exact_N[rows], given.student_N[rows]]
        columns.append(given.rechecked_N[rows])
        arrays = [pa.array(own, field.type) for own, field in zip(columns, schemas.AUDIT, strict=True)]
        parts.append(tmp_path / f"audit-{number}.parquet")
        pq.write_table(pa.Table.from_arrays(arrays, schema=schemas.AUDIT), parts[-1])
    found = certify_files(parts, SOURCES)
    tokens = {name: own.tokens for name, own in found.by_source.items()}
    assert tokens == {name: int((given.sources_N == place).sum()) for place, name in enumerate(SOURCES[:2])}
    assert found.unaudited == ["books"]


def test_of_many_good_sources_hardly_one_falls_short_by_chance() -> None:
    """Small sources, each with an interval of its own: one of twenty would be below its bound by chance."""
    rng = np.random.default_rng(0)
    blocks, sources = 1000, 200
    count = blocks * BLOCK
    exact = rng.normal(size=count) ** 3
    student = exact + 1.5 * rng.normal(size=count)
    number = np.repeat(np.arange(blocks), BLOCK)
    given = Audit(
        exact_N=exact,
        student_N=student,
        rechecked_N=(rng.random(blocks) < 0.65)[number],
        blocks_N=number,
        sources_N=number % sources,
        sources=[f"file {i}" for i in range(sources)],
    )
    certificate = certify(given, bootstrap=Bootstrap(samples=60))
    least = certificate.whole.rechecked.low
    assert least is not None
    alone = [own.rechecked.high for own in certificate.by_source.values()]
    assert any(high is not None and high < least for high in alone)
    assert certificate.shortfalls(least, cascade=True) == []
    lost = replace(given, rechecked_N=given.rechecked_N & (given.sources_N >= 20))
    few = replace(lost, sources_N=lost.sources_N // 20, sources=given.sources[:10])
    assert any("surely below" in text for text in certify(few, bootstrap=QUICK).shortfalls(least, cascade=True))
