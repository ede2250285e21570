"""Settings of all tests."""

from pathlib import Path

import pytest
from hypothesis import settings

# a busy machine is no failure: examples have no time limit of their own, tests have pytest's
settings.register_profile("ifguide", deadline=None)
settings.load_profile("ifguide")

STAGES = Path(__file__).parent / "stages"


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What runs stages shares one process of `pytest -n`: one Ray cluster and one finished run serve all of it."""
    for item in items:
        if item.path.is_relative_to(STAGES):
            item.add_marker(pytest.mark.xdist_group("stages"))
