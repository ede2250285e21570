"""The certificate of scores that a student made, from the files of its audit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from ifguide import schemas
from ifguide.student.certificate import Audit, Certificate, certify


def certify_files(paths: Sequence[Path], sources: Sequence[str]) -> Certificate:
    """The certificate of all tokens in some files of `schemas.AUDIT`. `sources`: all of the corpus.

    Raises:
        ValueError: there are fewer than two tokens.
    """
    table = pa.concat_tables([schemas.read_table(path, schemas.AUDIT) for path in paths])
    names = sorted(sources)
    columns = {name: table.column(name).to_numpy() for name in ("exact", "student", "rechecked", "block_id")}
    audit = Audit(
        exact_N=columns["exact"],
        student_N=columns["student"],
        rechecked_N=columns["rechecked"],
        blocks_N=columns["block_id"],
        sources_N=pc.index_in(table.column("source"), value_set=pa.array(names)).to_numpy(),
        sources=names,
    )
    return certify(audit)
