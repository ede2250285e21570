"""The plan of a student: its pass, what is scored exactly beside it, and what it is fitted by."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ifguide.config import VERBS, load_config
from ifguide.hardware import hardware
from ifguide.influence.method import PRESETS, chosen_method
from ifguide.planning import flops
from ifguide.planning.command import make_job
from ifguide.planning.estimate import estimate
from ifguide.planning.job import StageEstimate
from ifguide.planning.measurements import rates
from ifguide.student.sampling import audit_share

PYTHIA = Path(__file__).parents[3] / "configs" / "pythia160m_owt.yaml"


def test_a_cascade_costs_its_students_pass_and_the_exact_one_over_what_it_rechecks() -> None:
    keys = ["score_corpus.scorer=cascade", "score_corpus.recheck_fraction=0.2", "score_corpus.audit_fraction=0.05"]
    config = load_config(PYTHIA, keys)
    exact = {item.stage: item for item in estimate(make_job(load_config(PYTHIA), corpus_tokens=1e9))}["score_corpus"]
    job = make_job(config, corpus_tokens=1e9)
    stages = {item.stage: item for item in estimate(job)}
    assert set(stages) == set(VERBS)
    per_token = flops.scoring(
        job.proxy, job.block, attribution="target", method=chosen_method(config.score_corpus), behaviours=1
    )
    student, audited = flops.head_student(job.proxy, job.block), audit_share(0.05, int(1e9 / job.block))
    assert stages["score_corpus"].flop == pytest.approx(1e9 * (student + (0.2 + audited) * per_token))
    assert stages["score_corpus"].flop < 0.8 * exact.flop
    assert stages["fit_student"].flop == pytest.approx(1e7 * per_token)
    for kind, student in (
        ("suffix", flops.suffix_student(job.proxy, job.block, method=chosen_method(config.score_corpus))),
        ("encoder", 2 * 3 * (4 * 256**2 + 3 * 256 * 688) + 2 * 3 * 256 * job.block),
    ):
        other = make_job(load_config(PYTHIA, [*keys, f"fit_student.kind={kind}"]), corpus_tokens=1e9)
        stages = {item.stage: item for item in estimate(other)}
        assert stages["score_corpus"].flop == pytest.approx(1e9 * (student + (0.2 + audited) * per_token))
        assert student < 0.7 * per_token
    ngram = make_job(load_config(PYTHIA, [*keys, "fit_student.kind=ngram"]), corpus_tokens=1e9)
    looked_up = {item.stage: item for item in estimate(ngram)}["score_corpus"]
    assert looked_up.flop == pytest.approx(1e9 * (0.2 + audited) * per_token)
    assert "lookup" in looked_up.basis


def test_an_ngram_is_looked_up_on_one_core_an_actor() -> None:
    keys = ["score_corpus.scorer=cascade", "fit_student.kind=ngram"]

    def seconds(*further: str) -> float:
        job = make_job(load_config(PYTHIA, [*keys, *further]), corpus_tokens=1e12)
        return next(stage.seconds for stage in estimate(job) if stage.stage == "score_corpus")

    assert seconds("score_corpus.resources.cpus=1") == seconds("score_corpus.resources.cpus=16")
    assert seconds("score_corpus.max_actors=4") > seconds("score_corpus.max_actors=8")


def test_a_suffix_is_two_thirds_of_a_forward_pass_and_a_third_of_an_exact_one() -> None:
    job, method = make_job(load_config(PYTHIA), corpus_tokens=1e9), PRESETS["fast"]
    layer, attended = job.proxy.tracked / 12, 2 * 768 * 2048  # Pythia-160M has twelve layers of 768
    expected = 8 * (2 * layer + attended) + 4 * (6 * layer + 2 * attended) + 4 * job.proxy.head
    assert flops.suffix_student(job.proxy, 2048, method=method) == pytest.approx(expected)
    low = replace(method, rank=8)
    assert flops.suffix_student(job.proxy, 2048, method=low) < expected


def test_an_encoder_is_trained_on_one_worker_for_all_its_epochs() -> None:
    keys = ["score_corpus.scorer=student", "fit_student.kind=encoder"]

    def fitting(*further: str) -> Any:
        job = make_job(load_config(PYTHIA, [*keys, *further]), corpus_tokens=1e9)
        return next(stage for stage in estimate(job) if stage.stage == "fit_student")

    once, twice = fitting("fit_student.encoder.epochs=4"), fitting("fit_student.encoder.epochs=8")
    none = fitting("fit_student.kind=ngram")
    assert twice.seconds - once.seconds == pytest.approx(once.seconds - none.seconds)
    many = [fitting("fit_student.partitions=8", f"fit_student.encoder.epochs={epochs}") for epochs in (4, 8)]
    assert many[1].seconds - many[0].seconds == pytest.approx(twice.seconds - once.seconds)
    larger = fitting("fit_student.encoder.layers=6", "fit_student.encoder.epochs=4")
    assert larger.seconds > once.seconds
    published = fitting("fit_student.encoder.source=EleutherAI/pythia-160m", "fit_student.encoder.epochs=4")
    assert published.seconds > larger.seconds


def test_the_sums_of_a_head_are_float64_work_of_all_workers() -> None:
    keys = ["score_corpus.scorer=student", "fit_student.sample_fraction=0.1"]

    def fitting(tokens: float, kind: str, *further: str) -> StageEstimate:
        job = make_job(load_config(PYTHIA, [*keys, f"fit_student.kind={kind}", *further]), corpus_tokens=tokens)
        return next(stage for stage in estimate(job) if stage.stage == "fit_student")

    head, ngram = fitting(1e9, "head"), fitting(1e9, "ngram")
    assert head.flop == ngram.flop, "those are in the precision of the scores"
    sums = 1e8 * (16 + 8) * 768**2  # four layers of 768
    assert head.floor - ngram.floor == pytest.approx(sums / (head.workers * hardware("h100").float64))
    assert head.seconds - ngram.seconds == pytest.approx((head.floor - ngram.floor) / rates()["head_sums"].value)
    assert head.low <= head.seconds <= head.high
    assert "head_sums" in head.basis
    on_cpus = ["score_corpus.resources.gpus=0", "score_corpus.resources.cpus=2"]
    more = fitting(1e9, "head", *on_cpus).floor - fitting(1e9, "ngram", *on_cpus).floor
    cores = fitting(1e9, "head", *on_cpus).workers
    assert more == pytest.approx(sums / (cores * hardware("cpu").float64))
