"""When layers and loss are compiled."""

from __future__ import annotations

import pytest
import torch

from ifguide.config import ConfigError
from ifguide.training import compiled
from ifguide.training.compiled import EARNED_FLOP, compiles

LONG = {"cpu": EARNED_FLOP["cpu"] / 6, "cuda": EARNED_FLOP["cuda"] / 6}


@pytest.mark.parametrize(
    ("device", "dtype", "tokens", "expected"),
    [
        ("cpu", "bfloat16", LONG["cpu"], True),
        ("cpu", "bfloat16", LONG["cpu"] / 2, False),
        ("cpu", "float32", 10 * LONG["cpu"], False),
        ("cuda", "float32", LONG["cuda"], True),
        ("cuda", "bfloat16", LONG["cuda"] / 2, False),
    ],
)
def test_long_trainings_compile_where_it_pays(
    device: str, dtype: str, tokens: float, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled, "can_fuse", lambda device: True)
    size = {"parameters": 1, "tokens": int(tokens) + 1, "device": torch.device(device), "dtype": dtype}
    assert compiles(None, **size).on is expected
    assert compiles(True, **size) == (True, "as the config says")
    assert compiles(False, **size) == (False, "as the config says")


def test_without_a_compiler_nothing_is_compiled_and_a_wish_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "can_fuse", lambda device: False)
    size = {"parameters": 10**9, "tokens": 10**9, "device": torch.device("cpu"), "dtype": "bfloat16"}
    assert compiles(None, **size) == (False, "there is no compiler here")
    with pytest.raises(ConfigError, match="no compiler"):
        compiles(True, **size)
