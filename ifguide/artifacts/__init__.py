"""Artifacts: folders of a run directory that are whole or are not there, and are verified when they are read.

`files` publishes and removes, `manifest` says what a finished artifact holds, `artifact` makes and resumes one,
`reading` verifies what is read, `lock` keeps a run directory to one driver.
"""

from ifguide.artifacts.artifact import Artifact, environment, open_artifact
from ifguide.artifacts.files import (
    FileEntry,
    data_files,
    file_digest,
    file_entry,
    fsync,
    fsync_tree,
    json_digest,
    move_folder,
    publish,
    publish_folder,
    record,
    recording,
    remove_tree,
    write_json,
    write_text,
)
from ifguide.artifacts.lock import HeldError, has_ended, hold, read_holder
from ifguide.artifacts.manifest import (
    MANIFEST,
    PLAN,
    Manifest,
    MismatchError,
    read_manifest,
    read_sealed,
    require,
    require_same,
    unsealed,
    write_manifest,
    write_sealed,
)
from ifguide.artifacts.reading import damaged_files, verified, verified_files, verify_digest

__all__ = [
    "MANIFEST",
    "PLAN",
    "Artifact",
    "FileEntry",
    "HeldError",
    "Manifest",
    "MismatchError",
    "damaged_files",
    "data_files",
    "environment",
    "file_digest",
    "file_entry",
    "fsync",
    "fsync_tree",
    "has_ended",
    "hold",
    "json_digest",
    "move_folder",
    "open_artifact",
    "publish",
    "publish_folder",
    "read_holder",
    "read_manifest",
    "read_sealed",
    "record",
    "recording",
    "remove_tree",
    "require",
    "require_same",
    "unsealed",
    "verified",
    "verified_files",
    "verify_digest",
    "write_json",
    "write_manifest",
    "write_sealed",
    "write_text",
]
