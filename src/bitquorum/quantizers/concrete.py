r"""Relax a drawn code to a concrete variable, given that its largest component is the drawn code.

With the probability $p_k$ of each code, a waiting time $E_k$ of an exponential law for each, and the drawn code c,

$$w_k \propto \left(1 + \frac{E_k}{p_k E_c}\right)^{-1/T} \;(k \ne c), \quad w_c \propto 1, \quad
\tilde{c} = \sum_k k\, w_k$$

is a sample of the concrete relaxation at temperature T given c. Gumbel noise is drawn given that code and then held
fixed, so that the expected gradient is that of the mean of the relaxation: Paulus et al., 2020,
https://arxiv.org/abs/2010.04838, section 3. Without noise elsewhere the relaxation is the one of Louizos et al., 2019.
The slope that an attack or a plain training asks for,

$$\frac{\partial \tilde{c}}{\partial z} = \frac{1}{T} \left[\sum_k k\, w_k s_k - \tilde{c} \sum_k w_k s_k\right], \quad
s_k = \frac{\partial \log p_k}{\partial z},$$

is `kernels.relaxed_slope`: a number for each code of each element would take many times the memory of the network.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bitquorum import kernels
from bitquorum.quantizers.laws import Law, SmoothLaw
from bitquorum.quantizers.mean import SMOOTH

_BLOCK = 1 << 18  # numbers of a block, over all codes


def probabilities(
    z: Float[Tensor, "*shape"], top: int, law: Law, scale: Tensor | float
) -> Float[Tensor, "*shape codes"]:
    """Return the probability of each code, exact to rounding far from `z` too."""
    ahead = torch.arange(top, device=z.device, dtype=z.dtype) + 0.5 - z[..., None]  # of the thresholds
    below, above = law.cdf(ahead, scale), law.cdf(-ahead, scale)  # P(code <= k) and P(code > k), by symmetry
    inner = torch.where(ahead[..., 1:] < 0, below[..., 1:] - below[..., :-1], above[..., :-1] - above[..., 1:])
    return torch.cat([below[..., :1], inner, above[..., -1:]], -1)


@dataclass(frozen=True, kw_only=True)
class Concrete:
    """Hold what a relaxation is made of, but for the values.

    Attributes:
        law: Of the noise.
        scale: Of the noise, in steps.
        top: Largest code.
        temperature: T.
    """

    law: Law
    scale: Tensor | float
    top: int
    temperature: float

    def attach(
        self, code: Float[Tensor, "rows *rest"], z: Float[Tensor, "rows *rest"], keys: Int[Tensor, "rows"]
    ) -> Float[Tensor, "rows *rest"]:
        """Return `code` unchanged, with the gradient of its relaxation in `z` and in a learned scale.

        Args:
            code: Drawn codes.
            z: Values in steps, of which they were drawn.
            keys: Of the waiting times, one for each row; see `rng.row_keys`.
        """
        learned = isinstance(self.scale, Tensor) and self.scale.requires_grad
        if isinstance(self.law, SmoothLaw) and not learned:
            return _Relaxed.apply(code, z, keys, self)  # type: ignore[no-any-return]
        soft = self.relaxed(code, z, keys)
        return code + (soft - soft.detach())

    def relaxed(
        self, code: Float[Tensor, "rows *rest"], z: Float[Tensor, "rows *rest"], keys: Int[Tensor, "rows"]
    ) -> Float[Tensor, "rows *rest"]:
        """Return the relaxed code by differentiable operations, of any order; it takes `top` times the memory of z."""
        logp = probabilities(z, self.top, self.law, self.scale).clamp(min=kernels.LEAST).log()
        waits = self._waits(keys, z.shape[1:].numel(), z.dtype).view(*z.shape, -1)
        index = code.long()[..., None]
        first = waits.gather(-1, index)
        others = -(waits / logp.detach().exp() + first).log()
        gumbel = others.scatter(-1, index, -first.log()) - logp.detach()
        weights = torch.softmax((logp + gumbel) / self.temperature, -1)
        return (weights * torch.arange(self.top + 1, device=z.device, dtype=z.dtype)).sum(-1)

    def slope(
        self, code: Float[Tensor, "rows *rest"], z: Float[Tensor, "rows *rest"], keys: Int[Tensor, "rows"]
    ) -> Float[Tensor, "rows *rest"]:
        """Return the derivative of `relaxed` in z, of a smooth law."""
        name = SMOOTH.get(type(self.law))
        if name is not None:
            known: dict[str, Any] = {"law": name, "top": self.top, "scale": float(self.scale)}
            return kernels.relaxed_slope(code, z, keys, temperature=self.temperature, **known)
        found = torch.empty_like(z)
        height = max(1, _BLOCK // max(1, z.shape[1:].numel() * (self.top + 1)))
        for start in range(0, len(z), height):
            rows = slice(start, start + height)
            with torch.enable_grad():
                leaf = z[rows].detach().requires_grad_()
                (found[rows],) = torch.autograd.grad(self.relaxed(code[rows], leaf, keys[rows]).sum(), leaf)
        return found

    def _waits(self, keys: Tensor, count: int, dtype: torch.dtype) -> Float[Tensor, "rows count codes"]:
        """Return a waiting time for each code of each element of some rows."""
        uniform = kernels.uniform(keys, count * (self.top + 1)).to(dtype)
        return -uniform.view(len(keys), count, self.top + 1).log()


class _Relaxed(torch.autograd.Function):
    """Pass the code through; its gradient is the slope of the relaxation."""

    @staticmethod
    def forward(ctx: Any, code: Tensor, z: Tensor, keys: Tensor, concrete: Concrete) -> Tensor:
        ctx.save_for_backward(code, z, keys)
        ctx.concrete = concrete
        return code.view_as(code)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        code, z, keys = ctx.saved_tensors
        concrete: Concrete = ctx.concrete
        if not torch.is_grad_enabled():
            return None, grads[0] * concrete.slope(code, z, keys), None, None
        (gradient,) = torch.autograd.grad(concrete.relaxed(code, z, keys), z, grads[0], create_graph=True)
        return None, gradient, None, None
