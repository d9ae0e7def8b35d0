"""Read a user's own images: a folder for each class, or a Hugging Face data set as local Parquet files."""

import io
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from bitquorum.data.imageset import ImageSet
from bitquorum.data.room import room
from bitquorum.interface import BitquorumError, ConfigError, DataError, MissingDataError

_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".ppm", ".pgm", ".tif", ".tiff"}
_FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "PPM", "TIFF")  # of Pillow's, others may start programs
_SHARD = re.compile(r"-(\d+)-of-(\d+)\.parquet$")
_IMAGE_COLUMNS = ("image", "img")
_MOST_CLASSES = 1 << 16
_LABEL_COLUMNS = ("label", "labels", "fine_label")


def read_folder(path: Path, split: str) -> ImageSet:
    """Return one split of an image folder, `path/train/CLASS/*` and `path/test/CLASS/*`.

    The classes are the folders of `train` in alphabetical order (of `test` where there is no `train`); files
    with another suffix than that of an image are skipped. Images are grey if all of this split are, else RGB.

    Args:
        path: The folder that holds `train` and `test`.
        split: "train" or "test".

    Raises:
        MissingDataError: if the folder of the split is not there.
        DataError: if there is no image, a class of `test` is not in `train`, an image cannot be read, is not
            opaque with 8 bits a channel, or differs in size from the first one.
    """
    folder = path / split
    if not folder.is_dir():
        raise MissingDataError(f"folder:{path}: expected a folder {folder} with one folder of images for each class")
    reference = path / "train" if (path / "train").is_dir() else folder
    classes = _class_folders(reference)
    unknown = sorted(set(_class_folders(folder)) - set(classes))
    if unknown:
        raise DataError(
            f"folder:{path}: expected only the classes of {reference} in {folder}, got {', '.join(unknown)}"
        )
    files = [
        (file, label)
        for label, name in enumerate(classes)
        for file in sorted((folder / name).glob("*"))
        if file.suffix.lower() in _SUFFIXES and file.is_file()
    ]
    if not files:
        raise DataError(f"folder:{path}: expected images in the class folders of {folder}, got none")
    images = _stack(((str(file), file) for file, _ in files), len(files))
    labels = torch.tensor([label for _, label in files])
    return ImageSet(
        name=f"folder:{path}",
        split=split,
        images=images,
        labels=labels,
        classes=tuple(classes),
        index=torch.arange(len(files)),
    )


def read_parquet(path: Path, split: str) -> ImageSet:
    """Return one split of a Hugging Face data set given as local Parquet files.

    The files are `SPLIT-*.parquet` or `SPLIT.parquet` in `path` or `path/data`, or all Parquet files of
    `path/SPLIT`. Columns: `image` or `img`, a struct with the encoded image in `bytes`; `label`, `labels` or
    `fine_label`, an integer. The class names are those of the schema's `huggingface` metadata, else numbers.

    Args:
        path: The folder of the files.
        split: "train" or "test".

    Raises:
        ConfigError: if pyarrow is not installed.
        MissingDataError: if there is no file of the split.
        DataError: if a file is no such table, or an image is bad as for `read_folder`.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise ConfigError(
            f'parquet:{path}: expected the package pyarrow, got none; run `pip install "bitquorum[hub]"`'
        ) from error
    files = _parquet_files(path, split)
    if not files:
        raise MissingDataError(
            f"parquet:{path}: expected {split}-*.parquet in {path} or in {path / 'data'}, got no such file"
        )
    _check_shards(files, path)
    try:
        schema = pq.read_schema(files[0])
        image, label = _column(schema, _IMAGE_COLUMNS, path), _column(schema, _LABEL_COLUMNS, path)
        for file in files:
            _check_types(file, pq.read_schema(file), image, label, pa)
        labels = [value for file in files for value in pq.read_table(file, columns=[label])[label].to_pylist()]
        classes = _class_names(schema.metadata or {}, label) or _numbers(path, label, pq)
        if not labels or any(value is None for value in labels):
            raise DataError(f"parquet:{path}: expected a label in every row of {split}, got none in some or no row")
        cells = _cells(files, image, pq)
        rows = ((f"parquet:{path} ({split}), row {row}", _encoded(cell)) for row, cell in enumerate(cells))
        return ImageSet(
            name=f"parquet:{path}",
            split=split,
            images=_stack(rows, len(labels)),
            labels=torch.tensor(labels, dtype=torch.long),
            classes=classes,
            index=torch.arange(len(labels)),
        )
    except BitquorumError:
        raise
    except (pa.ArrowException, OSError, KeyError, ValueError, RuntimeError) as error:
        raise DataError(f"parquet:{path}: expected readable Parquet files of one schema, got {error}") from error


def _class_folders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _parquet_files(path: Path, split: str) -> list[Path]:
    for folder in (path, path / "data"):
        files = sorted(folder.glob(f"{split}-*.parquet")) or sorted(folder.glob(f"{split}.parquet"))
        if files:
            return files
    return sorted((path / split).glob("*.parquet"))


def _check_shards(files: list[Path], path: Path) -> None:
    """Refuse some of the files of a set whose names say how many it has."""
    found = [part for file in files if (part := _SHARD.search(file.name))]
    count = max((int(part[2]) for part in found), default=0)
    missing = sorted(set(range(count)) - {int(part[1]) for part in found})
    if missing:
        raise MissingDataError(
            f"parquet:{path}: expected {count} files, as their names say, got {len(files)}, none with the number "
            f"{', '.join(map(str, missing[:9]))}; copy them too"
        )


def _check_types(file: Path, schema: Any, image: str, label: str, pa: Any) -> None:
    """Refuse a file whose columns are not encoded images and labels."""
    types = {field.name: field.type for field in schema}
    picture, number = types.get(image), types.get(label)
    parts = {part.name: part.type for part in picture} if picture and pa.types.is_struct(picture) else {}
    encoded = parts.get("bytes", pa.null())
    binary = pa.types.is_binary(encoded) or pa.types.is_large_binary(encoded)
    if not binary or number is None or not pa.types.is_integer(number):
        raise DataError(
            f"parquet:{file}: expected a struct and an integer in {image}, {label}, got {picture} and {number}; the "
            "struct holds each file as binary `bytes`"
        )


def _column(schema: Any, names: tuple[str, ...], path: Path) -> str:
    for name in names:
        if name in schema.names:
            return name
    raise DataError(f"parquet:{path}: expected a column {' or '.join(names)}, got {', '.join(schema.names)}")


def _class_names(metadata: dict[bytes, bytes], label: str) -> tuple[str, ...]:
    """Return the class names that the hub keeps in the schema, or none where it keeps no valid ones."""
    try:
        names = json.loads(metadata[b"huggingface"])["info"]["features"][label]["names"]
    except (KeyError, TypeError, ValueError):
        return ()
    return tuple(str(name) for name in names) if isinstance(names, list) else ()


def _numbers(path: Path, label: str, pq: Any) -> tuple[str, ...]:
    """Return the numbers 0..largest label of both splits, so that both have the same classes."""
    largest = 0
    for file in _parquet_files(path, "train") + _parquet_files(path, "test"):
        values = [value for value in pq.read_table(file, columns=[label])[label].to_pylist() if value is not None]
        largest = max([largest, *values])
    if largest > _MOST_CLASSES:
        raise DataError(f"parquet:{path}: expected labels 0..{_MOST_CLASSES} in {label}, got {largest}")
    return tuple(str(number) for number in range(largest + 1))


def _cells(files: list[Path], column: str, pq: Any) -> Iterator[Any]:
    """Yield the cells of a column; never more than some hundred of them are in memory."""
    for file in files:
        with pq.ParquetFile(file) as table:
            for part in table.iter_batches(batch_size=256, columns=[column]):
                yield from part.column(0).to_pylist()


def _encoded(cell: Any) -> io.BytesIO:
    return io.BytesIO(cell.get("bytes") or b"" if cell else b"")


def _stack(images: Iterable[tuple[str, Path | io.BytesIO]], count: int) -> UInt8[Tensor, "count channels height width"]:
    """Return the decoded images as one tensor, mapped where it is large: one channel if all are grey, else three."""
    stacked, first, grey = torch.empty(0), "", True
    for row, (name, stream) in enumerate(images):
        pixels = _decode(name, stream)
        if not row:
            stacked, first = room((count, 3, *pixels.shape[:2])), name
        if pixels.shape[:2] != stacked.shape[2:]:
            raise DataError(
                f"{name}: expected the size of {first}, {_size(stacked.shape[2:])} pixels, got "
                f"{_size(pixels.shape[:2])}; scale all images to one size"
            )
        stacked[row] = torch.from_numpy(pixels).permute(2, 0, 1)
        grey = grey and pixels.shape[2] == 1
    return stacked[:, :1] if grey else stacked


def _size(shape: Sequence[int]) -> str:
    return f"{shape[1]}x{shape[0]}"


def _decode(name: str, stream: Path | io.BytesIO) -> UInt8[np.ndarray, "height width channels"]:
    from PIL import Image

    try:
        with Image.open(stream, formats=_FORMATS) as image:
            mode, bands = image.mode, image.getbands()
            if mode.startswith(("I", "F")) or ";16" in str(getattr(image, "tile", "")):  # Pillow would cut 16 bits
                raise DataError(f"{name}: expected 8 bits a channel, got an image of mode {mode}; convert it")
            opaque = image
            if bands[-1] in ("A", "a") or "transparency" in image.info:
                opaque = image.convert("RGBA")
                if opaque.getchannel("A").getextrema() != (255, 255):
                    raise DataError(f"{name}: expected an opaque image, got a transparent one; flatten it")
            grey = mode in ("1", "L", "LA", "La")
            pixels = np.array(opaque.convert("L" if grey else "RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{name}: expected an image that Pillow can read, got {error}") from error
    return pixels[:, :, None] if grey else pixels
