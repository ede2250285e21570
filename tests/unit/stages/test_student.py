"""What no student can be fitted or audited on is refused before a plan is written: the remedy would be refused too."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import GPT2Config

from ifguide.artifacts import read_manifest
from ifguide.config import config_from_mapping
from ifguide.run import Run
from ifguide.spans.tables import PackedCorpus
from ifguide.stages import fit_student, score_corpus
from ifguide.stages.scoring import ScoringInputs
from tests.exported import make_run
from tests.tokenizers import tokenizers
from tests.unit.selection.test_ensemble import TEXTS, T

AUDIT = {"scorer": "cascade", "audit_fraction": 0.5}


class Reached(BaseException):
    """The work itself has begun."""


def reached(*arguments: Any, **options: Any) -> None:
    raise Reached


@pytest.fixture
def run_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Run]:
    """A run of a packed corpus with some `fit_student` and `score_corpus`."""
    run_dir, tokenizer = tmp_path / "run", tokenizers()["bytes"]
    make_run(run_dir, TEXTS, tokenizer, block_size=T, blocks_per_shard=24)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    tree = {"run_dir": str(run_dir), "tokenizer": str(tmp_path / "tokenizer"), "pack_corpus": {"block_size": T}}

    def inputs(run: Run, verb: str) -> Any:
        packed = PackedCorpus.of(run.corpus, read_manifest(run.corpus))
        return SimpleNamespace(run=run, packed=packed, inputs={}, beginning=SimpleNamespace(of_documents=True))

    monkeypatch.setattr(ScoringInputs, "of", inputs)
    monkeypatch.setattr(score_corpus, "require_student", lambda given: SimpleNamespace(fingerprint="f"))
    for module in (fit_student, score_corpus):
        monkeypatch.setattr(module, "require_resources", reached)
    return lambda student, scoring: Run(
        config=config_from_mapping({**tree, "fit_student": student, "score_corpus": scoring})
    )


def test_an_audit_of_hardly_a_block(run_of: Callable[..., Run]) -> None:
    small, enough = (run_of({"sample_fraction": 0.5}, {**AUDIT, "audit_fraction": share}) for share in (1e-3, 0.5))
    for verb, make in (("fit_student", fit_student.fit_student), ("score_corpus", score_corpus.score_corpus)):
        with pytest.raises(ValueError, match=r"^score_corpus\.audit_fraction: 0\.001 of .* set it to"):
            make(small)
        assert not small.made_by(verb).exists()
        with pytest.raises(Reached):
            make(enough)


def test_a_sample_without_a_block_to_fit_on_or_to_choose_by(run_of: Callable[..., Run]) -> None:
    small, enough = (run_of({"sample_fraction": share}, AUDIT) for share in (1e-6, 0.5))
    with pytest.raises(ValueError, match=r"a student needs blocks .* raise fit_student\.sample_fraction"):
        fit_student.fit_student(small)
    with pytest.raises(Reached):
        fit_student.fit_student(enough)


def test_an_encoder_that_cannot_read_the_blocks_or_keep_documents_apart(
    run_of: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def apart(function: Callable[..., None], source: str, **_: Any) -> None:
        assert function is fit_student.require_apart
        if source.endswith("mixing"):
            raise ValueError("lets documents see each other")

    monkeypatch.setattr(fit_student, "run_task", apart)
    for name, positions in (("short", T - 1), ("mixing", T), ("good", T)):
        GPT2Config(vocab_size=512, n_positions=positions).save_pretrained(tmp_path / name)

    def fit(name: str) -> None:
        student = {"kind": "encoder", "encoder": {"source": str(tmp_path / name)}, "sample_fraction": 0.5}
        fit_student.fit_student(run_of(student, AUDIT))

    with pytest.raises(ValueError, match=r"15 positions of fit_student\.encoder\.source"):
        fit("short")
    with pytest.raises(ValueError, match="lets documents see each other"):
        fit("mixing")
    with pytest.raises(Reached):
        fit("good")
