r"""Convolve images, with second derivatives that cost what the first ones cost.

Torch differentiates the backward pass of a convolution by convolutions over the batch as channels, which are slow. Here
the second derivatives are two more calls of the same fast kernels. With $y = x * w$ and the backward pass
$\bar x = \bar y *^T w$, $\bar w = x \star \bar y$, a loss of $(\bar x, \bar w)$ with gradients $(v, u)$ has

$$\nabla_{\bar y} = v * w + x * u, \quad \nabla_x = \bar y *^T u, \quad \nabla_w = v \star \bar y.$$

First derivatives are torch's own, bit for bit, but for one: in bfloat16 on a CPU the gradient of the weight is one
product of matrices where that pays. With AMX that is where images are small, for torch's own takes two to fifteen times
as long there; with AVX512_BF16 alone where the convolution has a stride, for one and a half times to twice as long.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from bitquorum.kernels import choice

CHANNEL_BLOCK = 16
"""Channels that oneDNN handles at once; of fewer, channels last, it may misplace a gradient (`memory_format`)."""

_SMALL = 36
"""Pixels of an output up to which the product pays with AMX, for every number of channels tried, from 64 to 512."""

_STRIDED, _CHANNELS = 64, 64
"""Pixels of an output up to which, and channels of an input from which, it pays without AMX where there is a stride."""


def memory_format(module: nn.Module, *, channels_last: bool = True) -> torch.memory_format:
    """Return the memory layout to train a network in: channels last where asked for and safe.

    With AVX2 and channels last, oneDNN's gradient of the weight of a strided 1x1 convolution writes past its memory
    where there are fewer inputs than `CHANNEL_BLOCK`, and ends the process or returns other numbers
    (https://github.com/uxlfoundation/oneDNN/issues/6035). A network that has one is laid out channels first, on every
    device.

    Examples:
        >>> memory_format(nn.Conv2d(64, 128, 1, stride=2)), memory_format(nn.Conv2d(4, 8, 1, stride=2))
        (torch.channels_last, torch.contiguous_format)
    """
    narrow = any(
        isinstance(part, nn.Conv2d)
        and part.kernel_size == (1, 1)
        and max(part.stride) > 1
        and part.in_channels // part.groups < CHANNEL_BLOCK
        for part in module.modules()
    )
    return torch.channels_last if channels_last and not narrow else torch.contiguous_format


def fits_convolution(layer: nn.Module, x: Tensor) -> bool:
    """Return whether `convolve` serves this layer: two dimensions, numbers for its padding, zeros around the image."""
    return (
        isinstance(layer, nn.Conv2d)
        and layer.padding_mode == "zeros"
        and not isinstance(layer.padding, str)
        and x.dim() == 4
        and x.requires_grad
        and torch.is_grad_enabled()
    )


def convolve(
    layer: nn.Conv2d,
    x: Float[Tensor, "batch inputs height width"],
    weight: Float[Tensor, "outputs shares rows columns"],
) -> Float[Tensor, "batch outputs tall wide"]:
    """Return what `layer` makes of `x` with this weight and its own bias; differentiable twice, not more often.

    Autocast is honoured.
    """
    if torch.is_autocast_enabled(x.device.type):
        kind = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(kind), weight.to(kind)
    form = _Form(tuple(layer.stride), tuple(layer.padding), tuple(layer.dilation), layer.groups)  # type: ignore[arg-type]
    # The engine says only of inner nodes whether it will run them: a leaf gets a node before it.
    x, weight = (t.view_as(t) if t.is_leaf else t for t in (x, weight))
    y: Tensor = _Convolution.apply(x, weight, form)  # type: ignore[assignment]
    return y if layer.bias is None else y + layer.bias.to(y.dtype)[:, None, None]


@dataclass(frozen=True)
class _Form:
    """Hold the numbers of a convolution."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        return F.conv2d(x, w, None, self.stride, self.padding, self.dilation, self.groups)

    def backward(self, gradient: Tensor, x: Tensor, w: Tensor, *, of_x: bool, of_w: bool) -> tuple[Any, Any]:
        """Return the gradients of x and w, `None` where not wanted; only the shape of a factor that has none counts."""
        product = of_w and self._takes_product(gradient, x.shape[1])
        results = torch.ops.aten.convolution_backward(
            gradient,
            x,
            w,
            None,
            self.stride,
            self.padding,
            self.dilation,
            False,
            (0, 0),
            self.groups,
            (of_x, of_w and not product, False),
        )
        if product:
            return results[0], product_gradient(gradient, x, w.shape[2:], stride=self.stride, padding=self.padding)
        return results[0], results[1]

    def _takes_product(self, gradient: Tensor, channels: int) -> bool:
        whole = self.groups == 1 and self.dilation == (1, 1)
        if gradient.device.type != "cpu" or gradient.dtype != torch.bfloat16 or not whole:
            return False
        pixels = gradient.shape[2] * gradient.shape[3]
        if torch.cpu._is_amx_tile_supported():
            return pixels <= _SMALL
        strided = max(self.stride) > 1 and channels >= _CHANNELS and pixels <= _STRIDED
        return strided and torch.cpu._is_avx512_bf16_supported()


def product_gradient(
    gradient: Float[Tensor, "batch outputs tall wide"],
    x: Float[Tensor, "batch inputs height width"],
    kernel: Sequence[int],
    *,
    stride: tuple[int, int],
    padding: tuple[int, int],
) -> Float[Tensor, "outputs inputs rows columns"]:
    """Return the gradient of a convolution's weight as one product over all pixels of all images, channels last."""
    (rows, columns), (down, right) = kernel, padding
    images = F.pad(x.permute(0, 2, 3, 1), (0, 0, right, right, down, down))
    windows = images.unfold(1, rows, stride[0]).unfold(2, columns, stride[1])
    patches = windows.permute(0, 1, 2, 4, 5, 3).reshape(-1, rows * columns * x.shape[1])
    product = gradient.permute(1, 0, 2, 3).flatten(1) @ patches
    return product.unflatten(1, (rows, columns, -1)).permute(0, 3, 1, 2)


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, form: _Form) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.form = form
        return form.forward(x, w)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, w = ctx.saved_tensors
        wanted = [
            needed and choice.runs(node)
            for needed, (node, _) in zip(ctx.needs_input_grad[:2], ctx.next_functions[:2], strict=True)
        ]
        of_x, of_w = _Backward.apply(grads[0], x, w, ctx.form, wanted[0], wanted[1])
        return of_x, of_w, None


class _Backward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, gradient: Tensor, x: Tensor, w: Tensor, form: _Form, of_x: bool, of_w: bool
    ) -> tuple[Any, Any]:
        gradient = _as_laid_out(gradient, x)
        ctx.save_for_backward(gradient, x, w)
        ctx.form = form
        ctx.set_materialize_grads(False)
        return form.backward(gradient, x, w, of_x=of_x, of_w=of_w)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        gradient, x, w = ctx.saved_tensors
        form: _Form = ctx.form
        v, u = grads
        of_gradient = of_x = of_w = None
        if v is not None:
            v = _as_laid_out(v, x)
            of_gradient = form.forward(v, w)
            of_w = form.backward(gradient, v, w, of_x=False, of_w=True)[1]
        if u is not None:
            u = _as_laid_out(u, x)
            added = form.forward(x, u)
            of_gradient = added if of_gradient is None else of_gradient + added
            of_x = form.backward(gradient, x, u, of_x=True, of_w=False)[0]
        return of_gradient, of_x, of_w, None, None, None


def _as_laid_out(t: Tensor, x: Tensor) -> Tensor:
    """Return `t` with its channels last in memory where those of the images `x` are."""
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return t.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
