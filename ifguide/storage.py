"""Where files lie: a local path, or `s3://bucket/key` and whatever else fsspec has a file system for.

A local location is a plain `Path`, and nothing here costs it anything. Any other is a `UPath` (universal-pathlib),
which has the methods of `Path` that this package uses. What needs a file on a disk (safetensors, transformers,
kronfluence) gets a copy: `local_copy` of what is read by many, kept in a cache; `Mirror` of a folder in work.

Cost: a remote file is written by one upload, read by ranges or whole. It has no append and no rename of its own:
whoever writes makes a local file and uploads it whole, which object stores make visible at once or not at all.
Requests that fail are tried again, ten times, by the file system's own client.
"""

from __future__ import annotations

import hashlib
import os
import stat
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, cast

S3 = ("s3", "s3a")
CACHING = (*S3, "gs", "gcs", "abfs", "abfss", "az")  # whose clients keep listings, unless told not to
STORE_ERRORS = "botocore."  # modules of what s3fs raises besides OSError: no credentials, no connection
TAGS = ("ETag", "etag")
TIMES = ("mtime", "LastModified", "created", "last_modified", "updated", "Last-Modified", "modify", "modificationTime")
AT_ONCE = 4  # files moved side by side: s3fs holds up to half a GB of each large one


def is_store_error(error: BaseException) -> bool:
    """Whether an object store's own client raised it: no OSError, and no fault of the program."""
    return type(error).__module__.startswith(STORE_ERRORS)


def is_storage_error(error: BaseException) -> bool:
    """Whether a file system raised it, local or remote."""
    return isinstance(error, OSError) or is_store_error(error)


def location(path: str | Path) -> Path:
    """The absolute local path, or the remote one, that a config or a command line names.

    Raises:
        ValueError: the path is of a file system whose package is not installed, or names a host that workers, who are
            given paths as text, would not be told.
    """
    text = str(path)
    if "://" not in text:
        return Path(path).expanduser().absolute()
    if not isinstance(path, str | Path):
        return path  # remote already
    protocol = text.partition("://")[0]
    # Listings are never cached: other processes write beside this one.
    options: dict[str, Any] = {"use_listings_cache": False} if protocol in CACHING else {}
    if protocol in S3:
        options["config_kwargs"] = {"retries": {"max_attempts": 10, "mode": "standard"}}
    try:
        from upath import UPath

        place = UPath(text, **options)
        place.fs  # noqa: B018  # opens the file system, so that a missing package is said here
    except (ImportError, ValueError) as error:
        raise ValueError(f"{text}: {error}; install ifguide[s3], or the fsspec package of {protocol}://") from error
    if UPath(str(place), **options).storage_options != place.storage_options:
        raise ValueError(
            f"{text}: workers would not be told the host; name it in the settings of the file system (HDFS:"
            f" fs.defaultFS, and {protocol}:///path; Azure: AZURE_STORAGE_ACCOUNT_NAME, and abfs://container/path)"
        )
    return cast(Path, place)


def is_remote(path: Path) -> bool:
    """Whether a location is not on a local file system."""
    return not isinstance(path, Path)


def readable(path: Path) -> Any:
    """What pyarrow reads a file through: its path, or a remote file opened for reading by ranges."""
    return path.open("rb") if is_remote(path) else path


def matching(pattern: Path) -> list[Path]:
    """The remote files and folders that a pattern with wildcards matches, sorted. As of local ones, a name that begins
    with a dot is matched by what begins with one: fsspec has wildcards match it too."""
    fs, key = _fs(pattern), _key(pattern)
    names = [name for name in sorted(fs.glob(key)) if _hidden_parts(name) == _hidden_parts(key)]
    return [location(fs.unstrip_protocol(name)) for name in names]


def make_folder(folder: Path) -> None:
    """Make a local folder; an object store has none."""
    if not is_remote(folder):
        folder.mkdir(parents=True, exist_ok=True)


def read_texts(paths: Iterable[Path]) -> list[str]:
    """The contents of small files; remote ones are fetched side by side. A byte that is not UTF-8 is U+FFFD: what reads
    them finds the damage, and can name the file."""
    paths = list(paths)
    if not paths or not is_remote(paths[0]):
        return [path.read_text(encoding="utf-8", errors="replace") for path in paths]
    fs, names = _fs(paths[0]), [_key(path) for path in paths]
    contents = fs.cat(names)
    if isinstance(contents, bytes):
        return [contents.decode("utf-8", errors="replace")]
    by_path = {fs._strip_protocol(name): content for name, content in contents.items()}
    return [by_path[fs._strip_protocol(name)].decode("utf-8", errors="replace") for name in names]


def create(path: Path, text: str) -> bool:
    """Write a small file unless there is one already; returns whether it did. Of several at once one writes, if the
    store has conditional writes, as local file systems and S3 do."""
    data = text.encode()
    if not is_remote(path):
        try:
            with path.open("xb") as file:
                file.write(data)
        except FileExistsError:
            return False
        return True
    try:
        _fs(path).pipe_file(_key(path), data, mode="create")
    except OSError:  # each store has its own error of a condition that does not hold
        if path.exists():
            return False
        raise
    return True


def sizes(folder: Path, names: Iterable[str]) -> dict[str, int]:
    """Bytes of the files `names` within a folder; those that are missing are left out. One listing if it is remote."""
    if not is_remote(folder):
        paths = {name: folder / name for name in names}
        return {name: path.stat().st_size for name, path in paths.items() if path.exists()}
    all_sizes = file_sizes(folder)
    return {name: all_sizes[name] for name in names if name in all_sizes}


def stamp(path: Path) -> str | None:
    """What changes when a file is written to: of a local one size, times and inode, of a remote one the store's tag, or
    size and times. None where the store tells neither: whether such a file has changed its contents alone say.

    Raises:
        FileNotFoundError: there is no such file.
    """
    if is_remote(path):
        return _stamp(_fs(path).info(_key(path)))
    status = path.stat()
    return f"{status.st_size}-{status.st_mtime_ns}-{status.st_ctime_ns}-{status.st_ino}"


def file_sizes(folder: Path) -> dict[str, int]:
    """Bytes of every file under a folder, by its name relative to it."""
    if not is_remote(folder):
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
    return {name: entry["size"] for name, entry in sorted(_listing(folder).items())}


def entries(folder: Path) -> list[Path]:
    """The files and folders within a folder, sorted. The empty object `folder/`, which consoles of object stores leave,
    is none of them."""
    if not is_remote(folder):
        return sorted(folder.iterdir())
    own = _key(folder).rstrip("/")
    names = {name.rstrip("/") for name in _fs(folder).ls(own, detail=False)}
    return [folder / name.rpartition("/")[2] for name in sorted(names - {own})]


def subfolders(folder: Path) -> list[Path]:
    """The folders within a folder, sorted; those of an object store hold at least one file. None, if it is missing."""
    if not is_remote(folder):
        return sorted(path for path in folder.iterdir() if path.is_dir()) if folder.exists() else []
    return [folder / name for name in sorted({name.partition("/")[0] for name in _listing(folder) if "/" in name})]


def upload(source: Path, path: Path) -> None:
    """Write a local file to a remote path: whole, or not at all."""
    _fs(path).put_file(str(source), _key(path))


def upload_folder(source: Path, folder: Path, names: Iterable[str] | None = None) -> None:
    """Write the files `names` of a local folder (default: all) into a remote one, a few at once."""
    names = list(file_sizes(source) if names is None else names)
    if names:
        keys = [_key(folder / name) for name in names]
        _fs(folder).put([str(source / name) for name in names], keys, **_at_once(folder))


def download_folder(folder: Path, target: Path) -> None:
    """Write every file of a remote folder into a local one, a few at once.

    Raises:
        OSError: a file came with another size than its listing says.
    """
    _download(folder, _listing(folder), target)


def remove_folder(folder: Path) -> None:
    """Remove a remote folder with all in it; a missing one is fine."""
    if _listing(folder):
        _fs(folder).rm(_key(folder), recursive=True)


def machine_folder() -> Path:
    """This machine's folder for copies: `ifguide-cache-<uid>` in `IFGUIDE_CACHE`, by default in the temporary folder.

    It is the program's own, so that all in it may be removed. What else lies in `IFGUIDE_CACHE` is somebody else's.

    Raises:
        PermissionError: others can write to the default one, whose name they could guess and make it first.
    """
    chosen = os.environ.get("IFGUIDE_CACHE")
    folder = Path(chosen or tempfile.gettempdir()) / f"ifguide-cache-{os.getuid()}"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.lstat()
    own = stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o022
    if not chosen and not own:
        raise PermissionError(
            f"{folder} is not a folder of yours that only you can write; remove it or set IFGUIDE_CACHE"
        )
    return folder


def work_folder(kind: str, folder: Path) -> Path:
    """Where this machine works for a remote folder: a name of its own in `machine_folder`, the same every time."""
    return machine_folder() / f"{kind}-{_digest(str(folder))}"


def local_copy(path: str | Path) -> Path:
    """A local path as it is; of a remote file or folder a copy in `machine_folder`.

    A file that changes has another name there. Copies are never removed. What has no stamp is copied each time, and
    known by its contents.

    Raises:
        FileNotFoundError: there is nothing. OSError: a file came with another size than its listing says.
    """
    source = location(path)
    if not is_remote(source):
        return source
    cache = machine_folder()
    listing = _listing(source)
    if not listing:
        raise FileNotFoundError(f"{source} does not exist")
    stamps = {name: _stamp(entry) for name, entry in listing.items()}
    target = None if None in stamps.values() else _copy_folder(source, stamps)
    if target is None or not target.exists():
        with tempfile.TemporaryDirectory(dir=cache, prefix=".part-") as part:
            _download(source, listing, Path(part) / source.name)
            target = target or _copy_folder(source, _contents(Path(part) / source.name, listing))
            try:
                os.rename(part, target.parent)
            except OSError:
                if not target.exists():  # nobody has put it there, before or meanwhile
                    raise
            Path(part).mkdir(exist_ok=True)  # for the context to remove
    return target


def _copy_folder(source: Path, marks: Mapping[str, str | None]) -> Path:
    """Where the copy lies of a remote file or folder whose files have these marks, by name."""
    said = "-".join(sorted(f"{name}:{mark}" for name, mark in marks.items()))
    return machine_folder() / _digest(f"{source} {said}") / source.name


def _contents(copy: Path, names: Iterable[str]) -> dict[str, str]:
    """SHA-256 (hex) of the files `names` of a local folder, or of the file `copy` itself by the name ""."""
    digests = {}
    for name in names:
        with (copy / name if name else copy).open("rb") as file:
            digests[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests


class Mirror:
    """A local folder that follows a remote one whose files never change: `pull` what is new, work, `push` what is
    new. Of a local folder it is the folder itself, and both do nothing."""

    def __init__(self, folder: Path):
        self.folder, self.remote = folder, is_remote(folder)
        self._temporary = tempfile.TemporaryDirectory(prefix="ifguide-") if self.remote else None
        self.local = Path(self._temporary.name) if self._temporary else folder
        self._known: set[str] = set()

    def pull(self, wanted: Callable[[str], bool] = lambda name: True) -> None:
        """Download the files of `wanted` names that are not here yet."""
        if self.remote:
            files = _listing(self.folder).items()
            listing = {name: entry for name, entry in files if name not in self._known and wanted(name)}
            _download(self.folder, listing, self.local)
            self._known |= listing.keys()

    def push(self) -> None:
        """Upload the files that are not there yet."""
        if self.remote:
            names = file_sizes(self.local).keys()
            upload_folder(self.local, self.folder, sorted(names - self._known))
            self._known |= names


def _download(source: Path, listing: dict[str, Any], target: Path) -> None:
    """`listing` as of `_listing`: a folder's files, or the file `source` itself by the name ""."""
    copies = {name: target / name if name else target for name in listing}
    keys = [_key(source / name if name else source) for name in copies]
    if keys:
        _fs(source).get(keys, [str(copy) for copy in copies.values()], **_at_once(source))
    for name, copy in copies.items():
        size, expected = copy.stat().st_size, listing[name]["size"]
        if expected not in (size, None):  # None: the server does not say
            raise OSError(f"{source / name}: {size:,} of {expected:,} bytes were read")


def _at_once(path: Path) -> dict[str, int]:
    return {"batch_size": AT_ONCE} if _fs(path).async_impl else {}


def _listing(path: Path) -> dict[str, dict[str, Any]]:
    """Every file at or under a remote path: relative name ("" is the path itself) -> fsspec's description. Left out are
    the empty objects that stand for folders."""
    fs, root = _fs(path), _key(path).rstrip("/")
    objects = fs.find(root, detail=True)
    if not isinstance(objects, dict):  # adlfs, of a single file
        objects = {name: fs.info(name) for name in objects}
    return {name[len(root) :].lstrip("/"): entry for name, entry in objects.items() if not name.endswith("/")}


def _stamp(entry: dict[str, Any]) -> str | None:
    """`stamp` of fsspec's description of a file, whose names for tag and times are each store's own."""
    tag = next((entry[name] for name in TAGS if entry.get(name)), None)
    times = [entry.get(name) for name in TIMES]
    if tag is None and not any(times):
        return None
    return str(tag or (entry.get("size"), *times))


def _hidden_parts(name: str) -> int:
    """How many parts of a name begin with a dot. Of a pattern each matches one such part of a file's name."""
    return sum(part.startswith(".") for part in name.split("/"))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def _fs(path: Path) -> Any:
    return path.fs  # type: ignore[attr-defined]


def _key(path: Path) -> str:
    return str(path.path)  # type: ignore[attr-defined]
