r"""Convolve images, with second derivatives that cost what the first ones cost.

Torch differentiates the backward pass of a convolution by convolutions over the batch as channels, which are slow. Here
the second derivatives are two more calls of the same fast kernels. With $y = x * w$ and the backward pass
$\bar x = \bar y *^T w$, $\bar w = x \star \bar y$, a loss of $(\bar x, \bar w)$ with gradients $(v, u)$ has

$$\nabla_{\bar y} = v * w + x * u, \quad \nabla_x = \bar y *^T u, \quad \nabla_w = v \star \bar y.$$

Results and first derivatives are torch's own, bit for bit, but for this: in bfloat16 on a CPU with AMX they are
products of matrices where images are small. Torch's own gradient of the weight takes two to fifteen times as long
there; its result and its gradient of the image take up to twice as long where the second cache cannot hold the weight.
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

_SMALL = 36
"""Pixels of an output up to which the product that is a weight's gradient pays, for every number of channels that was
tried, from 64 to 512."""

_SMALLER = 16
"""Pixels of an output up to which the other two products pay, if the weight is large."""

_LARGE = 2**20
"""Numbers of a large weight: two MiB of bfloat16, more than stays in the second cache from image to image."""


def fits_convolution(layer: nn.Module, x: Tensor) -> bool:
    """Return whether `convolve` serves this layer: two dimensions, numbers for its padding, zeros around the image.

    Where nobody asks for derivatives it does so only if the weight is large enough for a product.
    """
    return (
        isinstance(layer, nn.Conv2d)
        and layer.padding_mode == "zeros"
        and not isinstance(layer.padding, str)
        and x.dim() == 4
        and ((x.requires_grad and torch.is_grad_enabled()) or layer.weight.numel() >= _LARGE)
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
        if self._multiplies(x) and w.numel() >= _LARGE and self._pixels(x, w) <= _SMALLER:
            return product(x, w, stride=self.stride, padding=self.padding)
        return F.conv2d(x, w, None, self.stride, self.padding, self.dilation, self.groups)

    def backward(self, gradient: Tensor, x: Tensor, w: Tensor, *, of_x: bool, of_w: bool) -> tuple[Any, Any]:
        """Return the gradients of x and w, `None` where not wanted; only the shape of a factor that has none counts."""
        multiplies, pixels = self._multiplies(gradient), gradient.shape[2] * gradient.shape[3]
        product_of_w = of_w and multiplies and pixels <= _SMALL
        product_of_x = of_x and multiplies and pixels <= _SMALLER and w.numel() >= _LARGE
        results: list[Any] = [None, None]
        if (of_x and not product_of_x) or (of_w and not product_of_w):
            results[:] = torch.ops.aten.convolution_backward(
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
                (of_x and not product_of_x, of_w and not product_of_w, False),
            )[:2]
        if product_of_x:
            results[0] = product_image_gradient(gradient, w, x.shape[2:], stride=self.stride, padding=self.padding)
        if product_of_w:
            results[1] = product_gradient(gradient, x, w.shape[2:], stride=self.stride, padding=self.padding)
        return results[0], results[1]

    def _multiplies(self, t: Tensor) -> bool:
        """Return whether products of matrices may take the place of torch's kernels."""
        return (
            t.device.type == "cpu"
            and t.dtype == torch.bfloat16
            and self.groups == 1
            and self.dilation == (1, 1)
            and torch.cpu._is_amx_tile_supported()
        )

    def _pixels(self, x: Tensor, w: Tensor) -> int:
        tall, wide = (
            (size + 2 * around - taps) // step + 1
            for size, around, taps, step in zip(x.shape[2:], self.padding, w.shape[2:], self.stride, strict=True)
        )
        return tall * wide


def product(
    x: Float[Tensor, "batch inputs height width"],
    w: Float[Tensor, "outputs inputs rows columns"],
    *,
    stride: tuple[int, int],
    padding: tuple[int, int],
) -> Float[Tensor, "batch outputs tall wide"]:
    """Return a convolution as one product over all pixels of all images, channels last."""
    windows = _windows(x, w.shape[2:], stride, padding)
    y = F.linear(windows.flatten(0, 2).flatten(1), w.permute(0, 2, 3, 1).flatten(1))
    return y.unflatten(0, windows.shape[:3]).permute(0, 3, 1, 2)


def product_image_gradient(
    gradient: Float[Tensor, "batch outputs tall wide"],
    w: Float[Tensor, "outputs inputs rows columns"],
    size: Sequence[int],
    *,
    stride: tuple[int, int],
    padding: tuple[int, int],
) -> Float[Tensor, "batch inputs height width"]:
    """Return the gradient of a convolution's images as one product, whose parts meet where windows overlap.

    They are added up in float32, channels last.
    """
    (rows, columns), (down, right), (height, width) = w.shape[2:], padding, size
    batch, _, tall, wide = gradient.shape
    parts = gradient.permute(0, 2, 3, 1).flatten(0, 2) @ w.permute(0, 2, 3, 1).flatten(1)
    parts = parts.view(batch, tall, wide, rows, columns, -1)
    wider = torch.promote_types(parts.dtype, torch.float32)
    images = parts.new_zeros(batch, height + 2 * down, width + 2 * right, w.shape[1], dtype=wider)
    for row in range(rows):
        for column in range(columns):
            ends = row + stride[0] * (tall - 1) + 1, column + stride[1] * (wide - 1) + 1
            images[:, row : ends[0] : stride[0], column : ends[1] : stride[1]] += parts[:, :, :, row, column]
    images = images[:, down : down + height, right : right + width].to(parts.dtype)
    return images.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)


def product_gradient(
    gradient: Float[Tensor, "batch outputs tall wide"],
    x: Float[Tensor, "batch inputs height width"],
    kernel: Sequence[int],
    *,
    stride: tuple[int, int],
    padding: tuple[int, int],
) -> Float[Tensor, "outputs inputs rows columns"]:
    """Return the gradient of a convolution's weight as one product over all pixels of all images, channels last."""
    patches = _windows(x, kernel, stride, padding).flatten(0, 2).flatten(1)
    found = gradient.permute(1, 0, 2, 3).flatten(1) @ patches
    return found.unflatten(1, (*kernel, -1)).permute(0, 3, 1, 2)


def _windows(
    x: Tensor, kernel: Sequence[int], stride: tuple[int, int], padding: tuple[int, int]
) -> Float[Tensor, "batch tall wide rows columns inputs"]:
    (rows, columns), (down, right) = kernel, padding
    images = F.pad(x.permute(0, 2, 3, 1), (0, 0, right, right, down, down))
    return images.unfold(1, rows, stride[0]).unfold(2, columns, stride[1]).permute(0, 1, 2, 4, 5, 3)


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
