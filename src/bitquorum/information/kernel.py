"""Make an estimator of the matrix-based Rényi mutual information of features."""

import math
from dataclasses import dataclass
from typing import ClassVar, final, get_args

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from bitquorum.information import _features
from bitquorum.information.estimator import Bound, Estimate, Estimator
from bitquorum.information.renyi import Bandwidth, Rule, gram, renyi_entropy
from bitquorum.interface import InputError


@final
@dataclass(frozen=True, kw_only=True)
class RenyiMI(Estimator):
    r"""Estimate a mutual information of features by the Rényi entropies of their Gram matrices.

    It is `renyi_mutual_information` of both, with a standard error. It is a plug-in of a quantity of its own: its
    level depends on order, bandwidth and N, it is at most log2 N and it approaches Shannon's MI only for samples in
    equally likely clusters that are narrow against the bandwidth and far apart. On other laws read it as an index
    of dependence: compare values of equal N, order and bandwidth, and never with other estimators.

    The standard error is that of the infinitesimal jackknife, $\sqrt{\sum_n (\partial \hat I / \partial w_n)^2}$
    with weights w of the examples around one, at a fixed bandwidth.

    References: Giraldo, Rao, Principe, 2015, https://arxiv.org/abs/1211.2459; Yu et al., 2019,
    https://arxiv.org/abs/1808.07912; Efron, 1982, the jackknife, the bootstrap and other resampling plans, chapter 6.

    Args:
        alpha: The order, above 0; 2 needs no eigenvalues, 1.01 is usual.
        bandwidth: A rule or a number, as in `gram`; features are not standardised.

    Raises:
        InputError: if order or bandwidth are unknown or not positive, or the samples are not paired, floating
            point and finite, two at least.

    Examples:
        >>> x = torch.tensor([[0.0], [0.0], [9.0], [9.0]])
        >>> print(f"{RenyiMI(bandwidth=1.0)(x, -x).value:.3f}")
        1.000
    """

    bound: ClassVar[Bound] = "plug-in"

    alpha: float = 2.0
    bandwidth: Bandwidth = "median"

    def __post_init__(self) -> None:
        """Refuse an order or a bandwidth that is unknown or not positive."""
        if not (self.alpha > 0 and math.isfinite(self.alpha)):
            raise InputError(f"RenyiMI: expected a finite alpha above 0, got {self.alpha}")
        width = self.bandwidth
        known = width in get_args(Rule) if isinstance(width, str) else width > 0 and math.isfinite(width)
        if not known:
            raise InputError(f"RenyiMI: expected a finite bandwidth above 0 or one of {get_args(Rule)}, got {width!r}")

    def __call__(self, a: Shaped[Tensor, "samples *a"], b: Shaped[Tensor, "samples *b"]) -> Estimate:
        """Return the estimate for features in the rows of `a` and `b`, of any numbers of dimensions."""
        _features.paired(a, b, 2, "RenyiMI")
        with torch.no_grad():
            first, second = (gram(_rows(x), self.bandwidth).double() for x in (a, b))
            matrices = first, second, first * second
        with torch.enable_grad():
            weights = torch.ones(len(first), dtype=torch.float64, device=first.device, requires_grad=True)
            one, other, both = (renyi_entropy(_weighted(matrix, weights), self.alpha) for matrix in matrices)
            value = one + other - both
            (slope,) = torch.autograd.grad(value, weights)
        return Estimate(value=float(value.detach()), standard_error=float(slope.norm()), samples=len(first))


def _rows(x: Shaped[Tensor, "samples *x"]) -> Float[Tensor, "samples x"]:
    return x[:, None] if x.dim() == 1 else x.flatten(1)


def _weighted(matrix: Float[Tensor, "n n"], weights: Float[Tensor, "n"]) -> Float[Tensor, "n n"]:
    """Return the matrix in which example i counts `weights[i]` times, of trace one."""
    root = weights.sqrt()
    return matrix * root[:, None] * root / (weights * matrix.diagonal()).sum()
