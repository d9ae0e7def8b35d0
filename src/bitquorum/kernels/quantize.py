"""Quantize activations in one pass, forwards and backwards, without a noise tensor.

The three passes are those of the plain quantizer, fused: the forward pass draws and decodes the code, the backward pass
multiplies by the slope of the mean, its own backward pass by slope and curvature. Nothing is kept but the input.
"""

from typing import Any, NamedTuple, no_type_check

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from bitquorum.kernels import choice, layout, mean, noise


class MeanCode(NamedTuple):
    """Name the mean of a quantizer: the law, the largest code, the noise scale and its factor inside the gradient."""

    law: mean.SmoothLawName
    top: int
    scale: float
    width: float = 1.0

    @property
    def wide(self) -> float:
        """The noise scale inside the gradient."""
        return self.scale * self.width


def fits_quantization(x: Tensor, grid: MeanCode) -> bool:
    """Return whether `quantize` serves this batch: compiled code, at least two rows, not too many thresholds."""
    return (
        choice.applies(x, (torch.float32, torch.bfloat16))
        and x.dim() > 1
        and x.shape[0] > 1
        and x.shape[1:].numel() > 1
        and mean.compiles(grid.law, grid.top, grid.wide)
    )


def quantize(
    x: Float[Tensor, "rows *rest"],
    keys: Int[Tensor, "rows"],
    low: Float[Tensor, ""],
    step: Float[Tensor, ""],
    grid: MeanCode,
) -> Float[Tensor, "rows *rest"] | None:
    """Return `low` plus `step` times the drawn code, or `None` where the compiler fails.

    Differentiable twice, not more often, in `x` alone.

    Args:
        x: Values in any range.
        keys: One 64-bit key for each row, of its noise.
        low: Lowest level, without a gradient.
        step: Distance of the levels, without a gradient.
        grid: The rest.
    """
    values = _draw(x.detach(), keys, low, step, grid)
    if values is None or not (x.requires_grad and torch.is_grad_enabled()):
        return values
    return _Quantize.apply(x, values, low, step, grid)  # type: ignore[return-value]


def _draw(x: Tensor, keys: Tensor, low: Tensor, step: Tensor, grid: MeanCode) -> Tensor | None:
    flat, counter = layout.flatten(x, 1), noise.row_counter(x)
    values = choice.call(
        _values,
        noise.key_halves(keys),
        counter,
        flat,
        low,
        step,
        noise.scalar(float(grid.top), x.device),
        noise.scalar(grid.scale, x.device),
        law=grid.law,
    )
    return None if values is None else layout.unflatten(values, x, 1)


class _Quantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, low: Tensor, step: Tensor, grid: MeanCode) -> Tensor:
        ctx.save_for_backward(x, low, step)
        ctx.grid = grid
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _Backward.apply(grads[0], *ctx.saved_tensors, ctx.grid), None, None, None, None  # type: ignore[return-value]


class _Backward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor, low: Tensor, step: Tensor, grid: MeanCode) -> Tensor:
        g = layout.like_layout(g, x)
        ctx.save_for_backward(g, x, low, step)
        ctx.grid = grid
        (result,) = _call(_slope, (x, g), low, step, grid, order=1)
        return result

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, ...]:
        g, x, low, step = ctx.saved_tensors
        to_g, to_x = _call(_slope_and_curvature, (x, g, layout.like_layout(grads[0], x)), low, step, ctx.grid, order=2)
        return to_g, to_x, None, None, None


def _call(
    kernel: Any, tensors: tuple[Tensor, ...], low: Tensor, step: Tensor, grid: MeanCode, *, order: int
) -> list[Tensor]:
    x = tensors[0]
    table, constants = mean.compiled_table(grid.law, grid.top, grid.wide, x.device)
    flats = [layout.flatten(tensor) for tensor in tensors]
    results = choice.call(kernel, *flats, low, step, table, order=order, **constants)
    return [layout.unflatten(result, x) for result in results]


# The functions below are traced by the compiler; type checks at run time would break the trace.


@no_type_check
def _values(
    halves: Tensor, counter: Tensor, x: Tensor, low: Tensor, step: Tensor, top: Tensor, scale: Tensor, *, law: str
) -> Tensor:
    z = (x.float() - low) / step
    code = noise.codes(halves, counter, z, top, scale, law=law, compiled=True)
    return (low + code * step).to(x.dtype)


@no_type_check
def _slope(x: Tensor, g: Tensor, low: Tensor, step: Tensor, table: Tensor, **constants: Any) -> tuple[Tensor]:
    (slope,) = mean.sums((x.float() - low) / step, table, **constants)
    return ((g.float() * slope).to(g.dtype),)


@no_type_check
def _slope_and_curvature(
    x: Tensor, g: Tensor, v: Tensor, low: Tensor, step: Tensor, table: Tensor, **constants: Any
) -> tuple[Tensor, Tensor]:
    slope, curvature = mean.sums((x.float() - low) / step, table, **constants)
    wide = v.float()
    return (wide * slope).to(g.dtype), (wide * g.float() * curvature / step).to(x.dtype)
