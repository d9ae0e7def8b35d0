"""Define what every builder shares: the call, normalization, activations, norm layers and initial weights."""

import math
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, cast, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from bitquorum import kernels
from bitquorum.interface import InputError, Method


@final
class BatchNorm(nn.BatchNorm2d):
    """Normalize as `nn.BatchNorm2d` does; compiled, in training, also its second derivatives are one pass each."""

    def forward(
        self, input: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch channels height width"]:
        """Return the normalized images; in training by their own statistics, which the running ones follow."""
        if self.training and self.holds_statistics and input.dim() == 4 and input.numel() > input.shape[1]:
            return self._by_batch(input)
        if self._is_frozen() and input.requires_grad and torch.is_grad_enabled():
            return _Frozen.apply(input, super().forward, self._scale())  # type: ignore[return-value]
        return super().forward(input)

    @property
    def holds_statistics(self) -> bool:
        """Whether `kernels.statistics_held` reaches this layer; without running statistics it does not."""
        return self.running_mean is not None and self.momentum is not None

    def _is_frozen(self) -> bool:
        """Return whether the layer is the same affine map for every batch, and nothing in it is trained."""
        fixed = not self.training and self.running_var is not None
        return fixed and not any(parameter.requires_grad for parameter in self.parameters())

    def _scale(self) -> Float[Tensor, "channels 1 1"]:
        scale = torch.rsqrt(self.running_var + self.eps)  # type: ignore[operator]
        return (scale * self.weight if self.affine else scale)[:, None, None]

    def _by_batch(self, x: Tensor) -> Tensor:
        running = cast("tuple[Tensor, Tensor]", (self.running_mean, self.running_var))
        momentum = cast("float", self.momentum)
        fits = self.affine and kernels.fits_normalization(x)
        done = kernels.normalize(x, self.weight, self.bias, near=running[0], eps=self.eps) if fits else None
        with torch.no_grad():
            cast("Tensor", self.num_batches_tracked).add_(1)
        if done is None:
            return kernels.normalize_plain(x, self.weight, self.bias, running=running, momentum=momentum, eps=self.eps)
        y, *own = done
        count = x.numel() // x.shape[1]
        own[1] = own[1] * (count / (count - 1))
        with torch.no_grad():
            for value, new in zip(running, own, strict=True):
                value.lerp_(new, momentum)
        return y


class _Frozen(torch.autograd.Function):
    """Have the gradient of an affine map: one product, where torch sums the gradients of the parameters in any case.

    In half precision the factor is rounded to it, as the gradient is.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Callable[[Tensor], Tensor], scale: Tensor) -> Tensor:
        ctx.save_for_backward(scale)
        return layer(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (scale,) = ctx.saved_tensors
        return grads[0] * scale.to(grads[0].dtype), None, None


ACTIVATIONS: Mapping[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "softplus": nn.Softplus,
}
"""Name -> activation module; all but `relu` are smooth (`softplus` up to rounding)."""

NORMS: Mapping[str, Callable[[int], nn.Module]] = {
    "batch": BatchNorm,
    "group": lambda channels: nn.GroupNorm(math.gcd(8, channels), channels),
    "none": lambda channels: nn.Identity(),
}
"""Name -> norm layer for a number of channels c; `group` has gcd(8, c) groups."""


@dataclass(frozen=True, kw_only=True)
class Network(Method, ABC):
    r"""Build a float network for small images with freshly drawn weights.

    The network is an `nn.Sequential` whose first part is `normalize` and whose last is `classifier`, an
    `nn.Linear`; `network[:-1]` therefore returns the penultimate features. Every activation is a module of
    its own and no module is called twice in a forward pass, so that each can be replaced by its name.

    Weights are drawn from torch's global generator by the rule of He et al., 2015, equation 10
    (https://arxiv.org/abs/1502.01852): normal with variance $2 / n$ for convolutions and $1 / n$ for linear
    layers, which no activation follows, $n$ the number of inputs of one output. The rule is kept for every
    activation. Biases are 0, norm layers start as the plain normalization.

    Examples:
        >>> import torch
        >>> from bitquorum.zoo import SmallResNet
        >>> network = SmallResNet()(classes=10, shape=(3, 32, 32))
        >>> images = torch.rand(2, 3, 32, 32)
        >>> network(images).shape, network[:-1](images).shape
        (torch.Size([2, 10]), torch.Size([2, 64]))
    """

    @property
    def smallest(self) -> int:
        """The least height and width of an image, in pixels."""
        return 1

    @final
    def __call__(
        self,
        *,
        classes: int,
        shape: tuple[int, int, int],
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
    ) -> nn.Sequential:
        """Return a network from images [batch, channels, height, width] in [0, 1] to logits [batch, classes].

        Args:
            classes: The number of classes, at least 2.
            shape: Channels, height and width of an image.
            mean: What `normalize` subtracts from each channel, in units of the image; 0.5 when omitted.
            std: What `normalize` divides each channel by, in units of the image; 0.25 when omitted.

        Raises:
            InputError: if the classes or the shape do not fit, or the constants do not fit the channels.
        """
        check_count("classes", classes, least=2)
        if len(shape) != 3:
            raise InputError(f"expected shape to be (channels, height, width), got {shape}; give three integers")
        for name, size, least in zip(
            ("channels", "height", "width"), shape, (1, self.smallest, self.smallest), strict=True
        ):
            check_count(f"{name} of the images of {type(self).__name__}", size, least=least)
        channels = shape[0]
        mean = (0.5,) * channels if mean is None else mean
        normalize = Normalize(mean, (0.25,) * channels if std is None else std)
        if len(normalize.mean) != channels:
            raise InputError(
                f"expected a mean and a std for each of {channels} channels, got {mean=} and {std=}; "
                "give constants of this data set"
            )
        network = nn.Sequential(OrderedDict(normalize=normalize, **self._parts(classes, shape)))
        _draw_weights(network, unit_norm=getattr(self, "unit_norm", False))
        return network

    @abstractmethod
    def _parts(self, classes: int, shape: tuple[int, int, int]) -> dict[str, nn.Module]:
        """Return the parts after `normalize` in order, the last of them `classifier`."""


@final
class Normalize(nn.Module):
    r"""Shift and scale every channel: $y_c = (x_c - m_c) / s_c$.

    Args:
        mean: $m_c$ of each channel, in units of the image.
        std: $s_c$ of each channel, in units of the image, above 0.

    Raises:
        InputError: if the lengths differ or are 0, a number is not finite or an $s_c$ is not above 0; in the
            forward pass if the images have another number of channels.

    Examples:
        >>> import torch
        >>> Normalize((0.5,), (0.25,))(torch.ones(1, 1, 1, 2))
        tensor([[[[2., 2.]]]])
    """

    mean: Float[Tensor, "channels 1 1"]
    std: Float[Tensor, "channels 1 1"]

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        if not mean or len(mean) != len(std):
            raise InputError(
                f"expected a mean and a std per channel, got {mean=} and {std=}; give tuples of equal length"
            )
        if not (all(map(math.isfinite, (*mean, *std))) and min(std) > 0):
            raise InputError(
                f"expected finite means and finite stds above 0, got {mean=} and {std=}; "
                "give constants in units of images in [0, 1]"
            )
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(values, dtype=torch.get_default_dtype())[:, None, None])

    def forward(
        self, images: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch channels height width"]:
        """Return the normalized images."""
        if images.ndim != 4 or images.shape[1] != len(self.mean):
            raise InputError(
                f"expected images [batch, {len(self.mean)}, height, width], got {list(images.shape)}; "
                "build the network for the shape of these images"
            )
        return (images - self.mean) / self.std

    def extra_repr(self) -> str:
        """Return the number of channels for `repr`."""
        return f"channels={len(self.mean)}"


def convolution(inputs: int, outputs: int, kernel: int, *, stride: int = 1, bias: bool = False) -> nn.Conv2d:
    """Return a convolution that divides height and width by its stride.

    Of odd kernel size the result is rounded up; an even one, whose stride must be even too, is rounded down and looks
    as far to one side as to the other.
    """
    padding = kernel // 2 if kernel % 2 else (kernel - stride) // 2
    return nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=padding, bias=bias)


def check_count(name: str, value: int, *, least: int = 1) -> None:
    """Raise `InputError` unless `value` is an integer of at least `least`."""
    if type(value) is not int or value < least:
        raise InputError(f"expected {name} to be an integer of at least {least}, got {value!r}; give such an integer")


def check_choice(name: str, value: str, choices: Collection[str]) -> None:
    """Raise `InputError` unless `value` is one of `choices`."""
    if value not in tuple(choices):
        raise InputError(f"expected {name} to be one of {', '.join(choices)}, got {value!r}; choose one of these")


def _draw_weights(network: nn.Module, *, unit_norm: bool) -> None:
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            kind = "relu" if isinstance(module, nn.Conv2d) else "linear"
            nn.init.kaiming_normal_(module.weight, nonlinearity=kind)
            if unit_norm:
                weight = module.weight.data
                weight.copy_(nn.functional.normalize(weight.flatten(1)).view_as(weight))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
