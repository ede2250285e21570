"""Settings of all tests."""

from typing import Any

import pytest
from hypothesis import settings
from xdist.scheduler import LoadScopeScheduling

# a busy machine is no failure: examples have no time limit of their own, tests have pytest's
settings.register_profile("ifguide", deadline=None)
settings.load_profile("ifguide")


class StagesTogether(LoadScopeScheduling):
    """What runs stages goes to one process of `pytest -n`: one Ray cluster and one finished run serve all of it. Of the
    rest, a file stays together for the sake of its fixtures."""

    def _split_scope(self, nodeid: str) -> str:
        return "stages" if nodeid.startswith("tests/stages/") else nodeid.split("::")[0]


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> StagesTogether:
    """The scheduler of `pytest -n`."""
    return StagesTogether(config, log)
