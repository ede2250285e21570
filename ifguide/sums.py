"""Sums over parts of the data, which add up field by field in any order of the parts."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Self


@dataclass(frozen=True)
class Sums:
    """To be inherited by a dataclass whose fields are all sums: numbers or arrays."""

    def __add__(self, other: Self) -> Self:
        return type(self)(
            **{field.name: getattr(self, field.name) + getattr(other, field.name) for field in fields(self)}
        )
