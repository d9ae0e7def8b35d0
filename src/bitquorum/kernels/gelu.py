r"""Apply GELU, $x \Phi(x)$, with first and second derivatives of one pass each.

$$g'(x) = \Phi(x) + x \phi(x), \quad g''(x) = (2 - x^2) \phi(x).$$

Torch's own second derivatives are a dozen passes over the activations.
"""

import math
from typing import Any, no_type_check

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from bitquorum.kernels import choice, layout


def fits_gelu(x: Tensor) -> bool:
    """Return whether `gelu` serves this batch: compiled code, and somebody asks for derivatives."""
    return choice.applies(x, (torch.float32, torch.bfloat16)) and torch.is_grad_enabled() and x.requires_grad


def gelu(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Return what `torch.nn.functional.gelu` returns; differentiable twice, not more often."""
    return _Gelu.apply(x)  # type: ignore[return-value]


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return F.gelu(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return _Backward.apply(grads[0], *ctx.saved_tensors)


class _Backward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(g, x)
        return torch.ops.aten.gelu_backward(g, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        g, x = ctx.saved_tensors
        flats = [layout.flatten(layout.like_layout(tensor, x)) for tensor in (x, g, grads[0])]
        to_g, to_x = (layout.unflatten(result, x) for result in choice.compute(_second, *flats))
        return to_g, to_x


@no_type_check
def _second(x: Tensor, g: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of g and x; traced by the compiler, where type checks would break the trace."""
    wide, slope = x.float(), v.float()
    density = torch.exp(-0.5 * wide * wide) * (1 / math.sqrt(2 * math.pi))
    below = 0.5 * (1 + torch.erf(wide * (1 / math.sqrt(2))))
    to_x = slope * g.float() * (2 - wide * wide) * density
    return (slope * (below + wide * density)).to(g.dtype), to_x.to(x.dtype)
