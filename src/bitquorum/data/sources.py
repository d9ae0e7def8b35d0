"""List the published data sets: where they come from, what their files hold, and where they lie here."""

import difflib
import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from bitquorum.interface import ConfigError

_TEN = tuple("0123456789")
_CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_FASHION = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
_CIFAR100 = """
    apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can
    castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin
    elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard
    lobster man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear
    pickup_truck pine_tree plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal
    shark shrew skunk skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank
    telephone television tiger tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm
"""


@dataclass(frozen=True, kw_only=True)
class PublishedFile:
    """Describe one file as `load` reads it, unpacked: name, size in bytes and, where known, MD5 sum."""

    name: str
    size: int
    md5: str | None = None


@dataclass(frozen=True, kw_only=True)
class Download:
    """Describe one file as it is published: a `.tar.gz` with the files it holds, or one file as `.gz`.

    Args:
        url: Where it lies.
        size: Its size in bytes.
        md5: Its MD5 sum.
        holds: The files that are unpacked from it.
    """

    url: str
    size: int
    md5: str
    holds: tuple[PublishedFile, ...]

    @property
    def name(self) -> str:
        """Return the name of the published file."""
        return self.url.rpartition("/")[2]


@dataclass(frozen=True, kw_only=True)
class Source:
    """Describe a published data set completely.

    Args:
        name: Its name; its files lie in the folder of that name.
        layout: "idx" for an image and a label file in IDX format, "cifar" for records of labels and pixels.
        shape: (channels, height, width).
        classes: Name of each class.
        train: Names of the files of the training split, in order; an image file and a label file for "idx".
        test: Names of the files of the test split.
        downloads: The published files.
        label_bytes: Label bytes in front of each "cifar" record; the last one is the label.
    """

    name: str
    layout: Literal["idx", "cifar"]
    shape: tuple[int, int, int]
    classes: tuple[str, ...]
    train: tuple[str, ...]
    test: tuple[str, ...]
    downloads: tuple[Download, ...]
    label_bytes: int = 1

    @property
    def files(self) -> dict[str, PublishedFile]:
        """Return every unpacked file by its name."""
        return {file.name: file for download in self.downloads for file in download.holds}

    def count(self, split: str) -> int:
        """Return the number of examples of a split, by the sizes of its files."""
        if self.layout == "idx":
            images = self.files[self.train[0] if split == "train" else self.test[0]]
            return (images.size - 16) // (self.shape[0] * self.shape[1] * self.shape[2])
        record = self.label_bytes + self.shape[0] * self.shape[1] * self.shape[2]
        names = self.train if split == "train" else self.test
        return sum(self.files[name].size for name in names) // record


_IDX_FILES = (
    ("train-images-idx3-ubyte", 47_040_016),
    ("train-labels-idx1-ubyte", 60_008),
    ("t10k-images-idx3-ubyte", 7_840_016),
    ("t10k-labels-idx1-ubyte", 10_008),
)


def _idx(name: str, base: str, classes: tuple[str, ...], sums: tuple[tuple[int, str, str], ...]) -> Source:
    """Return the source of four IDX files; `sums` holds (packed size, packed MD5, unpacked MD5) of each."""
    downloads = tuple(
        Download(
            url=f"{base}{file}.gz",
            size=packed_size,
            md5=packed_md5,
            holds=(PublishedFile(name=file, size=size, md5=md5),),
        )
        for (file, size), (packed_size, packed_md5, md5) in zip(_IDX_FILES, sums, strict=True)
    )
    names = tuple(file for file, _ in _IDX_FILES)
    return Source(
        name=name,
        layout="idx",
        shape=(1, 28, 28),
        classes=classes,
        train=names[:2],
        test=names[2:],
        downloads=downloads,
    )


_MNIST = _idx(
    "mnist",
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    _TEN,
    (
        (9_912_422, "f68b3c2dcbeaaa9fbdd348bbdeb94873", "6bbc9ace898e44ae57da46a324031adb"),
        (28_881, "d53e105ee54ea40749a09fcbcd1e9432", "a25bea736e30d166cdddb491f175f624"),
        (1_648_877, "9fb629c4189551a2d022fa330f9573f3", "2646ac647ad5339dbf082846283269ea"),
        (4_542, "ec29112dd5afa0611ce80d1b7f02629c", "27ae3e4e09519cfbb04c329615203637"),
    ),
)

_FASHION_MNIST = _idx(
    "fashion-mnist",
    "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
    _FASHION,
    (
        (26_421_880, "8d4fb7e6c68d591d4c3dfef9ec88bf0d", "f4a8712d7a061bf5bd6d2ca38dc4d50a"),
        (29_515, "25c81989df183df01b3e8a0aad5dffbe", "9018921c3c673c538a1fc5bad174d6f9"),
        (4_422_102, "bef4ecab320f06d8554ea6380940ec79", "8181f5470baa50b63fa0f6fddb340f0a"),
        (5_148, "bb300cfdad3c16e7a12a480ee83cd310", "15d484375f8d13e6eb1aabb0c3f46965"),
    ),
)

_CIFAR10_MD5 = {
    "data_batch_1.bin": "5dd7e06a14cb22eb9f671a540d1b7c25",
    "data_batch_2.bin": "5ea93a67294ea407fff1d09f752e9692",
    "data_batch_3.bin": "942cd6a4bcdd0dd3c604fbe906cb4421",
    "data_batch_4.bin": "ae636b3ba5c66a11e91e8cb52e771fcb",
    "data_batch_5.bin": "53f37980c15c3d472c316c40844f3f0d",
    "test_batch.bin": "803d5f7f4d78ea53de84dbe85f74fb6d",
}

_CIFAR10_SOURCE = Source(
    name="cifar10",
    layout="cifar",
    shape=(3, 32, 32),
    classes=_CIFAR10,
    train=tuple(_CIFAR10_MD5)[:5],
    test=("test_batch.bin",),
    downloads=(
        Download(
            url="https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
            size=170_052_171,
            md5="c32a1d4ab5d03f1284b67883e8d87530",
            holds=tuple(PublishedFile(name=name, size=30_730_000, md5=md5) for name, md5 in _CIFAR10_MD5.items()),
        ),
    ),
)

_CIFAR100_SOURCE = Source(
    name="cifar100",
    layout="cifar",
    shape=(3, 32, 32),
    classes=tuple(_CIFAR100.split()),
    train=("train.bin",),
    test=("test.bin",),
    label_bytes=2,
    downloads=(
        Download(
            url="https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
            size=168_513_733,
            md5="03b5dce01913d631647c71ecec9e9cb8",
            holds=(
                PublishedFile(name="train.bin", size=153_700_000),
                PublishedFile(name="test.bin", size=30_740_000),
            ),
        ),
    ),
)

SOURCES: Mapping[str, Source] = MappingProxyType(
    {source.name: source for source in (_MNIST, _FASHION_MNIST, _CIFAR10_SOURCE, _CIFAR100_SOURCE)}
)
NAMES: tuple[str, ...] = ("digits", *SOURCES)


def data_root(root: Path | None = None) -> Path:
    """Return the folder of all data sets: `root`, else `$BITQUORUM_DATA`, else `~/.cache/bitquorum/data`.

    Examples:
        >>> data_root(Path("somewhere")).name
        'somewhere'
    """
    if root is None:
        root = Path(os.environ.get("BITQUORUM_DATA") or "~/.cache/bitquorum/data")
    return at_home(root)


def at_home(path: Path | str) -> Path:
    """Return a path with `~` as the home folder.

    Raises:
        ConfigError: if there is no such home folder.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ConfigError(
            f"expected a path, got {str(path)!r}, whose home folder is unknown; write it out, or set BITQUORUM_DATA"
        ) from error


def unknown_name(name: str, known: tuple[str, ...] = NAMES) -> ConfigError:
    """Return the error for a data set that nobody knows, with the nearest known name."""
    near = difflib.get_close_matches(name.lower().replace("_", "-"), known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return ConfigError(
        f"expected the name of a data set, got {name!r}; {hint}known: {', '.join(known)}, folder:PATH, parquet:PATH"
    )


def find_files(folder: Path, names: set[str]) -> dict[str, list[Path]]:
    """Return the files below `folder` of these names, the shallowest first, none of hidden folders."""
    found: dict[str, list[Path]] = {}
    for place, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in names.intersection(files):
            found.setdefault(name, []).append(Path(place) / name)
    for paths in found.values():
        paths.sort(key=lambda path: (len(path.parts), str(path)))
    return found


def file_md5(path: Path) -> str:
    """Return the MD5 sum of a file, as the publishers state it."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
