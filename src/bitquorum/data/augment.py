"""Augment training images by noise that depends on (seed, example) and on nothing else."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bitquorum import rng
from bitquorum.interface import InputError, Method


@dataclass(frozen=True, kw_only=True)
class Augment(Method):
    r"""Shift, mirror, mask, colour and mix images, each example by its own random numbers.

    With $u_1, \dots, u_8 \sim U(0, 1)$ drawn for (seed, example):

    - `crop`: the image is padded by `crop` zeros on every side and cut back to its size at a random place, a
      shift by $\lfloor (2 \cdot \mathrm{crop} + 1) u \rfloor - \mathrm{crop}$ pixels in each direction;
    - `flip`: it is mirrored left to right if $u < 1/2$;
    - `brightness` b: it is multiplied by $1 + b (2u - 1)$ and clipped to [0, 1];
    - `contrast` c: what its pixels differ by from the grey of the whole image is multiplied by $1 + c (2u - 1)$;
    - `saturation` s: what they differ by from their own grey is multiplied by $1 + s (2u - 1)$; both clip to [0, 1],
      and take for the grey of red, green and blue 0.299, 0.587 and 0.114 of them (ITU-R BT.601);
    - `cutout`: a square of `cutout` pixels a side, its centre on a random pixel, is set to zero; the part of
      the square outside of the image is lost. DeVries and Taylor, 2017, https://arxiv.org/abs/1708.04552;
      they mask normalized images, so that their zero is the mean colour, while ours is black;
    - `noise` n: to every number of the image one of its own from $U(-n, n)$ is added, last of all; clipped to [0, 1].

    With `cutmix` that share of the images gets, in `mix`, a rectangle of another image of the set, and its label as
    far as the rectangle reaches: with $\lambda \sim U(0, 1)$ it has $\sqrt{1 - \lambda}$ of each side of the image, its
    centre on a random pixel, and the part of it outside of the image is lost. Yun et al., 2019,
    https://arxiv.org/abs/1905.04899, section 3.1; deviation: the other image comes from the whole set, not from the
    batch, so that the batch does not matter.

    The numbers do not depend on the place in the batch, on the batch size or on the other options, and they
    are the same on every device.

    Args:
        crop: Largest shift in pixels, 0 or more, and less than the height and the width of the images.
        flip: Mirror half of the images?
        cutout: Side of the masked square in pixels, 0 or more.
        brightness: Largest relative change of brightness, in [0, 1].
        contrast: Largest relative change of contrast, in [0, 1]; `None` for none.
        saturation: Largest relative change of saturation, in [0, 1], of images of three channels; `None` for none.
        noise: Largest change of a single number of the image, in [0, 1]; `None` for none.
        cutmix: Share of the images that get a part of another one, in [0, 1]; `None` for none.

    Raises:
        InputError: if an option or a shape is out of range.

    Examples:
        >>> images = torch.arange(1.0, 5.0).view(1, 1, 1, 4) / 4
        >>> augment = Augment(flip=True)
        >>> both = torch.cat([augment(images, torch.tensor([0]), seed) for seed in range(8)])
        >>> sorted({tuple(row) for row in both.flatten(1).tolist()})
        [(0.25, 0.5, 0.75, 1.0), (1.0, 0.75, 0.5, 0.25)]
    """

    crop: int = 0
    flip: bool = False
    cutout: int = 0
    brightness: float = 0.0
    cutmix: float | None = None
    contrast: float | None = None
    saturation: float | None = None
    noise: float | None = None

    def __post_init__(self) -> None:
        for name in ("crop", "cutout"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise InputError(f"expected {name} to be a number of pixels, 0 or more, got {value!r}")
        if not isinstance(self.flip, bool):
            raise InputError(f"expected flip to be true or false, got {self.flip!r}")
        if not _is_share(self.brightness):
            raise InputError(f"expected brightness in [0, 1], got {self.brightness!r}")
        for name, more in (("cutmix", ", a share of the images,"), ("contrast", ""), ("saturation", ""), ("noise", "")):
            value = getattr(self, name)
            if value is not None and not _is_share(value):
                raise InputError(f"expected {name}{more} in [0, 1], got {value!r}")

    def __call__(
        self,
        images: Float[Tensor, "batch channels height width"],
        examples: Int[Tensor, "batch"],
        seed: int,
    ) -> Float[Tensor, "batch channels height width"]:
        """Return the augmented images; the input is not changed.

        Args:
            images: Images in [0, 1].
            examples: Identity of each image, such as `Batch.examples`.
            seed: Seed of the noise; derive one for each epoch.
        """
        self._check(images, examples)
        noise = rng.uniform(seed, examples.to(images.device), 6, address="augment")
        if self.crop or self.flip:
            images = self._move(images, noise[:, 0], noise[:, 1], noise[:, 2])
        if self.brightness:
            images = _scaled(images, torch.zeros_like(images[:, :1]), self.brightness, noise[:, 5])
        if self.contrast or self.saturation:
            noise_of_colour = rng.uniform(seed, examples.to(images.device), 2, address="colour")
            if self.contrast:
                grey = _grey(images).mean((2, 3), keepdim=True)
                images = _scaled(images, grey, self.contrast, noise_of_colour[:, 0])
            if self.saturation:
                images = _scaled(images, _grey(images), self.saturation, noise_of_colour[:, 1])
        if self.cutout:
            images = images.masked_fill(self._mask(images, noise[:, 3], noise[:, 4]), 0)
        if self.noise:
            u = rng.uniform(seed, examples.to(images.device), images[0].numel(), address="noise").view(images.shape)
            images = (images + self.noise * (2 * u - 1).to(images.dtype)).clamp(0, 1)
        return images

    def partners(self, examples: Int[Tensor, "images"], seed: int) -> Int[Tensor, "images"]:
        """Return for every image of a set the position of the one that `mix` takes a part of.

        Args:
            examples: Identity of each image of the set.
            seed: As in the call.
        """
        return _integer(rng.uniform(seed, examples, 1, address="partner")[:, 0], len(examples))[:, 0]

    def mix(
        self,
        images: Float[Tensor, "batch channels height width"],
        others: Float[Tensor, "batch channels height width"],
        examples: Int[Tensor, "batch"],
        seed: int,
    ) -> tuple[Float[Tensor, "batch channels height width"], Float[Tensor, "batch"]]:
        """Return the images with rectangles of the others, and the share of each that is its own.

        Args:
            images: Images in [0, 1].
            others: As many, of `partners`.
            examples: Identity of each of `images`.
            seed: As in the call.
        """
        self._check(images, examples)
        height, width = images.shape[2:]
        chosen, part, down, right = rng.uniform(seed, examples.to(images.device), 4, address="cutmix").unbind(1)
        side = part.sqrt() * (chosen < (self.cutmix or 0.0))  # 1 - lambda is as uniform as lambda
        inside = _cut(images, height, side, down)[:, :, None] & _cut(images, width, side, right)[:, None, :]
        return torch.where(inside[:, None], others, images), 1 - inside.flatten(1).float().mean(1)

    def _check(self, images: Tensor, examples: Tensor) -> None:
        if images.ndim != 4 or not images.is_floating_point():
            raise InputError(
                "expected floating point images [batch, channels, height, width], "
                f"got {images.dtype} {list(images.shape)}"
            )
        if tuple(examples.shape) != (len(images),) or examples.is_floating_point():
            raise InputError(
                f"expected {len(images)} integer examples, one for each image, "
                f"got {examples.dtype} {list(examples.shape)}"
            )
        if self.saturation and images.shape[1] != 3:
            raise InputError(f"expected images of three channels for saturation, got {images.shape[1]}; leave it out")
        if self.crop >= min(images.shape[2:]):
            raise InputError(f"expected crop below the image size {list(images.shape[2:])}, got {self.crop}")

    def _move(
        self,
        images: Float[Tensor, "batch channels height width"],
        down: Float[Tensor, "batch"],
        right: Float[Tensor, "batch"],
        mirror: Float[Tensor, "batch"],
    ) -> Float[Tensor, "batch channels height width"]:
        _, channels, height, width = images.shape
        row = _axis(images, height) + (_integer(down, 2 * self.crop + 1) - self.crop)
        column = _axis(images, width)
        if self.flip:
            column = torch.where(mirror[:, None] < 0.5, width - 1 - column, column)
        column = column + (_integer(right, 2 * self.crop + 1) - self.crop)
        source = row.clamp(0, height - 1)[:, :, None] * width + column.clamp(0, width - 1)[:, None, :]
        inside = _within(row, height)[:, None, :, None] & _within(column, width)[:, None, None, :]
        moved = images.flatten(2).gather(2, source.flatten(1)[:, None, :].expand(-1, channels, -1))
        return moved.view_as(images).masked_fill(~inside, 0)

    def _mask(
        self,
        images: Float[Tensor, "batch channels height width"],
        down: Float[Tensor, "batch"],
        right: Float[Tensor, "batch"],
    ) -> Bool[Tensor, "batch 1 height width"]:
        height, width = images.shape[2:]
        row = _axis(images, height) - (_integer(down, height) - self.cutout // 2)
        column = _axis(images, width) - (_integer(right, width) - self.cutout // 2)
        return _within(row, self.cutout)[:, None, :, None] & _within(column, self.cutout)[:, None, None, :]


def _is_share(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= 1


def _scaled(
    images: Float[Tensor, "batch channels height width"], origin: Tensor, amount: float, u: Float[Tensor, "batch"]
) -> Float[Tensor, "batch channels height width"]:
    """Return the images with their distance from an origin multiplied by a random factor, clipped to [0, 1]."""
    factor = (1 + amount * (2 * u - 1)).to(images.dtype).view(-1, 1, 1, 1)
    return (origin + factor * (images - origin)).clamp(0, 1)


def _grey(images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch 1 height width"]:
    if images.shape[1] != 3:
        return images.mean(1, keepdim=True)
    return (images * images.new_tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1, keepdim=True)


def _axis(images: Tensor, size: int) -> Int[Tensor, "1 size"]:
    return torch.arange(size, device=images.device)[None]


def _cut(
    images: Tensor, size: int, side: Float[Tensor, "batch"], place: Float[Tensor, "batch"]
) -> Bool[Tensor, "batch size"]:
    length = (side * size).long()[:, None]
    return _within(_axis(images, size) - (_integer(place, size) - length // 2), length)


def _integer(noise: Float[Tensor, "batch"], count: int) -> Int[Tensor, "batch 1"]:
    return (noise * count).long().clamp(max=count - 1)[:, None]


def _within(position: Int[Tensor, "batch size"], size: int | Int[Tensor, "batch 1"]) -> Bool[Tensor, "batch size"]:
    return (position >= 0) & (position < size)
