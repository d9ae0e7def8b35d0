"""Build networks without skip connections: a linear one, one for digits and the two of EMPIR."""

from dataclasses import dataclass
from typing import final

from torch import nn

from bitquorum.zoo.network import ACTIVATIONS, NORMS, Network, check_choice, check_count, convolution


@final
@dataclass(frozen=True, kw_only=True)
class Linear(Network):
    r"""Build the linear classifier $W (x - m) / s + b$, whose worst case is known in closed form.

    Its penultimate features are the normalized pixels, [batch, channels * height * width].

    Examples:
        >>> sum(p.numel() for p in Linear()(classes=10, shape=(1, 8, 8)).parameters())
        650
    """

    def _parts(self, classes: int, shape: tuple[int, int, int]) -> dict[str, nn.Module]:
        channels, height, width = shape
        return {"flatten": nn.Flatten(), "classifier": nn.Linear(channels * height * width, classes)}


@final
@dataclass(frozen=True, kw_only=True)
class DigitsNet(Network):
    """Build a small network for images of about 8x8 pixels: three 3x3 convolutions of strides 1, 2 and 2.

    Convolutions to w, 2w and 4w channels, each followed by a norm layer and an activation, then the mean over
    the image; the penultimate features are [batch, 4w]. Trains on the 8x8 digits in seconds on one core.

    Args:
        width: Channels w of the first convolution.
        activation: One of `ACTIVATIONS`.
        norm: One of `NORMS`; with `none` the convolutions have biases.

    Raises:
        InputError: if a field is out of range.

    Examples:
        >>> sum(p.numel() for p in DigitsNet(width=16)(classes=10, shape=(1, 8, 8)).parameters())
        24058
    """

    width: int = 16
    activation: str = "relu"
    norm: str = "batch"

    def __post_init__(self) -> None:
        """Check the fields."""
        check_count("width", self.width)
        check_choice("activation", self.activation, ACTIVATIONS)
        check_choice("norm", self.norm, NORMS)

    def _parts(self, classes: int, shape: tuple[int, int, int]) -> dict[str, nn.Module]:
        parts: dict[str, nn.Module] = {}
        inputs, bias = shape[0], self.norm == "none"
        for index, stride in enumerate((1, 2, 2), start=1):
            outputs = self.width * 2 ** (index - 1)
            parts[f"conv{index}"] = convolution(inputs, outputs, 3, stride=stride, bias=bias)
            parts[f"norm{index}"] = NORMS[self.norm](outputs)
            parts[f"activation{index}"] = ACTIVATIONS[self.activation]()
            inputs = outputs
        pooled = {"pool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten()}
        return parts | pooled | {"classifier": nn.Linear(inputs, classes)}


@final
@dataclass(frozen=True, kw_only=True)
class CIFARconv(Network):
    """Build EMPIR's network for CIFAR-10, one full-precision member of its ensemble.

    conv 5x5 to w, max pool 3/2, activation; conv 5x5 to w, activation, average pool 3/2; conv 5x5 to 2w,
    activation, average pool 3/2; linear to 64; linear to the classes. Pools have no padding, so 32 pixels
    become 15, 7 and 3. There are no norm layers, no biases and no activation between the two linear layers.
    The penultimate features are the outputs of the first linear layer, [batch, 64].

    Reference: Sen, Ravindran, Raghunathan, EMPIR, 2020, https://arxiv.org/abs/2004.10162; layers as in
    `make_basic_cifar_cnn` of https://github.com/sancharisen/EMPIR, revision 7cbcbde.

    Deviations: the network returns logits, not probabilities; EMPIR feeds images in [0, 1] without
    normalization, which `mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)` restores; EMPIR starts from weights of
    unit norm per output, which `unit_norm` restores but for the tails that EMPIR cuts in convolutions; the
    features are flattened channel by channel, not pixel by pixel.

    Args:
        width: Channels w; EMPIR has 32.
        activation: One of `ACTIVATIONS`; EMPIR has `relu`.
        unit_norm: Whether the first weights of every output are scaled to unit Euclidean norm, as in EMPIR.

    Raises:
        InputError: if a field is out of range, or in the call for images under 15x15 pixels.

    Examples:
        >>> sum(p.numel() for p in CIFARconv()(classes=10, shape=(3, 32, 32)).parameters())
        116704
    """

    width: int = 32
    activation: str = "relu"
    unit_norm: bool = False

    def __post_init__(self) -> None:
        """Check the fields."""
        check_count("width", self.width)
        check_choice("activation", self.activation, ACTIVATIONS)

    @property
    def smallest(self) -> int:
        """The least height and width of an image, in pixels."""
        return 15

    def _parts(self, classes: int, shape: tuple[int, int, int]) -> dict[str, nn.Module]:
        channels, *sides = shape
        for _ in range(3):
            sides = [(side - 3) // 2 + 1 for side in sides]
        w, activation = self.width, ACTIVATIONS[self.activation]
        return {
            "conv1": convolution(channels, w, 5),
            "pool1": nn.MaxPool2d(3, 2),
            "activation1": activation(),
            "conv2": convolution(w, w, 5),
            "activation2": activation(),
            "pool2": nn.AvgPool2d(3, 2),
            "conv3": convolution(w, 2 * w, 5),
            "activation3": activation(),
            "pool3": nn.AvgPool2d(3, 2),
            "flatten": nn.Flatten(),
            "hidden": nn.Linear(2 * w * sides[0] * sides[1], 64, bias=False),
            "classifier": nn.Linear(64, classes, bias=False),
        }


@final
@dataclass(frozen=True, kw_only=True)
class MNISTconv(Network):
    """Build EMPIR's network for MNIST, one full-precision member of its ensemble.

    conv 8x8 to w, stride 2, activation; conv 6x6 to 2w, stride 2, activation; conv 5x5 to 2w, activation;
    linear to the classes. The first convolution has padding 3, the others none, so 28 pixels become 14, 5 and
    1. There are no norm layers and no biases. The network has one linear layer only: the penultimate features
    are the outputs of the last activation, [batch, 2w] for 28x28 images.

    Reference: Sen, Ravindran, Raghunathan, EMPIR, 2020, https://arxiv.org/abs/2004.10162; layers as in
    `make_basic_cnn` of https://github.com/sancharisen/EMPIR, revision 7cbcbde, with the width of
    `mnist_attack.py`.

    Deviations: those of `CIFARconv`; and images of odd height or width, which the padding named SAME there
    would extend on one side only.

    Args:
        width: Channels w of the first convolution; EMPIR has 64.
        activation: One of `ACTIVATIONS`; EMPIR has `relu`.
        unit_norm: Whether the first weights of every output are scaled to unit Euclidean norm, as in EMPIR.

    Raises:
        InputError: if a field is out of range, or in the call for images under 28x28 pixels.

    Examples:
        >>> sum(p.numel() for p in MNISTconv()(classes=10, shape=(1, 28, 28)).parameters())
        709888
    """

    width: int = 64
    activation: str = "relu"
    unit_norm: bool = False

    def __post_init__(self) -> None:
        """Check the fields."""
        check_count("width", self.width)
        check_choice("activation", self.activation, ACTIVATIONS)

    @property
    def smallest(self) -> int:
        """The least height and width of an image, in pixels."""
        return 28

    def _parts(self, classes: int, shape: tuple[int, int, int]) -> dict[str, nn.Module]:
        channels, *sides = shape
        height, width = ((side // 2 - 6) // 2 + 1 - 4 for side in sides)
        w, activation = self.width, ACTIVATIONS[self.activation]
        return {
            "conv1": nn.Conv2d(channels, w, 8, stride=2, padding=3, bias=False),
            "activation1": activation(),
            "conv2": nn.Conv2d(w, 2 * w, 6, stride=2, bias=False),
            "activation2": activation(),
            "conv3": nn.Conv2d(2 * w, 2 * w, 5, bias=False),
            "activation3": activation(),
            "flatten": nn.Flatten(),
            "classifier": nn.Linear(2 * w * height * width, classes, bias=False),
        }
