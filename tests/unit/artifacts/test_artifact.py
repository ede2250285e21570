"""ifguide.artifacts: a folder is whole or not there, whatever moment its maker dies at."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ifguide.artifacts import (
    MANIFEST,
    PLAN,
    Artifact,
    Manifest,
    MismatchError,
    data_files,
    discard_if_mended,
    file_digest,
    file_entry,
    open_artifact,
    publish,
    read_manifest,
    recording,
    require,
    require_same,
    verified,
)
from ifguide.artifacts import artifact as artifact_module

SHARD = "shard-00000.parquet"
MAKER = """
import os, sys
from pathlib import Path
from ifguide.artifacts import open_artifact, publish

folder, target, when = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
replace = os.replace

def dying_replace(source, destination):
    if Path(destination).name == target and when == "before":
        os._exit(9)
    replace(source, destination)
    if Path(destination).name == target:
        os._exit(9)

os.replace = dying_replace
artifact = open_artifact(folder, verb="v", options={"a": {"x": 1}}, inputs={"in": "f"}, config_yaml="seed: 0\\n")
if artifact.manifest is None:
    with publish(folder / "shard-00000.parquet") as part:
        part.write_text("content")
    artifact.finish([folder / "shard-00000.parquet"], rows={"n": 1}, summary={})
"""


def opened(folder: Path, *, x: int = 1, source: str = "f", config_yaml: str = "seed: 0\n") -> Artifact:
    options = {"a": {"x": x, "y": [1, 2]}, "seed": 0}
    return open_artifact(folder, verb="v", options=options, inputs={"in": source}, config_yaml=config_yaml)


def write_shard(folder: Path, content: str, name: str = SHARD) -> Path:
    with publish(folder / name) as part:
        part.write_text(content)
    return folder / name


def made(folder: Path, content: str = "content", **changes) -> Manifest:
    artifact = opened(folder, **changes)
    return artifact.finish([write_shard(folder, content)], rows={"n": 1}, summary={"s": 2})


def test_finished_artifact_is_found_complete_with_all_it_was_made_from(tmp_path):
    manifest = made(tmp_path / "a")
    again = opened(tmp_path / "a")
    assert again.manifest == manifest == read_manifest(tmp_path / "a") == require(tmp_path / "a", "v")
    assert manifest.options == {"a": {"x": 1, "y": [1, 2]}, "seed": 0}
    assert (manifest.inputs, manifest.rows, manifest.summary) == ({"in": "f"}, {"n": 1}, {"s": 2})
    assert manifest.files == {SHARD: {"sha256": file_digest(tmp_path / "a" / SHARD), "bytes": 7}}
    assert (tmp_path / "a" / "config.yaml").read_text() == "seed: 0\n"
    assert "torch" in manifest.environment
    assert not (tmp_path / "a" / PLAN).exists()


def test_unfinished_work_of_the_same_plan_resumes_with_its_shards(tmp_path):
    opened(tmp_path)
    write_shard(tmp_path, "content")
    resumed = opened(tmp_path)
    assert resumed.manifest is None
    assert [path.name for path in data_files(tmp_path)] == [SHARD]


@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize(
    ("change", "message"), [({"x": 2}, "a.x was 1, now 2"), ({"source": "g"}, 'in was "f", now "g"')]
)
def test_other_plan_is_refused_naming_what_differs(tmp_path, finished, change, message):
    made(tmp_path) if finished else opened(tmp_path)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(MismatchError, match=re.escape(message)) as caught:
        opened(tmp_path, **change)
    assert str(tmp_path) in str(caught.value)
    assert "seed" not in str(caught.value)
    assert sorted(tmp_path.iterdir()) == before


def test_a_plan_that_holds_a_secret_is_that_of_the_config_which_gave_it(tmp_path):
    """Made before such a parameter was taken for a secret."""
    url = "https://host/a?hf_token="
    opened(tmp_path, source=f"{url}abc")
    (tmp_path / PLAN).write_text((tmp_path / PLAN).read_text().replace("***", "abc"))
    assert opened(tmp_path, source=f"{url}abc").manifest is None
    with pytest.raises(MismatchError) as caught:
        opened(tmp_path, source="https://host/b?hf_token=abc")
    assert "abc" not in str(caught.value)


def test_another_resolved_config_of_the_same_plan_is_no_other_plan(tmp_path):
    manifest = made(tmp_path)
    assert opened(tmp_path, config_yaml="cluster: {num_cpus: 3}\n").manifest == manifest


def test_folder_of_foreign_files_is_refused_and_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(MismatchError, match="ifguide did not make them"):
        opened(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_fingerprint_depends_on_contents_only(tmp_path):
    first = made(tmp_path / "a")
    same = made(tmp_path / "b", x=5, source="other", config_yaml="seed: 1\n")
    other = made(tmp_path / "c", content="contenT")
    assert first.fingerprint == same.fingerprint
    assert first.fingerprint != other.fingerprint


def test_fingerprint_does_not_depend_on_the_order_of_the_files(tmp_path):
    prints = []
    for name, reverse in (("a", False), ("b", True)):
        artifact = opened(tmp_path / name)
        files = [write_shard(tmp_path / name, text, f"shard-{text}.parquet") for text in "xyz"]
        prints.append(artifact.finish(files[::-1] if reverse else files, rows={}, summary={}).fingerprint)
    assert prints[0] == prints[1]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("target", [PLAN, SHARD, "config.yaml", MANIFEST])
def test_kill_at_any_rename_leaves_no_trusted_part_and_a_rerun_completes(tmp_path, target, when):
    folder = tmp_path / "artifact"
    killed = subprocess.run([sys.executable, "-c", MAKER, str(folder), target, when])
    assert killed.returncode == 9
    if (target, when) == (MANIFEST, "after"):
        assert require(folder, "v").rows == {"n": 1}
    else:
        with pytest.raises(FileNotFoundError, match="run `ifguide v` first"):
            require(folder, "v")
    shard_published = target in ("config.yaml", MANIFEST) or (target, when) == (SHARD, "after")
    assert [path.name for path in data_files(folder)] == [SHARD] * shard_published
    assert all(path.read_text() == "content" for path in data_files(folder))
    subprocess.run([sys.executable, "-c", MAKER, str(folder), "never", when], check=True)
    assert require(folder, "v").fingerprint == made(tmp_path / "whole").fingerprint


def test_manifest_is_written_last_and_scratch_goes_after_it(tmp_path, monkeypatch):
    artifact = opened(tmp_path)
    shard = write_shard(tmp_path, "content")
    write_shard(tmp_path / "scratch" / "deep", "x")
    names, replace = [], os.replace

    def recording_replace(source: Path, destination: Path) -> None:
        names.append((Path(destination).name, (tmp_path / "scratch").exists()))
        replace(source, destination)

    monkeypatch.setattr(os, "replace", recording_replace)
    artifact.finish([shard], rows={}, summary={}, remove=["scratch", "never-made"])
    assert names == [("config.yaml", True), (PLAN, True), (MANIFEST, True)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", MANIFEST, SHARD]


def test_a_finish_killed_before_its_scratch_is_gone_leaves_a_complete_artifact(tmp_path, monkeypatch):
    artifact = opened(tmp_path)
    shard = write_shard(tmp_path, "content")
    write_shard(tmp_path / "scratch", "x")
    write_shard(tmp_path / "other", "y")

    def killed(folder: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(artifact_module, "remove_tree", killed)
        with pytest.raises(KeyboardInterrupt):
            artifact.finish([shard], rows={"n": 1}, summary={}, remove=["scratch"])
    assert require(tmp_path, "v").rows == {"n": 1}
    assert (tmp_path / "scratch").exists()
    assert opened(tmp_path).manifest is not None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", MANIFEST, "other", SHARD]


def test_a_file_that_is_gone_is_no_artifact(tmp_path):
    artifact = opened(tmp_path)
    shard = write_shard(tmp_path, "content")
    with pytest.raises(FileNotFoundError, match="gone"):
        artifact.finish([shard, tmp_path / "gone"], rows={}, summary={})
    assert not (tmp_path / MANIFEST).exists()


@pytest.mark.parametrize(("damage", "size"), [(lambda path: os.truncate(path, 3), "3"), (os.unlink, "None")])
def test_require_notices_a_truncated_or_missing_file(tmp_path, damage, size):
    made(tmp_path)
    damage(tmp_path / SHARD)
    with pytest.raises(ValueError, match=rf"{SHARD} has {size} bytes where its manifest says 7.*ifguide v"):
        require(tmp_path, "v")


def test_missing_and_unfinished_artifacts_are_told_apart(tmp_path):
    opened(tmp_path / "begun")
    for name, state in (("absent", "does not exist"), ("begun", "is unfinished")):
        with pytest.raises(FileNotFoundError, match=rf"{name} {state}; run `ifguide v` first"):
            require(tmp_path / name, "v")
        with pytest.raises(FileNotFoundError, match=f"{name} {state}"):
            read_manifest(tmp_path / name)


def test_manifest_that_is_no_json_or_of_another_version_is_named(tmp_path):
    made(tmp_path)
    path = tmp_path / MANIFEST
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "new_key": 1}))
    with pytest.raises(ValueError, match=r"manifest\.json has keys .*another version made it"):
        read_manifest(tmp_path)
    for damage in (b"{", b"", b"\xff\xfe{}", b"null garbage"):
        path.write_bytes(damage)
        with pytest.raises(ValueError, match=r"manifest\.json is not valid JSON .*run the stage again"):
            read_manifest(tmp_path)
    for damage in (b"[]", b"null", b"7"):
        path.write_bytes(damage)
        with pytest.raises(ValueError, match=r"manifest\.json is a JSON \w+ where an object is expected"):
            read_manifest(tmp_path)


def test_things_that_do_not_belong_together_are_refused_with_both_fingerprints():
    require_same("the mask's corpus", "a" * 64, "the corpus", "a" * 64, "advice")
    with pytest.raises(MismatchError, match=r"the mask's corpus \(a{16}\) is not the corpus \(b{16}\): advice"):
        require_same("the mask's corpus", "a" * 64, "the corpus", "b" * 64, "advice")


def test_what_killed_attempts_left_is_gone_when_the_artifact_is_complete(tmp_path):
    artifact = opened(tmp_path / "a")
    (artifact.folder / f"{SHARD}.0123456789ab.part").write_text("half")
    write_shard(artifact.folder / "hf.part" / "deep.part", "half")  # of a folder that was being published
    artifact.finish([write_shard(artifact.folder, "content")], rows={}, summary={})
    assert not list(artifact.folder.glob("*.part"))
    assert opened(tmp_path / "a").manifest is not None


def test_a_killed_finish_leaves_no_folder_that_breaks_the_next_run(tmp_path, monkeypatch):
    artifact = opened(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(artifact_module, "_remove_scratch", lambda folder: None)
        artifact.finish([write_shard(tmp_path, "content")], rows={}, summary={})
    write_shard(tmp_path / "hf.part", "half")
    assert opened(tmp_path).manifest is not None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", MANIFEST, SHARD]


def test_digests_that_were_taken_when_files_were_written_stand_in_the_manifest(tmp_path):
    artifact = opened(tmp_path)
    with recording() as recorded:
        shard = write_shard(tmp_path, "content")
    digests = {path.relative_to(tmp_path).as_posix(): entry for path, entry in recorded.items()}
    other = write_shard(tmp_path, "other", "shard-00001.parquet")
    shard.write_text("contend")  # damaged before the manifest is written
    manifest = artifact.finish([shard, other], rows={}, summary={}, digests=digests)
    assert manifest.files[other.name] == file_entry(other)
    with pytest.raises(ValueError, match=rf"{SHARD} has changed since it was made"):
        verified(tmp_path, SHARD)


def test_seconds_are_those_of_a_clock_that_nobody_sets(tmp_path, monkeypatch):
    artifact = opened(tmp_path)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now - 7200)
    assert 0 <= artifact.finish([], rows={}, summary={}).seconds < 60


def test_a_manifest_in_which_a_figure_has_changed_is_refused(tmp_path):
    made(tmp_path)
    path = tmp_path / MANIFEST
    path.write_text(path.read_text().replace('"n": 1', '"n": 3'))
    for read in (lambda: read_manifest(tmp_path), lambda: require(tmp_path, "v"), lambda: opened(tmp_path)):
        with pytest.raises(ValueError, match=r"manifest\.json has changed since it was written"):
            read()


def test_unfinished_work_on_files_that_were_mended_since_is_discarded(tmp_path: Path) -> None:
    folder, begun = tmp_path / "corpus", {"a": {"sha256": "1"}, "b": {"sha256": "2"}}
    mended = {**begun, "b": {"sha256": "3"}}
    assert not discard_if_mended(folder, begun)  # nothing is there
    options = {"verb": "v", "inputs": {}, "config_yaml": ""}
    artifact = open_artifact(folder, options={"files": begun}, **options)
    assert not discard_if_mended(folder, begun)
    assert not discard_if_mended(folder, {"a": {"sha256": "1"}})  # other files: for `open_artifact` to refuse
    assert (folder / PLAN).exists()
    assert discard_if_mended(folder, mended)
    assert not folder.exists()
    artifact = open_artifact(folder, options={"files": mended}, **options)
    artifact.finish([], rows={}, summary={})
    assert not discard_if_mended(folder, begun)
    with pytest.raises(MismatchError, match=r"files\.b\.sha256 was"):
        open_artifact(folder, options={"files": begun}, **options)
