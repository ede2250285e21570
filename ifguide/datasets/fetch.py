"""`ifguide fetch-data`: every file of the table, each published when its SHA-256 is right; the manifest last."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from ifguide.artifacts import file_digest, publish, write_json
from ifguide.datasets import COMMAND, MANIFEST
from ifguide.datasets.convert import convert
from ifguide.datasets.originals import DigestError, Downloads, Folder, Originals, different, verify
from ifguide.datasets.table import Output
from ifguide.telemetry import log

VERB = "fetch-data"


def fetch(outputs: list[Output], folder: Path, *, source: Path | None = None) -> None:
    """Make every output in `folder`; those that are there are left alone. Safe to interrupt and to run again.

    With `source`, nothing is downloaded: originals lie in `<source>/<origin>/<path>`, and a file of the output's own
    name and digest in `<source>` is taken as it is.

    Raises:
        DigestError: an original, or a file that is there already, is not the one of the table.
        OSError: an original is not there, or cannot be had.
    """
    originals: Originals = Downloads() if source is None else Folder(source)
    missing: list[str] = []
    for number, output in enumerate(outputs, start=1):
        try:
            how = _make(folder, output, originals, source)
        except FileNotFoundError as error:  # of `source`: said of all at once
            missing.append(f"{output.name}: {error}")
            continue
        log(VERB, f"{number} of {len(outputs)}: {output.name} ({output.result.bytes / 1e6:,.2f} MB), {how}")
    if missing:
        raise FileNotFoundError(f"{len(missing)} of {len(outputs)} files were not made:\n" + "\n".join(missing))
    write_json(folder / MANIFEST, _manifest(outputs))
    log(VERB, f"{folder} is whole: {sum(output.result.bytes for output in outputs) / 1e6:,.1f} MB")


def describe(outputs: list[Output], folder: Path) -> list[str]:
    """What `fetch` would do, a line for each output, and what each origin is."""
    width = max(len(output.name) for output in outputs)
    lines = []
    for output in outputs:
        state = "there" if (folder / output.name).is_file() else "to make"
        lines.append(f"{output.name:{width}} {output.result.bytes / 1e6:6.2f} MB  {state:7}  of {output.origin.name}")
    for origin in {output.origin.name: output.origin for output in outputs}.values():
        lines += ["", f"{origin.name}: {origin.what}", f"  {origin.url}", f"  licence: {origin.licence}"]
        lines.append(f"  checked: {origin.checked}")
    return lines


def _make(folder: Path, output: Output, originals: Originals, source: Path | None) -> str:
    """Have an output in `folder`; says how."""
    place = folder / output.name
    if place.is_file():
        digest = file_digest(place)
        if digest != output.result.sha256:
            raise DigestError(
                f"{different(place, output.result.sha256, digest)}; move it away and run `{COMMAND}` again"
            )
        return "there already"
    if output.of:
        content, how = _derive(output, folder / output.of)
    else:
        content, how = _converted(output, source) or _convert(output, originals)
    with publish(place) as part:
        part.write_bytes(content)
    return how


def _converted(output: Output, source: Path | None) -> tuple[bytes, str] | None:
    """The output's file in `source`, if it is the right one."""
    if source is None or not (source / output.name).is_file():
        return None
    content = (source / output.name).read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    if digest == output.result.sha256:
        return content, f"from {source}"
    if (source / output.origin.name).is_dir():
        return None
    raise DigestError(different(source / output.name, output.result.sha256, digest))


def _convert(output: Output, originals: Originals) -> tuple[bytes, str]:
    files = originals.get(output.origin, output.files)
    content = _checked(output, files)
    size = sum(map(len, files.values())) / 1e6
    return content, f"of {output.origin.name} ({len(files):,} original file{'s' * (len(files) > 1)}, {size:,.2f} MB)"


def _derive(output: Output, file: Path) -> tuple[bytes, str]:
    if not file.is_file():
        raise FileNotFoundError(f"{output.of}, of which it is made, is not there")
    return _checked(output, {file.name: file.read_bytes()}), f"of {output.of}"


def _checked(output: Output, files: Mapping[str, bytes]) -> bytes:
    content = convert(output.converter, files)
    verify(f"{output.name}, as converted", output.result.sha256, hashlib.sha256(content).hexdigest())
    return content


def _manifest(outputs: list[Output]) -> dict[str, object]:
    return {
        "files": {
            output.name: {
                **output.result._asdict(),
                "origin": output.origin.what,
                "licence": output.origin.licence,
                "urls": sorted({output.origin.address(path) for path in output.files or ("",)}),
            }
            for output in outputs
        }
    }
