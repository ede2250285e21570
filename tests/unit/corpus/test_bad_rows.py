"""ifguide.corpus.bad_rows: every bad row is listed, in CSV that any reader takes."""

import csv
from pathlib import Path

from ifguide.corpus.bad_rows import BadRow, list_bad_rows, read_bad_rows, write_bad_rows


def test_all_bad_rows_of_all_chunks_are_listed_and_quoted(tmp_path: Path) -> None:
    reason = 'column "text" is missing, or\nis no text'
    for key in ("chunk-0", "chunk-1"):
        rows = [{"source": "with, comma.jsonl", "row": row, "reason": reason} for row in range(1500)]
        write_bad_rows(tmp_path, key, rows)
    list_bad_rows(read_bad_rows(tmp_path, {"chunk-0": 0, "chunk-1": 4000}), tmp_path / "bad_rows.csv")
    with (tmp_path / "bad_rows.csv").open(encoding="utf-8", newline="") as file:
        head, *rows = csv.reader(file)
    assert tuple(head) == BadRow._fields
    assert [int(row) for _, row, _ in rows] == [*range(1500), *range(4000, 5500)]
    assert {(source, why) for source, _, why in rows} == {("with, comma.jsonl", reason)}
