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
            moving = [weight for weight in group["params"] if weight.grad is not None]
            for weight in moving:
                if not self.state[weight]:
                    self.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
            for update, those in (
                (_turn, [weight for weight in moving if weight.dim() == 4]),
                (_descend, [weight for weight in moving if weight.dim() != 4]),
            ):
                if those:
                    buffers = [self.state[weight]["momentum_buffer"] for weight in those]
                    update(those, [weight.grad for weight in those], buffers, group)
        return loss


def _turn(weights: list[Tensor], gradients: list[Tensor], buffers: list[Tensor], group: dict[str, Any]) -> None:
    norms = torch._foreach_norm(weights)
    torch._foreach_lerp_(buffers, gradients, 1 - group["momentum"])
    ahead = torch._foreach_lerp(gradients, buffers, group["momentum"])
    matrices = [matrix.flatten(1) for matrix in ahead]
    # One matrix is too little work for a GPU, and enough for a CPU.
    turns = orthogonalize_all(matrices) if matrices[0].is_cuda else [orthogonalize(matrix) for matrix in matrices]
    steps = [turn.view_as(weight) for turn, weight in zip(turns, weights, strict=True)]
    torch._foreach_sub_(weights, torch._foreach_mul(steps, group["lr"]))
    before, after = torch.stack(norms), torch.stack(torch._foreach_norm(weights)).clamp_min(1e-12)
    torch._foreach_mul_(weights, torch.where(before > 0, before / after, 1.0).unbind())  # zeros have no norm to keep


def _descend(weights: list[Tensor], gradients: list[Tensor], buffers: list[Tensor], group: dict[str, Any]) -> None:
    decayed = torch._foreach_add(gradients, weights, alpha=group["weight_decay"])
    torch._foreach_mul_(buffers, group["momentum"])
    torch._foreach_add_(buffers, decayed)
    torch._foreach_add_(decayed, buffers, alpha=group["momentum"])
    torch._foreach_sub_(weights, decayed, alpha=Muon.RATIO * group["lr"])


def orthogonalize_all(matrices: list[Float[Tensor, "_ _"]]) -> list[Float[Tensor, "_ _"]]:
    """Apply `orthogonalize` to each, to those of equal shape at once."""
    alike: dict[torch.Size, list[int]] = {}
    for index, matrix in enumerate(matrices):
        alike.setdefault(matrix.shape, []).append(index)
    found: dict[int, Tensor] = {}
    for places in alike.values():
        found |= zip(places, orthogonalize(torch.stack([matrices[place] for place in places])).unbind(), strict=True)
    return [found[place] for place in range(len(matrices))]


def orthogonalize(matrix: Float[Tensor, "*batch rows columns"]) -> Float[Tensor, "*batch rows columns"]:
    """Return a matrix, or a batch of them, with the same singular vectors and singular values of about 0.7 to 1.2.

    Values below about a hundredth of the Frobenius norm are raised, yet not so far in five iterations.

    Examples:
        >>> values = torch.linalg.svdvals(orthogonalize(torch.diag(torch.tensor([3.0, 1.0, 0.5]))))
        >>> bool(((values > 0.6) & (values < 1.25)).all())
        True
    """
    a, b, c = QUINTIC
    add = torch.addmm if matrix.dim() == 2 else torch.baddbmm
    tall = matrix.shape[-2] > matrix.shape[-1]
    flat = matrix.mT if tall else matrix
    x = flat / flat.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-12)
    for _ in range(5):
        gram = x @ x.mT
        x = add(x, add(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x
