"""Settings of all tests."""

import os

import pytest
import torch
from hypothesis import settings

# Without a GPU, Triton's kernels are interpreted; Triton reads this when it is first imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# a busy machine is no failure: examples have no time limit of their own, tests have pytest's
settings.register_profile("ifguide", deadline=None)
settings.load_profile("ifguide")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What runs stages comes first: with `pytest -n` the many short tests then fill the end of the session."""
    items.sort(key=lambda item: not item.nodeid.startswith("tests/stages/"))
