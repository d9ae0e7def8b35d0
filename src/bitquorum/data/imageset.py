"""Hold a labelled image set as tensors, with checked content, seeded samples and batches."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bitquorum import rng
from bitquorum.data.room import gather
from bitquorum.interface import DataError, InputError


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """Hold one batch: float32 images in [0, 1], int64 labels, and the identity of each example."""

    images: Float[Tensor, "batch channels height width"]
    labels: Int[Tensor, "batch"]
    examples: Int[Tensor, "batch"]

    def __len__(self) -> int:
        """Return the number of examples."""
        return self.labels.shape[0]


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageSet:
    """Hold images, labels and identities of one split of a data set; the content is checked at construction.

    Args:
        name: Name of the data set, as `load` takes it.
        split: Name of the split, such as "train", "validation" or "test".
        images: uint8 in 0..255 or float32 in [0, 1], shape [examples, channels, height, width].
        labels: int64 in 0..len(classes) - 1, shape [examples].
        classes: Name of each class, in the order of the labels.
        index: int64, shape [examples]: the identity of each example, its position in its published split.
            Random numbers are keyed by it, so no two examples of a set may share one.

    Raises:
        InputError: if a shape, type or device is wrong.
        DataError: if the set is empty, a value is not finite or not in [0, 1], a label has no class, or two
            examples share an index.

    Examples:
        >>> images = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1)
        >>> pair = ImageSet(name="pair", split="train", images=images, labels=torch.tensor([0, 1]),
        ...                 classes=("dark", "bright"), index=torch.tensor([0, 1]))
        >>> len(pair), pair.shape, pair.batch(torch.tensor([1])).images.item()
        (2, (1, 1, 1), 1.0)
    """

    name: str
    split: str
    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    index: Tensor

    def __post_init__(self) -> None:
        where = f"{self.name or 'image set'} ({self.split})"
        _check_form(self, where)
        _check_images(self.images, where)
        _check_labels(self, where)

    def __len__(self) -> int:
        """Return the number of examples."""
        return self.images.shape[0]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Return (channels, height, width) of every image."""
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    def to(self, device: torch.device | str) -> "ImageSet":
        """Return the set with its tensors on `device`."""
        parts = {name: getattr(self, name).to(device) for name in ("images", "labels", "index")}
        return replace(self, **parts)

    def select(self, indices: Int[Tensor, "count"] | Sequence[int]) -> "ImageSet":
        """Return the examples at the positions `indices`, in that order.

        Args:
            indices: Positions in 0..len - 1, without repetition.

        Raises:
            InputError: if a position is no integer or lies outside of the set.
            DataError: if no position is given or one is given twice.
        """
        given = torch.as_tensor(indices)
        chosen = self._positions(given if given.numel() else given.long())
        return replace(self, images=gather(self.images, chosen), labels=self.labels[chosen], index=self.index[chosen])

    def take(self, count: int, *, seed: int | None = None) -> "ImageSet":
        """Return the first `count` examples or, with a seed, a random class-balanced sample.

        The numbers of two classes differ by at most one, unless a class has no more examples to give. The
        sample is a function of the seed and the indices; with one seed, a smaller sample is a part of every
        larger one. The examples keep their order.

        Args:
            count: Number of examples, 1..len.
            seed: Seed of the sample; `None` takes the first ones.

        Raises:
            InputError: if `count` is out of range.
        """
        if isinstance(count, bool) or not 1 <= count <= len(self):
            raise InputError(f"{self.name} ({self.split}): expected a count in 1..{len(self)}, got {count}")
        if seed is None:
            return self.select(torch.arange(count))
        rank = _rank_in_class(self, seed)
        priority = _class_priority(self, seed)[self.labels.cpu()]
        order = torch.argsort(rank * len(self.classes) + priority)
        return self.select(order[:count].sort().values)

    def split_off(self, count: int, *, seed: int) -> tuple["ImageSet", "ImageSet"]:
        """Return (train, validation): `count` examples go to validation, the same share of every class.

        The share of a class of n examples is `count * n / len`, rounded by largest remainders, so it is off
        by less than one. The split is a function of the seed and the indices. The examples keep their order.

        Args:
            count: Number of validation examples, 1..len - 1.
            seed: Seed of the split.

        Raises:
            InputError: if `count` is out of range.
        """
        if isinstance(count, bool) or not 1 <= count < len(self):
            raise InputError(
                f"{self.name} ({self.split}): expected a validation count in 1..{len(self) - 1}, got {count}"
            )
        labels = self.labels.cpu()
        exact = count * torch.bincount(labels, minlength=len(self.classes))
        share = exact // len(self)
        # a priority below the class count breaks ties without changing the order of the integer remainders
        remainder = exact % len(self) * len(self.classes) + _class_priority(self, seed)
        share[torch.argsort(remainder, descending=True)[: count - int(share.sum())]] += 1
        held_out = _rank_in_class(self, seed) < share[labels]
        return self.select(_where(~held_out)), replace(self.select(_where(held_out)), split="validation")

    def batch(self, positions: Int[Tensor, "batch"], device: torch.device | str | None = None) -> Batch:
        """Return the examples at `positions` as float32 images in [0, 1], on `device`.

        Args:
            positions: Positions in 0..len - 1, integer, shape [batch].
            device: Where the batch shall lie; by default where the set lies.

        Raises:
            InputError: if a position is no integer or lies outside of the set.
        """
        chosen = self._positions(positions)
        target = self.images.device if device is None else torch.device(device)
        images, labels, index = (part[chosen].to(target) for part in (self.images, self.labels, self.index))
        if images.dtype == torch.uint8:
            # a tensor divisor: by a plain number a GPU multiplies by 1/255 and would differ in the last bit
            images = images.float().div_(torch.full((), 255.0, device=target))
        return Batch(images=images, labels=labels, examples=index)

    def batches(self, size: int, device: torch.device | str | None = None) -> Iterator[Batch]:
        """Return an iterator over the whole set in its order, `size` examples at a time or what is left.

        Raises:
            InputError: if `size` is below one.
        """
        if isinstance(size, bool) or size < 1:
            raise InputError(f"{self.name} ({self.split}): expected a batch size of at least 1, got {size}")
        parts = torch.arange(len(self)).split(size)
        return (self.batch(part, device) for part in parts)

    def _positions(self, positions: Tensor) -> Int[Tensor, "count"]:
        where = f"{self.name} ({self.split})"
        if positions.ndim != 1 or positions.is_floating_point() or positions.dtype == torch.bool:
            got = f"{positions.dtype} {list(positions.shape)}"
            raise InputError(f"{where}: expected a list of integer positions, got {got}")
        if len(positions):
            low, high = (int(bound) for bound in torch.aminmax(positions))
            if low < 0 or high >= len(self):
                raise InputError(f"{where}: expected positions in 0..{len(self) - 1}, got {low}..{high}")
        return positions.to(self.images.device, torch.long, non_blocking=True)


def _where(mask: Bool[Tensor, "examples"]) -> Int[Tensor, "count"]:
    return mask.nonzero().flatten()


def _check_form(data: ImageSet, where: str) -> None:
    for field in ("images", "labels", "index"):
        value = getattr(data, field)
        if not isinstance(value, Tensor):
            raise InputError(f"{where}: expected {field} to be a tensor, got {type(value).__name__}")
        if value.device != data.images.device:
            raise InputError(f"{where}: expected all tensors on {data.images.device}, got {field} on {value.device}")
    if data.images.ndim != 4 or data.images.dtype not in (torch.uint8, torch.float32):
        got = f"{data.images.dtype} {list(data.images.shape)}"
        raise InputError(f"{where}: expected uint8 or float32 images [examples, channels, height, width], got {got}")
    if data.images.numel() == 0:
        raise DataError(f"{where}: expected at least one image and one pixel, got {list(data.images.shape)}")
    for field in ("labels", "index"):
        value = getattr(data, field)
        if value.dtype != torch.int64 or tuple(value.shape) != (len(data.images),):
            got = f"{value.dtype} {list(value.shape)}"
            raise InputError(f"{where}: expected int64 {field} of shape [{len(data.images)}], got {got}")
    if not isinstance(data.classes, tuple) or not all(isinstance(name, str) for name in data.classes):
        raise InputError(f"{where}: expected classes as a tuple of names, got {data.classes!r}")


def _check_images(images: Tensor, where: str) -> None:
    if images.dtype == torch.uint8:
        return
    low, high = (bound.item() for bound in torch.aminmax(images))
    if not (low >= 0 and high <= 1):  # written so that NaN fails, too
        bad = ~((images >= 0) & (images <= 1)).flatten(1).all(1)
        example = int(_where(bad)[0])
        values = images[example].flatten()
        value = values[~((values >= 0) & (values <= 1))][0].item()
        raise DataError(
            f"{where}: expected pixel values in [0, 1], got {value:g} in image {example} "
            f"({int(bad.sum())} bad images); scale the images to [0, 1] or give uint8"
        )


def _check_labels(data: ImageSet, where: str) -> None:
    low, high = (int(bound) for bound in torch.aminmax(data.labels))
    if low < 0 or high >= len(data.classes):
        example = int(_where((data.labels < 0) | (data.labels >= len(data.classes)))[0])
        raise DataError(
            f"{where}: expected labels in 0..{len(data.classes) - 1} for {len(data.classes)} classes, "
            f"got {int(data.labels[example])} for example {example}"
        )
    ordered = data.index.sort().values
    if bool((ordered[1:] == ordered[:-1]).any()):
        twice = int(ordered[1:][ordered[1:] == ordered[:-1]][0])
        raise DataError(f"{where}: expected a different index for every example, got {twice} more than once")


def _rank_in_class(data: ImageSet, seed: int) -> Int[Tensor, "examples"]:
    """Return the place of each example in a random order of its class, whatever the order of the set."""
    index, labels = data.index.cpu(), data.labels.cpu()
    order = torch.argsort(index)
    for key in (rng.uniform(seed, index, 1, address="sample")[:, 0], labels):
        order = order[torch.argsort(key[order], stable=True)]
    sizes = torch.bincount(labels, minlength=len(data.classes))
    starts = (sizes.cumsum(0) - sizes)[labels[order]]
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order)) - starts
    return rank


def _class_priority(data: ImageSet, seed: int) -> Int[Tensor, "classes"]:
    """Return a random order of the classes: a different number in 0..classes - 1 for each."""
    noise = rng.uniform(seed, torch.arange(len(data.classes)), 1, address="classes")[:, 0]
    return torch.argsort(torch.argsort(noise, stable=True))
