"""Put a published data set on this machine: download or take local files, check every sum, unpack."""

import gzip
import hashlib
import http.client
import os
import tarfile
import tempfile
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Protocol, runtime_checkable

from bitquorum.data.sources import (
    SOURCES,
    Download,
    PublishedFile,
    Source,
    at_home,
    data_root,
    file_md5,
    find_files,
    unknown_name,
)
from bitquorum.interface import ConfigError, DataError, MissingDataError


@runtime_checkable
class _Readable(Protocol):
    def read(self, size: int, /) -> bytes: ...


Progress = Callable[[str, int, int | None], None]

_BLOCK = 1 << 18
_TIMEOUT = 60.0  # seconds without a byte


def get(name: str, *, source: Path | None = None, root: Path | None = None, progress: Progress | None = None) -> Path:
    """Put a published data set into `ROOT/NAME` and return that folder.

    Every file is checked against its published size and MD5 sum (unpacked files of CIFAR-100 by size alone: the sum of
    their archive is published, not theirs), and appears under its name only when it is
    complete. A call that finds all files in order changes nothing; a damaged file is fetched again. An
    interrupted download leaves a `.part` file, with which the next call goes on.

    Args:
        name: A published data set: "mnist", "fashion-mnist", "cifar10" or "cifar100".
        source: The published archive, or a folder with the published files somewhere below it, packed or not;
            with it nothing is downloaded.
        root: Folder of all data sets; by default `$BITQUORUM_DATA`, else `~/.cache/bitquorum/data`.
        progress: Called as `progress(file name, bytes so far, all bytes or None)` during a download.

    Raises:
        ConfigError: if the name is unknown or needs no download.
        MissingDataError: if `source` does not hold the files.
        DataError: if the network fails, a sum is wrong, or the folder cannot be written.

    Examples:
        >>> get("imagenet")
        Traceback (most recent call last):
        ...
        bitquorum.interface.ConfigError: expected the name of a data set, got 'imagenet'; ...
    """
    if name == "digits" or name.partition(":")[0] in ("folder", "parquet"):
        raise ConfigError(f"expected a published data set to fetch, got {name!r}, which is local; load it directly")
    if name not in SOURCES:
        raise unknown_name(name)
    return install(SOURCES[name], origin=source, root=root, progress=progress)


def install(
    source: Source, *, origin: Path | None = None, root: Path | None = None, progress: Progress | None = None
) -> Path:
    """Put the files of `source` into `ROOT/NAME`, as `get` does for a name.

    Args:
        source: The data set: its files, addresses and sums.
        origin: A local archive or folder in place of the download.
        root: Folder of all data sets.
        progress: Called during a download.

    Raises:
        MissingDataError: if `origin` does not hold the files.
        DataError: if the network fails, a sum is wrong, or the folder cannot be written.
    """
    folder = data_root(root) / source.name
    try:
        if origin is not None:
            origin = at_home(origin)
            if not origin.exists():
                raise MissingDataError(
                    f"{source.name}: expected an archive or a folder, got {origin}, which is not there"
                )
        wanted = [item for item in source.downloads if not all(_is_valid(folder / f.name, f) for f in item.holds)]
        if not wanted:
            return folder
        folder.mkdir(parents=True, exist_ok=True)
        for item in wanted:
            with _staging(folder) as stage:
                if origin is None:
                    packed = _download(source.name, item, folder, progress)
                    _unpack(packed, item, stage)
                    packed.unlink()
                elif origin.is_dir():
                    _take_files(source, item, origin, stage)
                else:
                    _take_archive(source, item, origin, stage)
    except OSError as error:
        raise DataError(
            f"{source.name}: expected to read the origin and to write {folder}, got {error}; "
            "choose another folder by $BITQUORUM_DATA or `--data`"
        ) from error
    finally:
        with suppress(OSError):  # only an empty folder goes, what a failure would leave
            folder.rmdir()
    return folder


@contextmanager
def _staging(folder: Path) -> Iterator[Path]:
    """Give a temporary folder; when the block succeeds, move each of its files into `folder` atomically."""
    with tempfile.TemporaryDirectory(dir=folder, prefix=".unpack-") as name:
        stage = Path(name)
        yield stage
        for path in sorted(stage.iterdir()):
            os.replace(path, folder / path.name)


def _is_valid(path: Path, file: PublishedFile) -> bool:
    if not path.is_file() or path.stat().st_size != file.size:
        return False
    return file.md5 is None or file_md5(path) == file.md5


def _download(name: str, item: Download, folder: Path, progress: Progress | None) -> Path:
    """Return the complete and checked `.part` file, going on as long as each attempt brings bytes."""
    part = folder / f"{item.name}.part"
    have = _size(part)
    while have < item.size:
        reason = _transfer(item, part, have, progress)
        before, have = have, _size(part)
        if have <= before:
            raise DataError(
                f"{name}: expected {item.size} bytes from {item.url}, got {have} ({reason}); run the command "
                f"again to go on, or fetch the file elsewhere and run `bitquorum data get {name} --from PATH`"
            )
    _check_packed(part, item, remove=True)
    return part


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _transfer(item: Download, part: Path, start: int, progress: Progress | None) -> str:
    """Append what the server sends to `part`; return why it ended early, or an empty string."""
    request = urllib.request.Request(item.url, headers={"User-Agent": "bitquorum", "Accept-Encoding": "identity"})
    if start:
        request.add_header("Range", f"bytes={start}-")
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT) as response:
            resumed = response.headers.get("Content-Range", "").startswith(f"bytes {start}-")
            done = start if response.status == http.HTTPStatus.PARTIAL_CONTENT and resumed else 0
            with part.open("ab" if done else "wb") as target:
                while done <= item.size and (block := _read(response)):
                    target.write(block)
                    done += len(block)
                    if progress is not None:
                        progress(item.name, done, item.size)
        return "" if done >= item.size else "the connection ended"
    except urllib.error.HTTPError as error:
        with error:
            if error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
                part.unlink(missing_ok=True)
            return f"HTTP status {error.code} {error.reason}"
    except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError) as error:
        return f"no connection: {getattr(error, 'reason', None) or error}"


def _read(response: http.client.HTTPResponse) -> bytes:
    """Return the next block, and tell what breaks off the connection, as TLS does it too, from what the disk says."""
    try:
        return response.read(_BLOCK)
    except OSError as error:
        raise ConnectionError(error) from error


def _check_packed(path: Path, item: Download, *, remove: bool = False) -> None:
    size = path.stat().st_size
    digest = file_md5(path)
    if size == item.size and digest == item.md5:
        return
    if remove:
        path.unlink()
    removed = "; the file was removed, run the command again" if remove else ""
    raise DataError(
        f"{path}: expected {item.size} bytes with MD5 {item.md5}, got {size} bytes with MD5 {digest}{removed}"
    )


def _take_archive(source: Source, item: Download, path: Path, stage: Path) -> None:
    if not item.name.endswith(".tar.gz"):
        raise ConfigError(
            f"{source.name}: expected a folder with published files such as {item.name}, got the file {path}"
        )
    _check_packed(path, item)
    _unpack(path, item, stage)


def _take_files(source: Source, item: Download, origin: Path, stage: Path) -> None:
    """Copy each file from the first place below `origin` that holds it unharmed."""
    names = {variant for file in item.holds for variant in (file.name, f"{file.name}.gz")}
    found = find_files(origin, names | {item.name})
    missing = [file.name for file in item.holds if not (found.get(file.name) or found.get(f"{file.name}.gz"))]
    if missing and item.name.endswith(".tar.gz") and item.name in found:
        _take_archive(source, item, found[item.name][0], stage)
        return
    if missing:
        raise MissingDataError(
            f"{source.name}: expected {', '.join(missing)} (or .gz) or {item.name} below {origin}, got none"
        )
    for file in item.holds:
        failure = None
        for path in found.get(file.name, []) + found.get(f"{file.name}.gz", []):
            try:
                _unpack_one(path, file, stage, packed=path.suffix == ".gz")
                break
            except DataError as error:
                failure = failure or error
        else:
            raise failure or MissingDataError(f"{source.name}: expected {file.name} below {origin}")


def _unpack_one(path: Path, file: PublishedFile, stage: Path, *, packed: bool) -> None:
    try:
        with gzip.open(path) if packed else path.open("rb") as stream:
            _copy_checked(stream, file, stage, str(path))
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path}: expected a gzip file, got {error}") from error


def _unpack(path: Path, item: Download, stage: Path) -> None:
    """Unpack a checked `.tar.gz` or `.gz`; no path of the archive is ever used to write."""
    if not item.name.endswith(".tar.gz"):
        _unpack_one(path, item.holds[0], stage, packed=True)
        return
    wanted = {file.name: file for file in item.holds}
    try:
        with tarfile.open(path, "r:gz") as archive:
            for member in archive:
                name = PurePosixPath(member.name)
                if name.is_absolute() or ".." in name.parts or not (member.isreg() or member.isdir()):
                    raise DataError(f"{path}: expected plain files below one folder, got the member {member.name!r}")
                file = wanted.pop(name.name, None) if member.isreg() else None
                stream = archive.extractfile(member) if file else None
                if file and stream:
                    _copy_checked(stream, file, stage, f"{path}: {member.name}")
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: expected a tar.gz archive, got {error}") from error
    if wanted:
        raise DataError(f"{path}: expected the files {', '.join(wanted)}, got an archive without them")


def _copy_checked(stream: _Readable, file: PublishedFile, stage: Path, where: str) -> None:
    """Write the stream to the staging folder, no more than the expected size, and check it."""
    digest, size = hashlib.md5(usedforsecurity=False), 0
    target = stage / file.name
    with target.open("wb") as out:
        while size <= file.size and (block := stream.read(_BLOCK)):
            out.write(block)
            digest.update(block)
            size += len(block)
    if size == file.size and file.md5 in (None, digest.hexdigest()):
        return
    target.unlink()
    raise DataError(
        f"{where}: expected {file.size} bytes with MD5 {file.md5 or 'unknown'}, "
        f"got {size if size <= file.size else f'more than {file.size}'} bytes with MD5 {digest.hexdigest()}"
    )
