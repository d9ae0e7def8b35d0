"""Define the two residual blocks: activation after the sum, or before each convolution."""

from typing import final

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from bitquorum import kernels
from bitquorum.zoo.network import ACTIVATIONS, NORMS, check_choice, check_count, convolution

NORMED = tuple(name for name in NORMS if name != "none")
"""Names of the norm layers that normalize, for networks that do not train without."""


@final
class PadShortcut(nn.Module):
    """Take every stride-th pixel and append channels of zeros, without weights.

    Reference: He et al., 2015, https://arxiv.org/abs/1512.03385, section 4.2, shortcut A.

    Args:
        extra: The number of channels to append.
        stride: The step in both directions, in pixels.

    Examples:
        >>> import torch
        >>> PadShortcut(extra=2, stride=2)(torch.ones(1, 1, 3, 3)).sum(dim=(2, 3))
        tensor([[4., 0., 0.]])
    """

    def __init__(self, *, extra: int, stride: int) -> None:
        super().__init__()
        check_count("extra", extra, least=0)
        check_count("stride", stride)
        self.extra, self.stride = extra, stride

    def forward(self, x: Float[Tensor, "batch inputs height width"]) -> Float[Tensor, "batch outputs rows columns"]:
        """Return the image with fewer pixels and more channels."""
        taken = functional.avg_pool2d(x, 1, self.stride)  # a slice would give gradients in another memory layout
        return functional.pad(taken, (0, 0, 0, 0, 0, self.extra))

    def extra_repr(self) -> str:
        """Return the fields for `repr`."""
        return f"extra={self.extra}, stride={self.stride}"


@final
class BasicBlock(nn.Module):
    r"""Add two convolutions to their input: $y = a(N_2 C_2\, a(N_1 C_1 x) + S x)$.

    $C$ are 3x3 convolutions, $N$ norm layers, $a$ activations (two modules), $S$ the shortcut: the identity
    where shapes agree; otherwise `PadShortcut`, or with `project` a 1x1 convolution with a norm layer.

    Reference: He et al., 2015, https://arxiv.org/abs/1512.03385, figure 2.

    Args:
        inputs: Channels of the input.
        outputs: Channels of the output, no fewer than `inputs` unless `project`.
        stride: Stride of the first convolution.
        activation: One of `ACTIVATIONS`.
        norm: One of `NORMS`; with `none` the convolutions have biases.
        project: Whether the shortcut has weights where shapes differ.
        aligned: Whether, at stride 2, the first kernel has 4x4 pixels and the shortcut without weights takes means in
            place of every second pixel. Not in the reference.

    Raises:
        InputError: if channels fall without `project`, or a name is unknown.

    Examples:
        >>> import torch
        >>> block = BasicBlock(4, 8, stride=2, activation="gelu", norm="group")
        >>> block(torch.rand(1, 4, 6, 6)).shape
        torch.Size([1, 8, 3, 3])
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        stride: int,
        activation: str,
        norm: str,
        project: bool = False,
        aligned: bool = False,
    ) -> None:
        super().__init__()
        check_choice("activation", activation, ACTIVATIONS)
        check_choice("norm", norm, NORMS)
        bias = norm == "none"
        aligned = aligned and stride == 2
        self.conv1 = convolution(inputs, outputs, 4 if aligned else 3, stride=stride, bias=bias)
        self.norm1 = NORMS[norm](outputs)
        self.activation1 = ACTIVATIONS[activation]()
        self.conv2 = convolution(outputs, outputs, 3, bias=bias)
        self.norm2 = NORMS[norm](outputs)
        if (inputs, stride) == (outputs, 1):
            self.shortcut: nn.Module = nn.Identity()
        elif project:
            self.shortcut = nn.Sequential(*_pointwise(inputs, outputs, stride, bias=bias), NORMS[norm](outputs))
        elif aligned:
            self.shortcut = nn.Sequential(nn.AvgPool2d(stride), PadShortcut(extra=outputs - inputs, stride=1))
        else:
            self.shortcut = PadShortcut(extra=outputs - inputs, stride=stride)
        self.activation2 = ACTIVATIONS[activation]()

    def forward(self, x: Float[Tensor, "batch inputs height width"]) -> Float[Tensor, "batch outputs rows columns"]:
        """Return the activated sum of the two paths."""
        hidden = self.activation1(self.norm1(self.conv1(x)))
        return self.activation2(self.norm2(self.conv2(hidden)) + self.shortcut(x))


def _pointwise(inputs: int, outputs: int, stride: int, *, bias: bool = False) -> list[nn.Module]:
    """Return the layers of a 1x1 convolution.

    Of few channels it takes its pixels first, so that the network can be trained channels last
    (`kernels.memory_format`).
    """
    if stride == 1 or inputs >= kernels.CHANNEL_BLOCK:
        return [convolution(inputs, outputs, 1, stride=stride, bias=bias)]
    return [PadShortcut(extra=0, stride=stride), convolution(inputs, outputs, 1, bias=bias)]


@final
class PreActBlock(nn.Module):
    r"""Add two convolutions to their input, activations first: $y = C_2\, a N_2\, C_1 h + s$, $h = a N_1 x$.

    $C$ are 3x3 convolutions, $N$ norm layers, $a$ activations (two modules). $s$ is $x$ where shapes agree,
    otherwise a 1x1 convolution of $h$ without a norm layer.

    Reference: He et al., 2016, https://arxiv.org/abs/1603.05027, figure 4e.

    Args:
        inputs: Channels of the input.
        outputs: Channels of the output.
        stride: Stride of the first convolution.
        activation: One of `ACTIVATIONS`.
        norm: One of `NORMS` but `none`.

    Raises:
        InputError: if a name is unknown.

    Examples:
        >>> import torch
        >>> block = PreActBlock(4, 8, stride=2, activation="gelu", norm="group")
        >>> block(torch.rand(1, 4, 6, 6)).shape
        torch.Size([1, 8, 3, 3])
    """

    def __init__(self, inputs: int, outputs: int, *, stride: int, activation: str, norm: str) -> None:
        super().__init__()
        check_choice("activation", activation, ACTIVATIONS)
        check_choice("norm", norm, NORMED)
        self.norm1 = NORMS[norm](inputs)
        self.activation1 = ACTIVATIONS[activation]()
        self.conv1 = convolution(inputs, outputs, 3, stride=stride)
        self.norm2 = NORMS[norm](outputs)
        self.activation2 = ACTIVATIONS[activation]()
        self.conv2 = convolution(outputs, outputs, 3)
        self.shortcut = None
        if (inputs, stride) != (outputs, 1):
            taken = _pointwise(inputs, outputs, stride)
            self.shortcut = taken[0] if len(taken) == 1 else nn.Sequential(*taken)

    def forward(self, x: Float[Tensor, "batch inputs height width"]) -> Float[Tensor, "batch outputs rows columns"]:
        """Return the sum of the two paths."""
        hidden = self.activation1(self.norm1(x))
        branch = self.conv2(self.activation2(self.norm2(self.conv1(hidden))))
        return branch + (x if self.shortcut is None else self.shortcut(hidden))
