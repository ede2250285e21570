"""The config reference: whole, current, and refused where a key is not described."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from ifguide.config import Config, to_mapping
from ifguide.config.reference import described, reference

DOCS = Path(__file__).parents[3] / "docs"


def test_the_reference_in_docs_is_current() -> None:
    made = "python -m ifguide.config.reference > docs/config.md"
    assert (DOCS / "config.md").read_text(encoding="utf-8") == reference(), f"run `{made}`"


def test_every_key_of_every_section_has_a_row() -> None:
    text = reference()
    for name, section in to_mapping(Config()).items():
        if name in ("proxy", "target") or not isinstance(section, dict):
            assert f"| `{name}`" in text
        else:
            missing = [key for key in section if f"| `{name}.{key}`" not in text]
            assert not missing, name


def test_a_key_says_type_default_bounds_and_whether_results_change() -> None:
    text = reference()
    assert "| `build_mask.quantile` | number | `0.99` | > 0, ≤ 1 | " in text
    assert "| `score_corpus.max_actors` * | integer | `1` | ≥ 1 | " in text
    assert "| `pack_corpus.resources` * | [Resources](#resources) | `{gpus: 0}` | " in text
    assert "| `rows` | two integers or null | null | ≥ 0, ascending | " in text
    assert "| `project` * | text | required | " in text


def test_keys_without_a_meaning_and_meanings_without_a_key_are_errors() -> None:
    @dataclass
    class Undescribed:
        """A section.

        Attributes:
            first: a key.
        """

        first: int = 0
        second: int = 0

    @dataclass
    class Gone:
        """A section.

        Attributes:
            first: a key,
                over two lines.
            second: no key.
        """

        first: int = 0

    with pytest.raises(ValueError, match=r"Undescribed\.second"):
        described(Undescribed)
    with pytest.raises(ValueError, match="second, which is no key"):
        described(Gone)
    Gone.__doc__ = (Gone.__doc__ or "").replace("second: no key.", "")
    assert described(Gone) == ("A section.", {"first": "a key, over two lines."})
