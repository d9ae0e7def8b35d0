"""Parse the published binary formats, IDX and CIFAR records, and read them from plain or gzip files."""

import gzip
import hashlib
import math
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from bitquorum.data.imageset import ImageSet
from bitquorum.data.sources import PublishedFile, Source, find_files
from bitquorum.interface import DataError, MissingDataError

_UNSIGNED_BYTE = 0x08


def parse_idx(content: bytes | bytearray, name: str = "IDX file") -> UInt8[Tensor, "*shape"]:
    """Return the array that an IDX file holds.

    The format: two zero bytes, a type byte (only 0x08, unsigned byte, is read), the number of dimensions as
    one byte, each dimension as a big-endian 32-bit integer, then the values in row-major order
    (http://yann.lecun.com/exdb/mnist, "The IDX file format").

    Args:
        content: The whole file.
        name: Its name, for messages.

    Raises:
        DataError: if the header is none of an IDX file of unsigned bytes, or the length does not fit to it.

    Examples:
        >>> parse_idx(bytes([0, 0, 8, 1, 0, 0, 0, 3, 7, 8, 9]))
        tensor([7, 8, 9], dtype=torch.uint8)
    """
    magic = bytes(content[:4])
    if len(magic) < 4 or magic[:2] != b"\0\0" or magic[2] != _UNSIGNED_BYTE or not 1 <= magic[3] <= 8:
        raise DataError(f"{name}: expected the header 00 00 08 01..08, got {magic.hex(' ') or 'no bytes'}")
    start = 4 + 4 * magic[3]
    if len(content) < start:
        raise DataError(f"{name}: expected a header of {start} bytes, got a file of {len(content)}")
    shape = struct.unpack(f">{magic[3]}I", bytes(content[4:start]))
    if len(content) - start != math.prod(shape):
        raise DataError(
            f"{name}: expected {math.prod(shape)} values for shape {list(shape)}, got {len(content) - start}"
        )
    if not math.prod(shape):
        raise DataError(f"{name}: expected at least one value, got shape {list(shape)}")
    return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=start).view(shape)


def parse_cifar(
    content: bytes | bytearray, shape: tuple[int, int, int], *, label_bytes: int = 1, name: str = "CIFAR file"
) -> tuple[UInt8[Tensor, "count channels height width"], Int[Tensor, "count"]]:
    """Return (images, labels) of a binary CIFAR file.

    The format: records of `label_bytes` label bytes (CIFAR-100: coarse, then fine; the last one is returned)
    and the pixels, channel by channel in row-major order (https://www.cs.toronto.edu/~kriz/cifar.html).

    Args:
        content: The whole file.
        shape: (channels, height, width).
        label_bytes: Label bytes in front of each record.
        name: Its name, for messages.

    Raises:
        DataError: if the length is no multiple of the record, or the file is empty.

    Examples:
        >>> images, labels = parse_cifar(bytes([3, 10, 20, 4, 30, 40]), (1, 1, 2))
        >>> images.flatten().tolist(), labels.tolist()
        ([10, 20, 30, 40], [3, 4])
    """
    record = label_bytes + math.prod(shape)
    if not content or len(content) % record:
        raise DataError(f"{name}: expected a positive multiple of {record} bytes, got {len(content)}")
    rows = torch.frombuffer(bytearray(content), dtype=torch.uint8).view(-1, record)
    return rows[:, label_bytes:].reshape(-1, *shape), rows[:, label_bytes - 1].long()


def read_file(path: Path, file: PublishedFile) -> bytes:
    """Return the unpacked content of a plain or gzip file, which must have the published size and MD5 sum.

    Raises:
        DataError: if the file cannot be read or unpacked, or its size or sum is another one.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as stream:
            content = stream.read(file.size + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: expected a readable file, got {error}; fetch the data set again") from error
    if len(content) != file.size:
        got = f"more than {file.size}" if len(content) > file.size else str(len(content))
        raise DataError(f"{path}: expected {file.size} bytes, got {got}; delete the file and fetch the data set again")
    found = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if file.md5 not in (None, found):
        raise DataError(
            f"{path}: expected MD5 {file.md5}, got {found}: a damaged file, or that of another data set; delete it and "
            "fetch the data set again"
        )
    return content


def read_first(paths: Sequence[Path], file: PublishedFile) -> bytes:
    """Return the content of the first of several candidates that is what was published.

    Raises:
        DataError: of the first candidate, if none is.
    """
    failure: DataError | None = None
    for path in paths:
        try:
            return read_file(path, file)
        except DataError as error:
            failure = failure or error
    raise failure or MissingDataError(f"expected {file.name}, got no file")


def read_source(source: Source, split: str, folder: Path) -> ImageSet:
    """Return one split of a published data set, whose files lie anywhere below `folder`, gzip or plain.

    Raises:
        MissingDataError: if a file is not there.
        DataError: if a file is not what was published: its size, MD5 sum, header, shape or a label.
    """
    names = source.train if split == "train" else source.test
    paths = locate(source, folder, names)
    if len(paths) < len(names):
        missing = ", ".join(name for name in names if name not in paths)
        raise MissingDataError(
            f"{source.name} ({split}): expected {missing} below {folder}; "
            f"run `bitquorum data get {source.name}`, or `bitquorum data get {source.name} --from PATH` "
            "if you have the published files"
        )
    contents = {name: read_first(paths[name], source.files[name]) for name in names}
    if source.layout == "idx":
        images, labels = _idx_pair(contents, names, source)
    else:
        parts = [
            parse_cifar(contents[name], source.shape, label_bytes=source.label_bytes, name=f"{source.name}: {name}")
            for name in names
        ]
        images, labels = (torch.cat(column) for column in zip(*parts, strict=True))
    index = torch.arange(len(images))
    return ImageSet(name=source.name, split=split, images=images, labels=labels, classes=source.classes, index=index)


def locate(source: Source, folder: Path, names: tuple[str, ...] | None = None) -> dict[str, list[Path]]:
    """Return where each file of a data set may lie below `folder`, plain before gzip, without absent ones."""
    wanted = tuple(source.files) if names is None else names
    found = find_files(folder, {variant for name in wanted for variant in (name, f"{name}.gz")})
    paths = {name: found.get(name, []) + found.get(f"{name}.gz", []) for name in wanted}
    return {name: candidates for name, candidates in paths.items() if candidates}


def _idx_pair(
    contents: dict[str, bytes], names: tuple[str, ...], source: Source
) -> tuple[UInt8[Tensor, "count channels height width"], Int[Tensor, "count"]]:
    images, labels = (parse_idx(contents[name], f"{source.name}: {name}") for name in names)
    expected = source.shape[1:]
    if images.ndim != 3 or tuple(images.shape[1:]) != expected:
        raise DataError(
            f"{source.name}: {names[0]}: expected images of {list(expected)}, got shape {list(images.shape)}"
        )
    if tuple(labels.shape) != (len(images),):
        raise DataError(
            f"{source.name}: {names[1]}: expected one label for each of {len(images)} images, "
            f"got shape {list(labels.shape)}"
        )
    return images[:, None], labels.long()
