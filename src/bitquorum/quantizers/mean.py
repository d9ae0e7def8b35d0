r"""Compute the mean code of a dithered quantizer, its slope and its curvature, and attach them as gradients.

The sums run over all thresholds, or over a window that holds every threshold nearer than the law's reach: the rest
contribute less than 1e-7 of a step.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from bitquorum.quantizers.laws import Law, Logistic, SmoothLaw

_BLOCK = 1 << 16  # elements summed at once on a CPU, so that the scratch tensors stay in the cache


def mean_code(
    z: Float[Tensor, "*shape"], top: int, law: Law, scale: Tensor | float
) -> Float[Tensor, "*shape"]:
    """Return $M(z)$ by differentiable operations: any order, also with respect to `scale`. Shapes are kept."""
    half = _window(law, scale)
    if 2 * half + 1 >= top:
        return torch.stack([law.cdf(z - k - 0.5, scale) for k in range(top)]).sum(0)
    anchor = z.detach().floor().clamp(-half - 1, top + half)
    total = (anchor - half).clamp(0, top)
    for offset in range(-half, half + 1):
        k = anchor + offset
        total = total + law.cdf(z - k - 0.5, scale) * ((k >= 0) & (k < top))
    return total


def slope(z: Float[Tensor, "*shape"], top: int, law: SmoothLaw, scale: float) -> Float[Tensor, "*shape"]:
    """Return $M'(z)$, without a graph."""
    if _ratios_fit(z, top, law, scale):
        return _by_blocks(z, lambda part: _logistic_slope(part, top, scale))
    return _by_blocks(z, lambda part: _sum_over_thresholds(part, top, law, scale, law.pdf))


def slope_and_curvature(
    z: Float[Tensor, "*shape"], top: int, law: SmoothLaw, scale: float
) -> tuple[Float[Tensor, "*shape"], Float[Tensor, "*shape"]]:
    """Return $M'(z)$ and $M''(z)$, without a graph."""
    if _ratios_fit(z, top, law, scale):
        both = _by_blocks(z, lambda part: _logistic_slope_and_curvature(part, top, scale))
    else:
        both = _by_blocks(
            z,
            lambda part: torch.stack(
                [_sum_over_thresholds(part, top, law, scale, f) for f in (law.pdf, law.pdf_slope)]
            ),
        )
    return both[0], both[1]


def attach_mean(
    code: Float[Tensor, "*shape"], z: Float[Tensor, "*shape"], top: int, law: SmoothLaw, scale: float
) -> Float[Tensor, "*shape"]:
    """Return `code` unchanged, with the first and second derivatives of $M$ with respect to `z`."""
    return _Code.apply(code, z, top, law, scale)  # type: ignore[no-any-return]


def _window(law: Law, scale: Tensor | float) -> int:
    if not isinstance(law, SmoothLaw):
        return 1
    return math.ceil(law.reach * float(scale)) + 1


def _by_blocks(z: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply a function from [n] to [n] or [k, n] block by block; return the shape of z, or [k, shape of z]."""
    z = z.detach()
    if z.device.type != "cpu" or z.numel() <= _BLOCK:
        return function(z)
    # Kept in memory order, so that a channels-last tensor is not copied.
    order = sorted(range(z.dim()), key=z.stride, reverse=True)
    flat = z.permute(order).reshape(-1)
    parts = [function(flat[start : start + _BLOCK]) for start in range(0, flat.numel(), _BLOCK)]
    joined = torch.cat(parts, -1).unflatten(-1, [z.shape[axis] for axis in order])
    back = [order.index(axis) for axis in range(z.dim())]
    lead = joined.dim() - z.dim()
    return joined.permute(*range(lead), *[lead + axis for axis in back])


def _sum_over_thresholds(
    z: Tensor, top: int, law: SmoothLaw, scale: float, term: Callable[[Tensor, float], Tensor]
) -> Tensor:
    half = _window(law, scale)
    total = torch.zeros_like(z)
    if 2 * half + 1 >= top:
        for k in range(top):
            total += term(z - (k + 0.5), scale)
        return total
    anchor = z.floor()
    for offset in range(-half, half + 1):
        k = anchor + offset
        total += term(z - k - 0.5, scale) * ((k >= 0) & (k < top))
    return total


def _ratios_fit(z: Tensor, top: int, law: SmoothLaw, scale: float) -> bool:
    return isinstance(law, Logistic) and z.dtype == torch.float32 and top / scale < 130


def _logistic_ratios(z: Tensor, top: int, scale: float) -> Iterator[Tensor]:
    """Yield the sigmoid of every threshold at the lower of z and its mirror image, from one exponential.

    Mirroring keeps the sums exact to rounding in both tails: a difference of numbers near one never occurs there.
    The clamp at 30 scales below the range stands for a slope of 1e-13.
    """
    lower = (z - top / 2).abs_().neg_().mul_(1 / scale)
    a = lower.clamp_(min=-top / (2 * scale) - 30).exp_()
    s = torch.empty_like(a)
    for k in range(top):
        torch.add(a, math.exp((k + 0.5 - top / 2) / scale), out=s)
        yield torch.div(a, s, out=s)


def _logistic_slope(z: Tensor, top: int, scale: float) -> Tensor:
    total = torch.zeros_like(z)
    for s in _logistic_ratios(z, top, scale):
        total.add_(s).addcmul_(s, s, value=-1)
    return total.mul_(1 / scale)


def _logistic_slope_and_curvature(z: Tensor, top: int, scale: float) -> Tensor:
    total = torch.zeros(2, *z.shape, dtype=z.dtype, device=z.device)
    first, second = total
    square = torch.empty_like(z)
    for s in _logistic_ratios(z, top, scale):
        torch.mul(s, s, out=square)
        first.add_(s).sub_(square)  # s (1 - s)
        second.add_(square).addcmul_(square, s, value=-1)  # s^2 (1 - s)
    second.mul_(-2).add_(first).mul_(1 / scale**2).mul_((top / 2 - z).sign_())
    first.mul_(1 / scale)
    return total


class _Code(torch.autograd.Function):
    """Pass the code through; its gradient is the slope of the mean, which is itself differentiable once."""

    @staticmethod
    def forward(ctx: Any, code: Tensor, z: Tensor, top: int, law: SmoothLaw, scale: float) -> Tensor:
        ctx.save_for_backward(z)
        ctx.constants = (top, law, scale)
        ctx.known = {}
        return code.view_as(code)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (z,) = ctx.saved_tensors
        # An input-gradient penalty runs this twice, first with a graph: the second time everything is known.
        known: dict[str, Tensor] = ctx.known
        if torch.is_grad_enabled():
            if "curvature" not in known:
                known["slope"], known["curvature"] = slope_and_curvature(z, *ctx.constants)
            factor = _Slope.apply(z, known["slope"], known["curvature"])
        else:
            factor = known["slope"] if "slope" in known else slope(z, *ctx.constants)
        return None, grads[0] * factor, None, None, None


class _Slope(torch.autograd.Function):
    """Return the slope of the mean; its gradient is the curvature."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, slope: Tensor, curvature: Tensor) -> Tensor:
        ctx.save_for_backward(curvature)
        return slope.view_as(slope)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (curvature,) = ctx.saved_tensors
        return grads[0] * curvature, None, None
