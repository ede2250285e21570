"""What a run decided about its scores is read back as it was written, and refused when it is damaged."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ifguide.config import ScoreCorpus
from ifguide.influence.agreement import ScoreAgreement
from ifguide.influence.decision import METHOD, Decision, Energy, Memory, _check, describe_decision
from ifguide.influence.method import PRESETS, Method
from ifguide.influence.scorer import TokenScorer
from tests.reference.test_influence import random_directions
from tests.tiny import as_tensors, random_blocks, tiny_model

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
    message = r"top 30 tokens 0\.800 .* 100 tokens; .*min_agreement is 0\.9\. Set .*precision.*check_blocks"
    with pytest.raises(ValueError, match=message):
        DECISION.require_agreement(0.9)
    cut = replace(DECISION, method=replace(DECISION.method, rank=4))
    with pytest.raises(ValueError, match=r"0\.9\. The directions keep 0\.500 .* raise score_corpus\.rank .* Set "):
        cut.require_agreement(0.9)


def test_the_check_is_of_the_behaviours_and_nulls_need_only_be_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank of 1 keeps all of the behaviour's direction and little of the null's."""
    model = tiny_model("llama")
    shapes = {name: tensor.shape for name, tensor in random_directions(model).items()}
    generator = torch.Generator().manual_seed(0)
    behaviour = {
        name: torch.outer(*(torch.randn(size, generator=generator) for size in shape)) for name, shape in shapes.items()
    }
    null = random_directions(model)
    tokens_BT, lengths_B = as_tensors(*random_blocks(4, 24))

    method = Method(engine="difference", precision="float32", rank=1)
    both = TokenScorer(model, [behaviour, null], attribution="target", method=method)
    assert _check(both, [behaviour], tokens_BT, lengths_B, None).least > 0.9
    assert _check(both, [behaviour, null], tokens_BT, lengths_B, None).least < 0.9
    scores_KBT = both.score_one_by_one(tokens_BT, lengths_B)
    scores_KBT[1, 2, 3] = math.nan
    monkeypatch.setattr(both, "score_one_by_one", lambda *_: scores_KBT)
    with pytest.raises(ValueError, match="scores are not finite"):
        _check(both, [behaviour], tokens_BT, lengths_B, None)


def test_the_line_says_what_was_decided() -> None:
    line = describe_decision(ScoreCorpus(), DECISION, Memory(total=2_000_000_000, available=8_000_000_000))
    for part in ("target, difference engine, bfloat16, fused, rank full", "8 blocks at a time", "2.00 GB", "0.800"):
        assert part in line
