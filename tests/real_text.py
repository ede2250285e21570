"""The real text that `ifguide fetch-data` makes; tests that read it are skipped where it is absent."""

from __future__ import annotations

import pytest

from bench.common.places import ABSENT, DATA

needs_real_text = pytest.mark.skipif(not DATA.is_dir(), reason=f"{DATA} is absent: {ABSENT}")

__all__ = ["DATA", "needs_real_text"]
