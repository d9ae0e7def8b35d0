"""Quantize activations in one pass, forwards and backwards, without a noise tensor.

The three passes are those of the plain quantizer, fused: the forward pass draws and decodes the code (or rounds to the
nearest one, or decodes the mean code, for copies without noise), the backward pass multiplies by the slope of the mean,
its own backward pass by slope and curvature. Nothing is kept but the input and, where the range is learned, the result.
"""

from typing import Any, NamedTuple, no_type_check

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import softplus

from bitquorum.kernels import choice, layout, mean, noise


class Noise(NamedTuple):
    """Name the noise of a draw: the law and its scale in steps."""

    law: noise.LawName
    scale: float


class MeanCode(NamedTuple):
    """Name the mean that lends its derivatives: the law, the largest code and the noise scale; a clip has no scale."""

    law: mean.MeanName
    top: int
    scale: float = 1.0


def fits_quantization(x: Tensor, grid: MeanCode) -> bool:
    """Return whether `quantize` serves this batch: compiled code, at least two rows, not too many thresholds."""
    return (
        choice.applies(x, (torch.float32, torch.bfloat16))
        and x.dim() > 1
        and x.shape[0] > 1
        and x.shape[1:].numel() > 1
        and mean.compiles(grid.law, grid.top, grid.scale)
    )


def fits_expectation(x: Tensor, grid: MeanCode) -> bool:
    """Return whether `expect` serves this batch: smooth rounding, or logistic noise with not too many thresholds."""
    known = grid.law == "smooth-rounding" or (grid.law == "logistic" and grid.top <= mean.UNROLLED)
    return known and fits_quantization(x, grid)


def quantize(
    x: Float[Tensor, "rows *rest"],
    keys: Int[Tensor, "rows"],
    low: Float[Tensor, ""],
    step: Float[Tensor, ""],
    drawn: Noise,
    grid: MeanCode,
) -> Float[Tensor, "rows *rest"] | None:
    r"""Return `low` plus `step` times the drawn code, or `None` where the compiler fails.

    Differentiable twice in `x` and once in `low` and `step`, whose gradients also follow the first ones of `x`, as a
    penalty of an input gradient needs it: with gradient g of the values, drawn codes k and $z = (x - l) / \Delta$,

    $$\nabla_x = g M'(z), \quad \nabla_l = \sum (g - \nabla_x), \quad \nabla_\Delta = \sum (g k - \nabla_x z).$$

    Args:
        x: Values in any range.
        keys: One 64-bit key for each row, of its noise.
        low: Lowest level.
        step: Distance of the levels.
        drawn: The noise of the draw.
        grid: The mean M, of the same noise or of another, and the largest code.
    """
    return _attach(_draw(x.detach(), keys, low.detach(), step.detach(), drawn, grid.top), x, low, step, grid)


def round_nearest(
    x: Float[Tensor, "rows *rest"], low: Float[Tensor, ""], step: Float[Tensor, ""], grid: MeanCode
) -> Float[Tensor, "rows *rest"] | None:
    """Return `low` plus `step` times the nearest code, or `None` where the compiler fails.

    Differentiable as `quantize` is; arguments are those of `quantize`.
    """
    top = noise.scalar(float(grid.top), x.device)
    values = choice.call(_nearest_values, layout.flatten(x.detach()), low.detach(), step.detach(), top, exact=True)
    return _attach(None if values is None else layout.unflatten(values, x), x, low, step, grid)


def expect(
    x: Float[Tensor, "rows *rest"], low: Float[Tensor, ""], step: Float[Tensor, ""], grid: MeanCode
) -> Float[Tensor, "rows *rest"] | None:
    """Return `low` plus `step` times the mean code, or `None` where the compiler fails.

    Differentiable as `quantize` is, with the mean code in place of the drawn one; arguments are those of `quantize`,
    with a law of `fits_expectation`.
    """
    values = choice.call(
        _mean_values,
        layout.flatten(x.detach()),
        low.detach(),
        step.detach(),
        noise.scalar(grid.scale, x.device),
        law=grid.law,
        top=grid.top,
    )
    return _attach(None if values is None else layout.unflatten(values, x), x, low, step, grid)


def _attach(values: Tensor | None, x: Tensor, low: Tensor, step: Tensor, grid: MeanCode) -> Tensor | None:
    """Return the values with the derivatives of the mean."""
    if values is None or not (torch.is_grad_enabled() and any(t.requires_grad for t in (x, low, step))):
        return values
    low, step = (t.view_as(t) if t.is_leaf and t.requires_grad else t for t in (low, step))  # for `choice.runs`
    return _Quantize.apply(x, values, low, step, grid)  # type: ignore[return-value]


def _draw(x: Tensor, keys: Tensor, low: Tensor, step: Tensor, drawn: Noise, top: int) -> Tensor | None:
    flat, counter = layout.flatten(x, 1), noise.row_counter(x)
    terms = noise.edge_terms(drawn.law, drawn.scale)
    values = choice.call(
        _values,
        noise.key_halves(keys),
        counter.view(torch.float32),
        flat,
        low,
        step,
        noise.scalar(float(top), x.device),
        noise.scalar(drawn.scale, x.device),
        *(() if terms is None else (noise.numbers(terms, x.device),)),
        exact=True,
        law=drawn.law,
    )
    return None if values is None else layout.unflatten(values, x, 1)


class _Quantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, low: Tensor, step: Tensor, grid: MeanCode) -> Tensor:
        learned = low.requires_grad or step.requires_grad
        ctx.save_for_backward(x, low, step, *((values,) if learned else ()))
        ctx.grid = grid
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, low, step, *values = ctx.saved_tensors
        if not any(choice.runs(node) for node, _ in ctx.next_functions[2:4]):
            values = []
        of_x, of_low, of_step = _Backward.apply(grads[0], x, low, step, *(values or [None]), ctx.grid)
        return of_x, None, of_low, of_step, None


class _Backward(torch.autograd.Function):
    """Return the gradient of x and, given the values, those of the range, which have no derivatives of their own."""

    @staticmethod
    def forward(
        ctx: Any, g: Tensor, x: Tensor, low: Tensor, step: Tensor, values: Tensor | None, grid: MeanCode
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        g = layout.like_layout(g, x)
        ctx.save_for_backward(g, x, low, step)
        ctx.grid = grid
        ctx.set_materialize_grads(False)
        if values is None:
            (of_x,) = _call(_slope, (x, g), low, step, grid, order=1)
            return layout.unflatten(of_x, x), None, None
        of_x, of_low, of_step = _call(_slope_and_range, (x, g, layout.like_layout(values, x)), low, step, grid, order=1)
        return layout.unflatten(of_x, x), of_low, of_step / step

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, v: Tensor | None, *of_range: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        if any(grad is not None for grad in of_range):
            raise NotImplementedError("the gradient of a quantizer's range is not differentiable in compiled code")
        if v is None:
            return None, None, None, None, None, None
        g, x, low, step = ctx.saved_tensors
        results = _call(_slope_and_curvature, (x, g, layout.like_layout(v, x)), low, step, ctx.grid, order=2)
        to_g, to_x = (layout.unflatten(result, x) for result in results)
        if not any(ctx.needs_input_grad[2:4]):
            return to_g, to_x, None, None, None, None
        moved = choice.compute(_moments, layout.flatten(to_x), layout.flatten(x), low)
        return to_g, to_x, -moved[0], -moved[1] / step, None, None


def _call(
    kernel: Any, tensors: tuple[Tensor, ...], low: Tensor, step: Tensor, grid: MeanCode, *, order: int
) -> tuple[Tensor, ...]:
    table, constants = mean.compiled_table(grid.law, grid.top, grid.scale, tensors[0].device)
    flats = [layout.flatten(tensor) for tensor in tensors]
    return choice.compute(kernel, *flats, low, step, table, order=order, **constants)


# The functions below are traced by the compiler; type checks at run time would break the trace. A draw divides by the
# step, so that a value on a threshold stays there, and so does a clip; a smooth slope may multiply, which is faster.


@no_type_check
def _values(
    halves: Tensor,
    counter: Tensor,
    x: Tensor,
    low: Tensor,
    step: Tensor,
    top: Tensor,
    scale: Tensor,
    terms: Tensor | None = None,
    *,
    law: str,
) -> Tensor:
    z = (x.float() - low) / step
    code = noise.codes(halves, counter, z, top, scale, terms, law=law, compiled=True)
    return (low + code * step).to(x.dtype)


@no_type_check
def _nearest_values(x: Tensor, low: Tensor, step: Tensor, top: Tensor) -> Tensor:
    code = ((x.float() - low) / step).clamp(min=0).clamp(max=top).round()
    return (low + code * step).to(x.dtype)


@no_type_check
def _mean_values(x: Tensor, low: Tensor, step: Tensor, scale: Tensor, *, law: str, top: int) -> Tensor:
    z = (x.float() - low) * (1 / step)
    if law == "smooth-rounding":
        code = scale * (softplus(z / scale) - softplus((z - top) / scale))
    else:
        rate = 1 / scale
        code = sum(torch.sigmoid((z - (k + 0.5)) * rate) for k in range(top))
    return (low + code * step).to(x.dtype)


@no_type_check
def _slope(x: Tensor, g: Tensor, low: Tensor, step: Tensor, table: Tensor, **constants: Any) -> tuple[Tensor]:
    (slope,) = mean.sums(_steps(x.float() - low, step, constants["law"]), table, **constants)
    return ((g.float() * slope).to(g.dtype),)


@no_type_check
def _slope_and_range(
    x: Tensor, g: Tensor, values: Tensor, low: Tensor, step: Tensor, table: Tensor, **constants: Any
) -> tuple[Tensor, Tensor, Tensor]:
    over, wide = x.float() - low, g.float()
    (slope,) = mean.sums(_steps(over, step, constants["law"]), table, **constants)
    of_x = wide * slope
    return of_x.to(g.dtype), (wide - of_x).sum(), (wide * (values.float() - low) - of_x * over).sum()


@no_type_check
def _slope_and_curvature(
    x: Tensor, g: Tensor, v: Tensor, low: Tensor, step: Tensor, table: Tensor, **constants: Any
) -> tuple[Tensor, Tensor]:
    slope, curvature = mean.sums(_steps(x.float() - low, step, constants["law"]), table, **constants)
    wide = v.float()
    return (wide * slope).to(g.dtype), (wide * g.float() * curvature * (1 / step)).to(x.dtype)


@no_type_check
def _steps(over: Tensor, step: Tensor, law: str) -> Tensor:
    return over / step if law == "clip" else over * (1 / step)


@no_type_check
def _moments(to_x: Tensor, x: Tensor, low: Tensor) -> tuple[Tensor, Tensor]:
    wide = to_x.float()
    return wide.sum(), (wide * (x.float() - low)).sum()
