"""Rows and paragraphs of the real-text data."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

from bench.common.places import ABSENT

Document = dict[str, Any]


def read_rows(path: Path, count: int | None = None) -> list[Document]:
    """The first `count` rows of a JSON-lines file, or all.

    Raises:
        FileNotFoundError: there is no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is absent: {ABSENT}")
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in islice(lines, count)]


def read_paragraphs(data: Path) -> list[Document]:
    """The paragraphs of the encyclopedia articles, headings left out."""
    lines = (line for row in read_rows(data / "wikitext2_articles.jsonl") for line in row["text"].split("\n"))
    return [{"text": line.strip()} for line in lines if len(line) > 200]
