"""Settings of all tests."""

import os

# One thread a process, and for what it starts: `pytest -n` fills the cores, and threads that wait for each other's
# turn double the time of small matrices. Read when torch and numpy are imported; Ray's workers have their own number.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
from hypothesis import settings

# Without a GPU, Triton's kernels are interpreted; Triton reads this when it is first imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# a busy machine is no failure: examples have no time limit of their own, tests have pytest's
settings.register_profile("ifguide", deadline=None)
settings.load_profile("ifguide")


# the longest files: the one makes the run that stage tests share, while the other needs none of it
FIRST = ("tests/stages/test_kill.py", "tests/stages/test_s3.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What runs stages comes first: with `pytest -n` the many short tests then fill the end of the session."""
    items.sort(key=lambda item: (not item.nodeid.startswith("tests/stages/"), not item.nodeid.startswith(FIRST)))
