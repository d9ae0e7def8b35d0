"""Step along orthogonalized momentum: far fewer steps for convolutions than stochastic gradient descent needs."""

from collections.abc import Iterable
from typing import Any, final, overload

import torch
from jaxtyping import Float
from torch import Tensor
from torch.optim import Optimizer

from bitquorum.interface import InputError

QUINTIC = (3.4445, -4.7750, 2.0315)
"""Coefficients a, b, c of the Newton-Schulz iteration X <- a X + (b X X^T + c (X X^T)^2) X of the reference."""


@final
class Muon(Optimizer):
    r"""Orthogonalize the momentum of every convolution, keep its norm, and step; all else by SGD.

    For a weight W of a convolution, [outputs, inputs, height, width], with gradient G, as a matrix of `outputs` rows:

    $$B \leftarrow \mu B + (1 - \mu) G, \quad W' = W - \eta\, O(\mu B + (1 - \mu) G),
    \quad W \leftarrow W' \|W\|_F / \|W'\|_F$$

    where O sets the singular values to about 1 (five quintic Newton-Schulz iterations, in half precision under
    autocast). A norm layer follows a convolution as a rule, so that its norm does not matter; kept, eta is the relative
    size of a step, and the ranges of weight quantizers stay where they are. Every other parameter takes a step of SGD
    with Nesterov momentum, at `RATIO` times eta, with weight decay.

    Reference: Jordan et al., 2024, Muon, https://kellerjordan.github.io/posts/muon, and its use for CIFAR-10 with
    kept norms. Deviations: SGD's Nesterov momentum has 0.9 throughout; `torch.optim.Muon` takes matrices alone and
    keeps no norm.

    Args:
        params: Parameters or groups of them, as of every optimizer; `weight_decay` of a group acts on parameters of
            other than four dimensions.
        lr: Step eta, above 0; 0.05 suits batches of about 128.
        momentum: mu, in [0, 1).

    Raises:
        InputError: if lr or momentum is out of range.

    Examples:
        >>> convolution = torch.nn.Conv2d(3, 8, 3)
        >>> before = convolution.weight.norm()
        >>> convolution(torch.ones(1, 3, 4, 4)).sum().backward()
        >>> Muon(convolution.parameters(), lr=0.05).step()
        >>> torch.testing.assert_close(convolution.weight.norm(), before)
    """

    RATIO = 2.0
    """Step of parameters that are no convolutions, over that of convolutions."""

    def __init__(
        self, params: Iterable[Tensor] | Iterable[dict[str, Any]], *, lr: float = 0.05, momentum: float = 0.9
    ) -> None:
        if not (lr > 0 and 0 <= momentum < 1):
            raise InputError(f"expected lr above 0 and momentum in [0, 1), got {lr} and {momentum}")
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": 0.0})

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Any) -> float: ...
    @torch.no_grad()
    def step(self, closure: Any = None) -> float | None:
        """Take one step; parameters without a gradient stay."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(weight)
                update = _turn if weight.dim() == 4 else _descend
                update(weight, weight.grad, state["momentum_buffer"], group)
        return loss


def _turn(weight: Tensor, gradient: Tensor, buffer: Tensor, group: dict[str, Any]) -> None:
    norm = weight.norm()
    buffer.lerp_(gradient, 1 - group["momentum"])
    ahead = gradient.lerp(buffer, group["momentum"])
    weight.sub_(group["lr"] * orthogonalize(ahead.flatten(1)).view_as(weight))
    weight.mul_(norm / weight.norm().clamp_min(1e-12))


def _descend(weight: Tensor, gradient: Tensor, buffer: Tensor, group: dict[str, Any]) -> None:
    gradient = gradient.add(weight, alpha=group["weight_decay"])
    buffer.mul_(group["momentum"]).add_(gradient)
    weight.sub_(gradient.add(buffer, alpha=group["momentum"]), alpha=Muon.RATIO * group["lr"])


def orthogonalize(matrix: Float[Tensor, "rows columns"]) -> Float[Tensor, "rows columns"]:
    """Return a matrix with the same singular vectors and singular values between about 0.7 and 1.2.

    Values below about a hundredth of the Frobenius norm are raised, yet not so far in five iterations.

    Examples:
        >>> values = torch.linalg.svdvals(orthogonalize(torch.diag(torch.tensor([3.0, 1.0, 0.5]))))
        >>> bool(((values > 0.6) & (values < 1.25)).all())
        True
    """
    a, b, c = QUINTIC
    flat = matrix.mT if matrix.shape[0] > matrix.shape[1] else matrix
    x = flat / flat.norm().clamp_min(1e-12)
    for _ in range(5):
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if matrix.shape[0] > matrix.shape[1] else x
