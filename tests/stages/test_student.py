"""A student of the scores, and scores that it made: `fit_student`, and `score_corpus` with another scorer."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ifguide import schemas
from ifguide.artifacts import Manifest, MismatchError, read_manifest, write_manifest
from ifguide.config import Config, ModelSource
from ifguide.distributed import shards as pools
from ifguide.folders import FOLDERS
from ifguide.influence.proxy import Beginning
from ifguide.models import load_model
from ifguide.run import Run
from ifguide.stages import fit_student as fitting
from ifguide.stages import score_corpus as scoring
from ifguide.stages.build_mask import build_mask
from ifguide.stages.fit_student import fit_student
from ifguide.stages.score_corpus import score_corpus
from ifguide.status import run_status
from tests.tiny import ARCHITECTURES

Copied = Callable[..., Config]
MADE = ("scores", "ranking", "mask")
OPTIONS: dict[str, Any] = {
    "fit_student__sample_fraction": 0.3,
    "score_corpus__micro_batch_blocks": 8,  # chosen by free memory otherwise
    "score_corpus__audit_fraction": 0.1,
    "score_corpus__recheck_fraction": 0.25,
    "score_corpus__min_recall": 0.0,
}


def scores_of(run: Run) -> np.ndarray:
    tables = [schemas.read_table(run.scores / name) for name in read_manifest(run.scores).names()]
    return np.concatenate([schemas.per_token_array(table, "token_score") for table in tables])


def digests(manifest: Manifest | None) -> dict[str, str]:
    assert manifest is not None
    return {name: entry["sha256"] for name, entry in manifest.files.items()}


def certificate_of(run: Run) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run.scores / "method.json").read_text())["certificate"]
    return content


class Killed(BaseException):
    """The driver's end, in the middle of a pass."""


def killed_after(one: bool, calls: int = 1) -> Callable[..., Any]:
    """`run_shards` whose driver is killed in its call number `calls`, with `one` shard done or none."""
    count = iter(range(1, calls + 1))

    def run(verb: str, shards: Sequence[Any], *arguments: Any, **options: Any) -> Any:
        if next(count) < calls:
            return pools.run_shards(verb, shards, *arguments, **options)
        pools.run_shards(verb, shards[: int(one)], *arguments, **options)
        raise Killed

    return run


SMALL = {"hidden_size": 16, "layers": 1, "heads": 2, "epochs": 2, "batch_tokens": 512}


@pytest.mark.parametrize("kind", ["head", "suffix", "encoder", "ngram"])
def test_a_cascade_holds_exact_scores_where_it_rechecked_and_the_students_elsewhere(
    copied: Copied, finished: Config, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "COUNTED_SHARDS", 2)  # more than one task
    config = copied(
        drop=MADE, fit_student__kind=kind, fit_student__encoder=SMALL, score_corpus__scorer="cascade", **OPTIONS
    )
    run, exact_BT = Run(config=config), scores_of(Run(config=finished))
    fit_student(run)
    facts = json.loads((run.student / "student.json").read_text())
    assert facts["chosen"] in facts["tried"]
    assert facts["sample"]["blocks"] == pytest.approx(0.3 * len(exact_BT), abs=2)
    score_corpus(run)
    scores_BT = scores_of(run)
    same_B = np.isclose(scores_BT, exact_BT, rtol=1e-3, atol=1e-3 * exact_BT.std()).all(axis=1)
    certificate = certificate_of(run)
    assert same_B.sum() == certificate["exact_blocks"]
    assert 0.25 * len(same_B) <= same_B.sum() <= 0.35 * len(same_B) + 2
    text = next(line for line in run_status(run.folder, FOLDERS).lines() if line.startswith("scores"))
    assert "of the exact top 2% in rechecked blocks" in text
    assert build_mask(run) is not None


def test_a_driver_that_is_killed_in_any_pass_goes_on_to_the_same_bytes_with_more_actors(
    copied: Copied, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {**OPTIONS, "fit_student__partitions": 2, "score_corpus__scorer": "cascade"}
    run = Run(config=copied(drop=MADE, **options))
    monkeypatch.setattr(fitting, "run_shards", killed_after(one=True))
    with pytest.raises(Killed):
        fit_student(run)
    part = run.student / "part-00000.npz"
    made = part.stat().st_mtime_ns
    monkeypatch.setattr(fitting, "run_task", lambda *arguments, **options: (_ for _ in ()).throw(Killed))
    monkeypatch.setattr(fitting, "run_shards", pools.run_shards)
    with pytest.raises(Killed):  # before the fit
        fit_student(run)
    assert part.stat().st_mtime_ns == made
    monkeypatch.undo()
    student = fit_student(run)

    for calls in (1, 2):  # in the student's pass, in the exact one
        monkeypatch.setattr(scoring, "run_shards", killed_after(one=True, calls=calls))
        with pytest.raises(Killed):
            score_corpus(run)
    monkeypatch.undo()
    first = run.scores / "student" / "shard-00000.parquet"
    assert first.exists()
    more = replace(run.config, score_corpus=replace(run.config.score_corpus, max_actors=2))
    scores = score_corpus(Run(config=more))
    assert not first.exists()

    for folder in (run.student, run.scores):
        folder.rename(folder.with_name(f"{folder.name}-before"))
    assert digests(fit_student(run)) == digests(student)
    assert digests(score_corpus(run)) == digests(scores)


def test_a_student_that_misses_too_much_stops_the_stage_and_one_of_another_query_is_refused(copied: Copied) -> None:
    options = {**OPTIONS, "fit_student__kind": "ngram", "score_corpus__scorer": "student"}
    run = Run(config=copied(drop=MADE, **options))
    with pytest.raises(FileNotFoundError, match="fit_student"):
        score_corpus(run)
    fit_student(run)
    strict = replace(run.config.score_corpus, min_recall=1.0)
    with pytest.raises(
        ValueError, match=r"misses too much: all sources.*student.s top 10%.*fit_student\.sample_fraction"
    ):
        score_corpus(Run(config=replace(run.config, score_corpus=strict)))
    found = certificate_of(run)
    assert found["whole"]["recall"]["low"] < 1
    manifest = score_corpus(run)  # a lower bar is no other result
    assert manifest is not None
    assert certificate_of(run) == found
    assert manifest.summary["student"]["exact_blocks"] == found["audited_blocks"]

    for name in ("query", "corpus", "proxy"):
        _remade(run, name)
        with pytest.raises(MismatchError, match=f"the {name} of .*student"):
            score_corpus(run)


def _remade(run: Run, name: str) -> None:
    """The student as if it were of another input."""
    manifest, own = read_manifest(run.student), read_manifest(run.scores).inputs
    inputs = {key: own[key] for key in manifest.inputs}
    write_manifest(run.student, replace(manifest, inputs={**inputs, name: "0" * 64}))


def test_an_encoder_that_was_replaced_is_refused(
    copied: Copied, finished: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, source = str(tmp_path / "encoder"), Run(config=finished).proxy_source
    load_model(source).save_pretrained(folder)
    options = {**OPTIONS, "fit_student__kind": "encoder", "fit_student__encoder": {"source": folder}}
    run = Run(config=copied(drop=MADE, score_corpus__scorer="student", **options))
    monkeypatch.setattr(fitting, "run_shards", killed_after(one=False))
    with pytest.raises(Killed):
        fit_student(run)
    model = load_model(source)
    next(model.parameters()).data += 1
    model.save_pretrained(folder)
    with pytest.raises(MismatchError, match=r"student was made from something else: encoder was"):
        fit_student(run)


def test_an_encoder_that_lets_documents_see_each_other_is_refused_before_the_sample_is_scored(
    copied: Copied, finished: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = {**ARCHITECTURES["opt"], "vocab_size": 512, "max_position_embeddings": 128}
    load_model(ModelSource(architecture=fields)).save_pretrained(tmp_path / "encoder")
    options = {**OPTIONS, "fit_student__kind": "encoder", "fit_student__encoder": {"source": str(tmp_path / "encoder")}}
    run = Run(config=copied(drop=MADE, score_corpus__scorer="student", **options))
    apart = replace(fitting.ScoringInputs.of(run, "fit_student"), beginning=Beginning(None, of_documents=True))
    monkeypatch.setattr(fitting.ScoringInputs, "of", lambda run, verb: apart)
    monkeypatch.setattr(fitting, "run_shards", killed_after(one=False))
    with pytest.raises(ValueError, match=r"^pretrain\.document_attention: OPTForCausalLM, the encoder, lets"):
        fit_student(run)
