"""Originals: downloaded from their origin, or read from a folder; either way their SHA-256 is that of the table.

They are small (4 MB at most, an archive some) and held in memory until all of an output's have been converted.
"""

from __future__ import annotations

import hashlib
import http.client
import io
import tarfile
import time
import urllib.error
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from ifguide.datasets.table import Contents, Origin
from ifguide.telemetry import log

TIMEOUT = 30.0  # seconds without a byte
WAITS = (1.0, 5.0, 20.0)  # seconds before each further attempt
LARGEST = 64 << 20  # bytes of any download
CHUNK = 1 << 20
BUSY = 429  # HTTP: too many requests


class DigestError(ValueError):
    """Bytes that are not those of the table; the message names the file, what was expected and what was found."""


class Originals(ABC):
    """Where originals are taken from. An origin that several outputs share is read once."""

    def __init__(self) -> None:
        self._read: dict[tuple[str, str], bytes] = {}
        self._archives: dict[str, Mapping[str, bytes]] = {}

    def get(self, origin: Origin, paths: Sequence[str]) -> Mapping[str, bytes]:
        """The contents of an origin's files, in the order of `paths`; of an archive, all members, sorted by path.

        Raises:
            DigestError: a file is not the one of the table.
            OSError: a file is not there, or cannot be had.
        """
        if origin.members:
            if origin.name not in self._archives:
                members = dict(sorted(self.members(origin)))
                verify(self.place(origin, ""), origin.sha256, members_digest(members))
                self._archives[origin.name] = members
            return self._archives[origin.name]
        for path in paths:
            if (origin.name, path) not in self._read:
                content = self.file(origin, path, origin.files[path])
                verify(self.place(origin, path), origin.files[path].sha256, hashlib.sha256(content).hexdigest())
                self._read[origin.name, path] = content
        return {path: self._read[origin.name, path] for path in paths}

    @abstractmethod
    def place(self, origin: Origin, path: str) -> str:
        """What errors call an original; of an archive, without a path."""

    @abstractmethod
    def file(self, origin: Origin, path: str, expected: Contents) -> bytes:
        """The bytes of one file."""

    @abstractmethod
    def members(self, origin: Origin) -> Iterator[tuple[str, bytes]]:
        """The paths and bytes of an archive's members."""


class Downloads(Originals):
    """Originals from the addresses of the table."""

    def place(self, origin: Origin, path: str) -> str:
        return origin.address(path)

    def file(self, origin: Origin, path: str, expected: Contents) -> bytes:
        return download(origin.address(path), size=expected.bytes)

    def members(self, origin: Origin) -> Iterator[tuple[str, bytes]]:
        """GitHub's archives hold one folder, named after repository and revision, which is no part of a path."""
        packed = download(origin.url)
        try:
            with tarfile.open(fileobj=io.BytesIO(packed), mode="r:gz") as archive:
                for entry in archive:
                    path = entry.name.partition("/")[2]
                    file = archive.extractfile(entry) if entry.isfile() and origin.holds(path) else None
                    if file is not None:
                        yield path, file.read()
        except (tarfile.TarError, EOFError, OSError) as error:
            raise OSError(f"{origin.url}: not a whole .tar.gz ({error}); run the command again") from error


class Folder(Originals):
    """Originals that lie in `<root>/<origin>/<path>`: `<root>/<origin>` may be a clone, or an archive unpacked."""

    def __init__(self, root: Path) -> None:
        super().__init__()
        self.root = root

    def place(self, origin: Origin, path: str) -> str:
        return str(self.root / origin.name / path)

    def file(self, origin: Origin, path: str, expected: Contents) -> bytes:
        place = self.root / origin.name / path
        if not place.is_file():
            raise FileNotFoundError(f"{place} is not there; it is {origin.address(path)}")
        return place.read_bytes()

    def members(self, origin: Origin) -> Iterator[tuple[str, bytes]]:
        folder = self.root / origin.name
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} is not there; unpack {origin.url} so that it holds {origin.members[0]}")
        for place in folder.rglob("*"):
            path = place.relative_to(folder).as_posix()
            if origin.holds(path) and place.is_file():
                yield path, place.read_bytes()


def verify(place: str, expected: str, digest: str) -> None:
    """Refuse a digest that is not the table's."""
    if digest != expected:
        raise DigestError(different(place, expected, digest))


def different(place: str | Path, expected: str, digest: str) -> str:
    """The sentence for a file with another digest."""
    return f"{place}: its SHA-256 is {digest}, expected is {expected}: it is another file, or was changed"


def members_digest(members: Mapping[str, bytes]) -> str:
    """The SHA-256 of an archive's contents: of `sha256sum`'s lines, sorted by path."""
    lines = (f"{hashlib.sha256(members[path]).hexdigest()}  {path}\n" for path in sorted(members))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def download(url: str, *, size: int | None = None, timeout: float = TIMEOUT, waits: Sequence[float] = WAITS) -> bytes:
    """The bytes at `url`, `size` of them where that is known. Passing faults are tried again after `waits` seconds.

    Raises:
        OSError: the address cannot be reached, answers with an error, or ends early; names the address.
    """
    for wait in (*waits, None):
        try:
            return _download(url, size, timeout)
        except urllib.error.HTTPError as error:
            fault, passing = f"HTTP {error.code} {error.reason}", error.code >= 500 or error.code == BUSY
            error.close()
        except (OSError, http.client.HTTPException) as error:
            fault, passing = str(getattr(error, "reason", error)) or type(error).__name__, True
        if wait is None or not passing:
            break
        log("fetch-data", f"{url}: {fault}; again in {wait:g} s")
        time.sleep(wait)
    raise OSError(
        f"{url}: {fault}. Run the command again (finished files are kept), or get the file by other means and name its"
        " folder with --from"
    )


def _download(url: str, size: int | None, timeout: float) -> bytes:
    request = urllib.request.Request(url, headers={"User-Agent": "ifguide"})
    with urllib.request.urlopen(request, timeout=timeout) as response:
        announced = response.headers.get("Content-Length")
        content = bytearray()
        while len(content) <= LARGEST and (chunk := response.read(CHUNK)):
            content += chunk
    if len(content) > LARGEST:
        raise DigestError(f"{url}: more than {LARGEST:,} bytes: it is not the file that is expected")
    expected = size if announced is None else int(announced)
    if expected is not None and len(content) < expected:
        raise ConnectionError(f"ended after {len(content):,} of {expected:,} bytes")
    return bytes(content)
