"""Round weights to a symmetric grid in one pass, and their straight-through gradients in another.

A weight is small, so that its dozen operations forwards and two dozen backwards cost a GPU their launches alone.
"""

from typing import Any, no_type_check

import torch
from jaxtyping import Float
from torch import Tensor

from bitquorum.kernels import choice, layout, noise


def round_symmetric(
    x: Float[Tensor, "*shape"], step: Float[Tensor, "*ranges"], *, top: int, factor: float
) -> Float[Tensor, "*shape"] | None:
    r"""Return $\Delta (k - t / 2)$, $k = \mathrm{clip}(\mathrm{round}(x / \Delta + t / 2), 0, t)$, or `None`.

    `None` where the compiler fails. With gradient g, and $i$ telling whether x lies between the outer levels,

    $$\nabla_x = g i, \quad \nabla_\Delta = f \sum g (k - t / 2 - i x / \Delta).$$

    The gradients are differentiable in g.

    Args:
        x: Weights, channels first.
        step: Distance $\Delta$ of the levels, one for each channel or one in all.
        top: The largest code, t.
        factor: Of the gradient of the step, f.
    """
    rows = layout.flatten(x.detach(), 1) if step.numel() > 1 else layout.flatten(x.detach())[None]
    values = choice.call(_values, rows, step.detach().view(-1), noise.scalar(float(top), x.device), exact=True)
    if values is None:
        return None
    values = _like(values, x)
    if not (torch.is_grad_enabled() and (x.requires_grad or step.requires_grad)):
        return values
    return _Round.apply(x, values, step, top, factor)  # type: ignore[return-value]


class _Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, step: Tensor, top: int, factor: float) -> Tensor:
        ctx.save_for_backward(x, values, step)
        ctx.constants = (top, factor)
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, values, step = ctx.saved_tensors
        top, factor = (noise.scalar(float(number), x.device) for number in ctx.constants)
        g = layout.like_layout(grads[0], x)
        rows = (layout.flatten(t, 1) if step.numel() > 1 else layout.flatten(t)[None] for t in (x, g, values))
        arguments: tuple[Any, ...] = (*rows, step.view(-1), top, factor)
        of_x, of_step = _gradients(*arguments) if torch.is_grad_enabled() else choice.compute(_gradients, *arguments)
        return _like(of_x, x), None, of_step.view_as(step), None, None


def _like(rows: Tensor, x: Tensor) -> Tensor:
    return layout.unflatten(rows, x, 1) if len(rows) == len(x) else layout.unflatten(rows[0], x)


# The functions below are traced by the compiler; type checks at run time would break the trace.


@no_type_check
def _values(x: Tensor, step: Tensor, top: Tensor) -> Tensor:
    half, step = top / 2, step[:, None]
    code = ((x + step * half) / step).clamp(min=0).clamp(max=top).round()
    return (code - half) * step


@no_type_check
def _gradients(
    x: Tensor, g: Tensor, values: Tensor, step: Tensor, top: Tensor, factor: Tensor
) -> tuple[Tensor, Tensor]:
    half, wide = top / 2, step[:, None]
    z = (x + wide * half) / wide
    inside = (z >= 0) & (z <= top)
    error = ((values - x * inside) / wide).detach()  # of rounding, or an outer level: constant, straight-through
    return g * inside, factor * (g * error).sum(1)
