"""The real text of `configs/real_text.yaml` and the benchmarks: from its public origins, or from a folder.

`sources.yaml` is the table of origins, digests and licences. `table` reads it, `originals` gets the originals,
`convert` turns them into the files that are read, and `fetch` does it all for `ifguide fetch-data`.
"""

from __future__ import annotations

from pathlib import Path

FOLDER = Path("data/real_text")  # in the working directory, as the paths of configs/ are
COMMAND = "ifguide fetch-data"
MANIFEST = "manifest.json"


def advice(message: str) -> str:
    """What to add to an error that names a file of the folder while the folder is not whole; else nothing."""
    if FOLDER.as_posix() not in message or (FOLDER / MANIFEST).is_file():
        return ""
    return f"; `{COMMAND}` makes {FOLDER}"
