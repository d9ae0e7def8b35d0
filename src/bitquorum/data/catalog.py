"""Load a data set by its name, and list the known sets with what is on this machine."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from bitquorum.data.formats import locate, read_source
from bitquorum.data.imageset import ImageSet
from bitquorum.data.local import read_folder, read_parquet
from bitquorum.data.sources import SOURCES, at_home, data_root, unknown_name
from bitquorum.interface import ConfigError

_DIGITS_SEED = 1797  # fixes the split of `digits` for good: changing it changes every published number
_DIGITS_TEST = 500


@dataclass(frozen=True, kw_only=True)
class Listing:
    """Describe a known data set and where it lies.

    Args:
        name: Name for `load`.
        shape: (channels, height, width).
        classes: Number of classes.
        train: Number of training examples.
        test: Number of test examples.
        size: Bytes of the unpacked files; 0 if the set comes with a package.
        download: Bytes to fetch; 0 if the set comes with a package.
        where: The folder or the package that holds it, or `None` if it is not complete on this machine.
    """

    name: str
    shape: tuple[int, int, int]
    classes: int
    train: int
    test: int
    size: int
    download: int
    where: str | None


def load(name: str, split: str, *, root: Path | None = None) -> ImageSet:
    """Return one split of a data set.

    - `digits`: scikit-learn's 8x8 digits, value / 16, float32. No split is published; ours is fixed by a
      constant seed, stratified, 1297 + 500 examples. Index: position in `load_digits`.
    - `mnist`, `fashion-mnist`: 28x28 grey, 60,000 + 10,000. Index: position in the split.
    - `cifar10`, `cifar100`: 32x32 RGB, 50,000 + 10,000, fine labels. Index: position in the split.
    - `folder:PATH`: images `PATH/train/CLASS/*.png` (or jpg, bmp, webp, ...) and `PATH/test/CLASS/*`, all of
      one size. Index: position in the sorted files.
    - `parquet:PATH`: a Hugging Face data set as `PATH/train-*.parquet` or `PATH/data/train-*.parquet`; needs
      `pip install "bitquorum[hub]"`. Index: row.

    Published sets lie in `ROOT/NAME`, where `get` puts them.

    Args:
        name: Name of the data set.
        split: "train" or "test".
        root: Folder of all data sets; by default `$BITQUORUM_DATA`, else `~/.cache/bitquorum/data`.

    Raises:
        ConfigError: if the name or the split is unknown.
        MissingDataError: if the set is not on this machine.
        DataError: if its files are corrupt.

    Examples:
        >>> digits = load("digits", "test")
        >>> len(digits), digits.shape, len(digits.classes)
        (500, (1, 8, 8), 10)
    """
    if split not in ("train", "test"):
        raise ConfigError(f"expected the split 'train' or 'test', got {split!r}; cut a validation set by `split_off`")
    if not isinstance(name, str):
        raise ConfigError(f"expected the name of a data set, got {name!r}")
    kind, colon, place = name.partition(":")
    readers: dict[str, Callable[[Path, str], ImageSet]] = {"folder": read_folder, "parquet": read_parquet}
    if colon and kind in readers and place:
        return readers[kind](at_home(place), split)
    if name == "digits":
        return _digits(split)
    if name not in SOURCES:
        raise unknown_name(name)
    return read_source(SOURCES[name], split, data_root(root) / name)


def available(root: Path | None = None) -> dict[str, Listing]:
    """Return what is known of each named data set, and where it lies if all its files are there.

    Files are looked for, not read; `load` and `get` check them.

    Args:
        root: Folder of all data sets, as for `load`.

    Examples:
        >>> listing = available()["digits"]
        >>> listing.train, listing.test, listing.where
        (1297, 500, 'scikit-learn')
    """
    package = "scikit-learn" if importlib.util.find_spec("sklearn") else None
    digits = Listing(
        name="digits",
        shape=(1, 8, 8),
        classes=10,
        train=1797 - _DIGITS_TEST,
        test=_DIGITS_TEST,
        size=0,
        download=0,
        where=package,
    )
    listings = {"digits": digits}
    for name, source in SOURCES.items():
        folder = data_root(root) / name
        complete = len(locate(source, folder)) == len(source.files)
        listings[name] = Listing(
            name=name,
            shape=source.shape,
            classes=len(source.classes),
            train=source.count("train"),
            test=source.count("test"),
            size=sum(file.size for file in source.files.values()),
            download=sum(download.size for download in source.downloads),
            where=str(folder) if complete else None,
        )
    return listings


def _digits(split: str) -> ImageSet:
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    images = torch.tensor(pixels / 16, dtype=torch.float32).view(-1, 1, 8, 8)
    whole = ImageSet(
        name="digits",
        split=split,
        images=images,
        labels=torch.tensor(labels, dtype=torch.long),
        classes=tuple(str(digit) for digit in range(10)),
        index=torch.arange(len(images)),
    )
    train, test = whole.split_off(_DIGITS_TEST, seed=_DIGITS_SEED)
    part = train if split == "train" else test
    return replace(part, split=split)
