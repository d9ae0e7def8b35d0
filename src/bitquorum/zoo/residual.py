"""Build residual networks for small images."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import final

from torch import nn

from bitquorum.interface import InputError
from bitquorum.zoo.blocks import NORMED, BasicBlock, PreActBlock
from bitquorum.zoo.network import ACTIVATIONS, NORMS, Network, check_choice, check_count, convolution


@final
@dataclass(frozen=True, kw_only=True)
class SmallResNet(Network):
    """Build a residual network of seven 3x3 convolutions or more: a stem and three stages of `BasicBlock`s.

    The stages have strides 1, 2, 2; shortcuts are `PadShortcut`s, so there is no eighth convolution; then the
    mean over the image. The penultimate features are [batch, widths[2]]. It equals `ResNetCifar(depth=8)` but
    for its defaults and the free widths.

    Reference: the family of He et al., 2015, https://arxiv.org/abs/1512.03385, section 4.2, at depth 8.
    Deviations: a smooth activation by default, for input-gradient penalties need second derivatives
    (Rodríguez-Muñoz, Wang and Torralba, 2024, https://arxiv.org/abs/2409.20139); `stem_stride`, `stem_kernel` and
    `aligned` are ours.

    Args:
        widths: Channels of the three stages, never falling.
        activation: One of `ACTIVATIONS`.
        norm: One of `NORMS`; with `none` the convolutions have biases.
        stem_stride: Stride of the stem, `None` for 1. At 2 twice as wide a network has as many multiply-accumulates
            and half as many activations.
        blocks: Blocks of each stage, `None` for 1; with n of them there are 6n + 1 convolutions.
        stem_kernel: Side of the stem's kernel in pixels, `None` for 3; even only if `stem_stride` is.
        aligned: Whether every stage of stride 2 looks as far to one side as to the other: the kernel of its strided
            convolution has 4x4 pixels, and its shortcut takes the mean of the four pixels of which `PadShortcut` drops
            three.

    Raises:
        InputError: if a field is out of range, or an even kernel has an odd stride.

    Examples:
        >>> sum(p.numel() for p in SmallResNet()(classes=10, shape=(3, 32, 32)).parameters())
        75290
    """

    widths: tuple[int, int, int] = (16, 32, 64)
    activation: str = "gelu"
    norm: str = "batch"
    stem_stride: int | None = None
    blocks: int | None = None
    stem_kernel: int | None = None
    aligned: bool | None = None

    def __post_init__(self) -> None:
        """Check the fields."""
        if not isinstance(self.widths, tuple) or len(self.widths) != 3:
            raise InputError(f"expected a tuple of three widths, one per stage, got {self.widths}; give three integers")
        least = 1
        for index, width in enumerate(self.widths):
            check_count(f"widths[{index}]", width, least=least)
            least = width
        check_choice("activation", self.activation, ACTIVATIONS)
        check_choice("norm", self.norm, NORMS)
        for name in ("stem_stride", "blocks", "stem_kernel"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name))
        kernel, stride = self.stem_kernel or 3, self.stem_stride or 1
        if kernel % 2 == 0 and (stride % 2 or kernel < stride):
            raise InputError(
                f"expected an even stem_kernel only beside an even stem_stride that is no larger, got {kernel} and "
                f"{stride}; give an odd kernel, or a stride of 2"
            )

    @property
    def smallest(self) -> int:
        """The least height and width of an image, in pixels; kernels of even size round a side down."""
        stride, least = self.stem_stride or 1, 4 if self.aligned else 1
        return least * stride if (self.stem_kernel or 3) % 2 == 0 else (least - 1) * stride + 1

    def _parts(self, classes: int, shape: tuple[int, int, int]) -> dict[str, nn.Module]:
        return _basic(
            shape[0],
            self.widths,
            classes,
            blocks=self.blocks or 1,
            activation=self.activation,
            norm=self.norm,
            stem_stride=self.stem_stride or 1,
            stem_kernel=self.stem_kernel or 3,
            aligned=bool(self.aligned),
        )


@final
@dataclass(frozen=True, kw_only=True)
class ResNetCifar(Network):
    """Build the residual network for CIFAR-10 of depth 6n + 2: a stem and three stages of n `BasicBlock`s.

    The stages have w, 2w and 4w channels and strides 1, 2, 2; shortcuts are `PadShortcut`s (option A, without
    weights); then the mean over the image. The penultimate features are [batch, 4w]. At w = 16 and 10
    classes, depths 20, 32, 44, 56 and 110 have 0.27, 0.46, 0.66, 0.85 and 1.7 million parameters, as in table
    6 of the paper.

    Reference: He et al., 2015, https://arxiv.org/abs/1512.03385, section 4.2. Deviation: none known in the
    network but the normalization of the input, by channel constants in place of the mean of each pixel.

    Args:
        depth: Number of layers with weights, 6n + 2: 8, 14, 20, ...
        width: Channels w of the first stage.
        activation: One of `ACTIVATIONS`.
        norm: `batch` or `group`.

    Raises:
        InputError: if a field is out of range.

    Examples:
        >>> sum(p.numel() for p in ResNetCifar(depth=20)(classes=10, shape=(3, 32, 32)).parameters())
        269722
    """

    depth: int = 20
    width: int = 16
    activation: str = "relu"
    norm: str = "batch"

    def __post_init__(self) -> None:
        """Check the fields."""
        _check_depth(self.depth, 2)
        _check_style(self.width, self.activation, self.norm)

    def _parts(self, classes: int, shape: tuple[int, int, int]) -> dict[str, nn.Module]:
        widths, blocks = _doubling(self.width, 3), self.depth // 6
        return _basic(shape[0], widths, classes, blocks=blocks, activation=self.activation, norm=self.norm)


@final
@dataclass(frozen=True, kw_only=True)
class ResNet18(Network):
    """Build the residual network of depth 18 for small images: a stem and four stages of two `BasicBlock`s.

    The stages have w, 2w, 4w and 8w channels and strides 1, 2, 2, 2; shortcuts between stages are 1x1
    convolutions with a norm layer (option B); then the mean over the image. The penultimate features are
    [batch, 8w].

    Reference: He et al., 2015, https://arxiv.org/abs/1512.03385, table 1. Deviation: for small images the
    stem is a 3x3 convolution of stride 1 without max pool, as usual for CIFAR-10.

    Args:
        width: Channels w of the first stage.
        activation: One of `ACTIVATIONS`.
        norm: `batch` or `group`.

    Raises:
        InputError: if a field is out of range.

    Examples:
        >>> import torch
        >>> with torch.device("meta"):
        ...     network = ResNet18()(classes=10, shape=(3, 32, 32))
        >>> sum(p.numel() for p in network.parameters())
        11173962
    """

    width: int = 64
    activation: str = "relu"
    norm: str = "batch"

    def __post_init__(self) -> None:
        """Check the fields."""
        _check_style(self.width, self.activation, self.norm)

    def _parts(self, classes: int, shape: tuple[int, int, int]) -> dict[str, nn.Module]:
        widths = _doubling(self.width, 4)
        return _basic(shape[0], widths, classes, blocks=2, activation=self.activation, norm=self.norm, project=True)


@final
@dataclass(frozen=True, kw_only=True)
class PreActResNet18(Network):
    """Build the pre-activation residual network of depth 18: a stem and four stages of two `PreActBlock`s.

    The stages have w, 2w, 4w and 8w channels and strides 1, 2, 2, 2; then a norm layer, an activation and the
    mean over the image. The penultimate features are [batch, 8w].

    Reference: He et al., 2016, https://arxiv.org/abs/1603.05027. Deviation: the stem is a 3x3 convolution of
    stride 1 without max pool. Some implementations leave out the norm layer after the last stage and have
    1024 parameters fewer.

    Args:
        width: Channels w of the stem and the first stage.
        activation: One of `ACTIVATIONS`.
        norm: `batch` or `group`.

    Raises:
        InputError: if a field is out of range.

    Examples:
        >>> import torch
        >>> with torch.device("meta"):
        ...     network = PreActResNet18()(classes=10, shape=(3, 32, 32))
        >>> sum(p.numel() for p in network.parameters())
        11172170
    """

    width: int = 64
    activation: str = "relu"
    norm: str = "batch"

    def __post_init__(self) -> None:
        """Check the fields."""
        _check_style(self.width, self.activation, self.norm)

    def _parts(self, classes: int, shape: tuple[int, int, int]) -> dict[str, nn.Module]:
        widths = (self.width, *_doubling(self.width, 4))
        return _preact(shape[0], widths, classes, blocks=2, activation=self.activation, norm=self.norm)


@final
@dataclass(frozen=True, kw_only=True)
class WideResNet(Network):
    """Build the wide residual network WRN-d-k, of depth d = 6n + 4: three stages of n `PreActBlock`s.

    The stem has 16 channels, the stages 16k, 32k and 64k and strides 1, 2, 2; then a norm layer, an
    activation and the mean over the image. The penultimate features are [batch, 64k]. There is no dropout.

    Reference: Zagoruyko and Komodakis, 2016, https://arxiv.org/abs/1605.07146, table 1.

    Args:
        depth: Number of convolutions, 6n + 4: 10, 16, 22, 28, ...; counted as in the paper.
        width: The factor k.
        activation: One of `ACTIVATIONS`.
        norm: `batch` or `group`.

    Raises:
        InputError: if a field is out of range.

    Examples:
        >>> import torch
        >>> with torch.device("meta"):
        ...     network = WideResNet(depth=28, width=10)(classes=10, shape=(3, 32, 32))
        >>> sum(p.numel() for p in network.parameters())
        36479194
    """

    depth: int = 28
    width: int = 10
    activation: str = "relu"
    norm: str = "batch"

    def __post_init__(self) -> None:
        """Check the fields."""
        _check_depth(self.depth, 4)
        _check_style(self.width, self.activation, self.norm)

    def _parts(self, classes: int, shape: tuple[int, int, int]) -> dict[str, nn.Module]:
        widths, blocks = (16, *_doubling(16 * self.width, 3)), self.depth // 6
        return _preact(shape[0], widths, classes, blocks=blocks, activation=self.activation, norm=self.norm)


def _doubling(width: int, stages: int) -> tuple[int, ...]:
    return tuple(width * 2**stage for stage in range(stages))


def _check_depth(depth: int, rest: int) -> None:
    check_count("depth", depth, least=6 + rest)
    if (depth - rest) % 6:
        below = depth - (depth - rest) % 6
        raise InputError(f"expected depth to be 6n + {rest}, got {depth}; choose {below} or {below + 6}")


def _check_style(width: int, activation: str, norm: str) -> None:
    check_count("width", width)
    check_choice("activation", activation, ACTIVATIONS)
    check_choice("norm", norm, NORMED)


def _basic(
    channels: int,
    widths: Sequence[int],
    classes: int,
    *,
    blocks: int,
    activation: str,
    norm: str,
    project: bool = False,
    stem_stride: int = 1,
    stem_kernel: int = 3,
    aligned: bool = False,
) -> dict[str, nn.Module]:
    """Return a stem as wide as the first stage, stages of `BasicBlock`s and the end."""
    block = partial(BasicBlock, activation=activation, norm=norm, project=project, aligned=aligned)
    stem = {
        "conv": convolution(channels, widths[0], stem_kernel, stride=stem_stride, bias=norm == "none"),
        "norm": NORMS[norm](widths[0]),
        "activation": ACTIVATIONS[activation](),
    }
    return stem | _stages(block, (widths[0], *widths), blocks) | _end(widths[-1], classes)


def _preact(
    channels: int, widths: Sequence[int], classes: int, *, blocks: int, activation: str, norm: str
) -> dict[str, nn.Module]:
    """Return a stem of `widths[0]` channels, stages of `PreActBlock`s as wide as the others, and the end."""
    block = partial(PreActBlock, activation=activation, norm=norm)
    stem = {"conv": convolution(channels, widths[0], 3)}
    last = {"norm": NORMS[norm](widths[-1]), "activation": ACTIVATIONS[activation]()}
    return stem | _stages(block, widths, blocks) | last | _end(widths[-1], classes)


def _stages(block: Callable[..., nn.Module], widths: Sequence[int], blocks: int) -> dict[str, nn.Module]:
    """Return a stage for each pair of neighbours in `widths`; all but the first begin with stride 2."""
    stages: dict[str, nn.Module] = {}
    for index, (inputs, outputs) in enumerate(pairwise(widths), start=1):
        first = block(inputs, outputs, stride=1 if index == 1 else 2)
        stages[f"stage{index}"] = nn.Sequential(first, *(block(outputs, outputs, stride=1) for _ in range(blocks - 1)))
    return stages


def _end(features: int, classes: int) -> dict[str, nn.Module]:
    return {
        "pool": nn.AdaptiveAvgPool2d(1),
        "flatten": nn.Flatten(),
        "classifier": nn.Linear(features, classes),
    }
