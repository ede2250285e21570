"""A student of the scores, and scores that it made: `fit_student`, and `score_corpus` with another scorer."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import pytest

from ifguide import schemas
from ifguide.artifacts import Manifest, read_manifest
from ifguide.config import Config
from ifguide.run import Run
from ifguide.stages.build_mask import build_mask
from ifguide.stages.fit_student import fit_student
from ifguide.stages.score_corpus import score_corpus

Copied = Callable[..., Config]
STUDENT = {
    "fit_student__sample_fraction": 0.3,
    "fit_student__resources": {"gpus": 0},
    "score_corpus__audit_fraction": 0.1,
    "score_corpus__recheck_fraction": 0.25,
    "score_corpus__min_recall": 0.0,
}


def scores_of(run: Run) -> np.ndarray:
    tables = [schemas.read_table(run.scores / name) for name in read_manifest(run.scores).names()]
    return np.concatenate([schemas.per_token_array(table, "token_score") for table in tables])


def files_of(manifest: Manifest | None) -> dict[str, str]:
    assert manifest is not None
    return {name: entry["sha256"] for name, entry in manifest.files.items()}


@pytest.mark.parametrize("kind", ["head", "ngram"])
def test_a_cascade_holds_exact_scores_where_it_rechecked_and_the_students_elsewhere(
    copied: Copied, finished: Config, kind: str
) -> None:
    config = copied(
        drop=("scores", "ranking", "mask"), fit_student__kind=kind, score_corpus__scorer="cascade", **STUDENT
    )
    run, exact_BT = Run(config=config), scores_of(Run(config=finished))
    fit_student(run)
    facts = json.loads((run.student / "student.json").read_text())
    assert facts["chosen"] in facts["tried"]
    assert facts["sample"]["blocks"] == pytest.approx(0.3 * len(exact_BT), abs=2)
    score_corpus(run)
    scores_BT = scores_of(run)
    same_B = np.isclose(scores_BT, exact_BT, rtol=1e-3, atol=1e-3 * exact_BT.std()).all(axis=1)
    certificate = json.loads((run.scores / "method.json").read_text())["certificate"]
    assert same_B.sum() == certificate["exact_blocks"]
    assert 0.25 * len(same_B) <= same_B.sum() <= 0.35 * len(same_B) + 2
    assert build_mask(run) is not None
