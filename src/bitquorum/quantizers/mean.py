r"""Compute the mean code of a dithered quantizer, its slope and its curvature, and attach them as gradients.

The sums run over all thresholds, or over a window that holds every threshold nearer than the law's reach: the rest
contribute less than 1e-7 of a step.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from bitquorum import kernels
from bitquorum.quantizers.laws import Gaussian, Law, Logistic, SmoothLaw, SmoothRounding, StochasticRounding

# Laws that the kernels know by name; every other law, and every type but float32, takes the plain sums below.
SMOOTH: dict[type[Law], kernels.SmoothLawName] = {
    Logistic: "logistic",
    Gaussian: "gaussian",
    SmoothRounding: "smooth-rounding",
}
LAWS: dict[type[Law], kernels.LawName] = {**SMOOTH, StochasticRounding: "uniform"}


def mean_code(z: Float[Tensor, "*shape"], top: int, law: Law, scale: Tensor | float) -> Float[Tensor, "*shape"]:
    """Return $M(z)$ by differentiable operations: any order, also with respect to `scale`. Shapes are kept."""
    if isinstance(law, SmoothRounding):
        return law.clip(z, top, scale)
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
    if _kernel_fits(z, top, law, scale):
        return kernels.slope(z, law=SMOOTH[type(law)], top=top, scale=scale)
    return _sum_over_thresholds(z.detach(), top, law, scale, law.pdf)


def slope_and_curvature(
    z: Float[Tensor, "*shape"], top: int, law: SmoothLaw, scale: float
) -> tuple[Float[Tensor, "*shape"], Float[Tensor, "*shape"]]:
    """Return $M'(z)$ and $M''(z)$, without a graph."""
    if _kernel_fits(z, top, law, scale):
        return kernels.slope_and_curvature(z, law=SMOOTH[type(law)], top=top, scale=scale)
    first = _sum_over_thresholds(z.detach(), top, law, scale, law.pdf)
    return first, _sum_over_thresholds(z.detach(), top, law, scale, law.pdf_slope)


def attach_mean(
    code: Float[Tensor, "*shape"], z: Float[Tensor, "*shape"], top: int, law: SmoothLaw, scale: float
) -> Float[Tensor, "*shape"]:
    """Return `code` unchanged, with the first and second derivatives of $M$ with respect to `z`."""
    return _Code.apply(code, z, top, law, scale)  # type: ignore[no-any-return]


def _window(law: Law, scale: Tensor | float) -> int:
    if not isinstance(law, SmoothLaw):
        return 1
    value = scale.item() if isinstance(scale, Tensor) else scale
    return math.ceil(law.reach * value) + 1


def _kernel_fits(z: Tensor, top: int, law: SmoothLaw, scale: float) -> bool:
    return z.dtype == torch.float32 and type(law) in SMOOTH and kernels.fits(SMOOTH[type(law)], top, scale)


def _sum_over_thresholds(
    z: Tensor, top: int, law: SmoothLaw, scale: float, term: Callable[[Tensor, float], Tensor]
) -> Tensor:
    half = _window(law, scale)
    total = torch.zeros_like(z)
    if 2 * half + 1 >= top:
        for k in range(top):
            total += term(z - (k + 0.5), scale)
        return total
    anchor = z.floor().clamp_(-half - 1, top + half)
    for offset in range(-half, half + 1):
        k = anchor + offset
        total += term(z - k - 0.5, scale) * ((k >= 0) & (k < top))
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
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, ...]:
        (curvature,) = ctx.saved_tensors
        return grads[0] * curvature, None, None
