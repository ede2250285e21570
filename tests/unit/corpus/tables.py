"""`token_tables` as one table."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from ifguide.corpus.packing import Read, token_tables


def token_table(*arguments: Any, **options: Any) -> tuple[pa.Table, list[dict[str, Any]], int]:
    """The tables end to end, the bad rows, and how many rows were read."""
    read = Read()
    table = pa.concat_tables(token_tables(*arguments, **options, read=read)).combine_chunks()
    return table, read.bad, read.rows
