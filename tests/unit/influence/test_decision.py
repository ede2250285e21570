"""What a run decided about its scores is read back as it was written, and refused when it is damaged."""

from pathlib import Path

import pytest

from ifguide.config import ScoreCorpus
from ifguide.influence.agreement import ScoreAgreement
from ifguide.influence.decision import METHOD, Decision, Energy, Memory, describe_decision
from ifguide.influence.method import PRESETS

CHECK = ScoreAgreement(correlation=0.95, spearman=0.9, top=0.8, tokens=100)
DECISION = Decision(
    method=PRESETS["fast"],
    engine="difference",
    steps=[2.0**-14],
    threads=2,
    micro_batch_blocks=8,
    energy=Energy(least=0.5, mean=0.75, of_module={"a": 0.5, "b": 1.0}),
    check=CHECK,
)


def test_it_is_read_as_it_was_written(tmp_path: Path) -> None:
    assert Decision.read(tmp_path) is None
    DECISION.write(tmp_path)
    assert Decision.read(tmp_path) == DECISION


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"method": {"engine": 1}, "energy": {}, "check": null}'])
def test_a_damaged_one_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / METHOD).write_text(content)
    with pytest.raises(ValueError, match=rf"{METHOD} is not a scoring method .*score the corpus again"):
        Decision.read(tmp_path)


def test_a_method_that_does_not_agree_is_refused_with_what_to_do() -> None:
    DECISION.require_agreement(0.8)
    with pytest.raises(ValueError, match=r"top 1% 0\.800 .*min_agreement is 0\.9\. .* raise score_corpus\.rank"):
        DECISION.require_agreement(0.9)


def test_the_line_says_what_was_decided() -> None:
    line = describe_decision(ScoreCorpus(), DECISION, Memory(total=2_000_000_000, available=8_000_000_000))
    for part in ("target, difference engine, bfloat16, fused, rank full", "8 blocks at a time", "2.00 GB", "0.800"):
        assert part in line
