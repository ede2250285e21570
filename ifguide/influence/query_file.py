"""What the artifact `query/` holds: the direction V, and the queries behind it, one (prompt, completion) a line."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from ifguide.artifacts import publish, verified, write_text
from ifguide.storage import local_copy

DIRECTION, QUERIES = "direction.safetensors", "queries.jsonl"
HELD_OUT = "held_out.jsonl"  # queries that V is not made of, where there are any
NULLS = "nulls.safetensors"  # null directions (`ifguide.influence.nulls`), where there are any


@dataclass(frozen=True, kw_only=True)
class QueryRow:
    """A query: `row` of the prompt table, whether it is of the `positive` set, the classifier's `score` of its
    completion, and the texts. `weight` is in the mean of its set, and in the file where it is not 1."""

    row: int
    positive: bool
    score: float
    prompt: str
    completion: str
    weight: float = 1.0


def write_queries(folder: Path, rows: Iterable[QueryRow], name: str = QUERIES) -> None:
    """Publish the file `name` of `folder`."""
    records = (asdict(row) for row in rows)
    lines = ({key: value for key, value in row.items() if (key, value) != ("weight", 1.0)} for row in records)
    write_text(folder / name, "".join(f"{json.dumps(line, ensure_ascii=False)}\n" for line in lines))


def read_queries(folder: Path, name: str = QUERIES) -> list[QueryRow]:
    """The rows of the file `name` of `folder`, in order.

    Raises:
        ValueError: a line is not a query; names file and line.
    """
    path = folder / name
    rows = []
    lines = path.read_bytes().split(b"\n")[:-1]  # `splitlines` of a text would cut queries in two
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(QueryRow(**json.loads(line)))
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}: not a query ({error}); build the query again") from error
    return rows


def read_direction(folder: Path) -> dict[str, Tensor]:
    """V of the query artifact in `folder`, float32 per tracked module.

    Raises:
        FileNotFoundError: the artifact is missing or unfinished. ValueError: the file has changed since; names it.
    """
    return load_file(local_copy(verified(folder, DIRECTION)))


def write_nulls(folder: Path, nulls: Sequence[Mapping[str, Tensor]]) -> None:
    """Publish the null directions beside V, each float32 per tracked module."""
    tensors = {f"{number}.{name}": tensor for number, null in enumerate(nulls) for name, tensor in null.items()}
    with publish(folder / NULLS) as path:
        save_file({name: tensor.float().cpu().contiguous() for name, tensor in sorted(tensors.items())}, path)


def read_nulls(folder: Path) -> list[dict[str, Tensor]]:
    """The null directions of the query artifact in `folder`, in order; none where it was built without.

    Raises:
        FileNotFoundError: the artifact is missing or unfinished. ValueError: the file has changed since; names it.
    """
    if not (folder / NULLS).exists():
        return []
    nulls: dict[int, dict[str, Tensor]] = {}
    for name, tensor in load_file(local_copy(verified(folder, NULLS))).items():
        number, module = name.split(".", 1)
        nulls.setdefault(int(number), {})[module] = tensor
    return [nulls[number] for number in range(len(nulls))]
