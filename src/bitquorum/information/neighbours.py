"""Estimate the mutual information of continuous variables of few dimensions from nearest neighbours."""

import math
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from bitquorum.information import _features
from bitquorum.information.estimator import Bound, Estimate, Estimator
from bitquorum.interface import InputError

_ENTRIES = 1 << 22  # of the distances that are held at once


@final
@dataclass(frozen=True, kw_only=True)
class KSG(Estimator):
    r"""Estimate the MI of features by the numbers of neighbours within the distance of the k-th joint one.

    $$\hat I = \psi(k) + \psi(N) - \overline{\psi(n_a + 1) + \psi(n_b + 1)}$$

    with $\epsilon$ the distance to the k-th neighbour in the maximum norm of both variables, and $n_a$, $n_b$ the
    numbers of other samples closer than $\epsilon$ in each variable alone. It is a plug-in: nearly unbiased for a
    few dimensions and a few bits, and zero in the mean for independent variables. With tens of dimensions, or more
    bits than the neighbours resolve, it is far too low without a sign of it: read `calibrate` first.

    The standard error is the spread of the terms over $\sqrt{N}$. It takes them as independent, although
    neighbours share samples.

    Reference: Kraskov, Stögbauer, Grassberger, 2004, estimating mutual information, algorithm 1, eq. 8,
    https://arxiv.org/abs/cond-mat/0305641. Deviation: every coordinate is scaled to variance one first.

    Args:
        neighbours: The number k, at least 1; fewer is less biased, more is less noisy.

    Raises:
        InputError: if k is below one or not below the number of samples, the samples are not paired, floating
            point and finite, or more than k of them are equal: it is for continuous laws.

    Examples:
        >>> from bitquorum.information.laws import correlated_gaussians
        >>> a, b = correlated_gaussians(1.0, 1, 1, samples=1000, generator=torch.Generator().manual_seed(0))
        >>> print(f"{KSG()(a, b).value:.1f}")
        1.0
    """

    bound: ClassVar[Bound] = "plug-in"

    neighbours: int = 3

    def __post_init__(self) -> None:
        """Refuse a number of neighbours below one."""
        if self.neighbours < 1:
            raise InputError(f"KSG: expected at least one neighbour, got {self.neighbours}")

    @torch.no_grad()
    def __call__(self, a: Shaped[Tensor, "samples *a"], b: Shaped[Tensor, "samples *b"]) -> Estimate:
        """Return the estimate for features in the rows of `a` and `b`, of any numbers of dimensions."""
        x, y = _features.paired(a, b, self.neighbours + 1, "KSG")
        count = len(x)
        rows = torch.arange(count).split(max(1, _ENTRIES // count))
        counted = torch.cat([self._terms(x, y, chunk) for chunk in rows])
        constant = float(torch.special.digamma(torch.tensor([self.neighbours, count], dtype=x.dtype)).sum())
        error = float(counted.std()) / math.sqrt(count)
        return Estimate(
            value=(constant - float(counted.mean())) / math.log(2),
            standard_error=error / math.log(2),
            samples=count,
        )

    def _terms(self, x: Float[Tensor, "n a"], y: Float[Tensor, "n b"], rows: Tensor) -> Float[Tensor, "rows"]:
        first, second = torch.cdist(x[rows], x, p=math.inf), torch.cdist(y[rows], y, p=math.inf)
        joint = first.maximum(second)
        joint[torch.arange(len(rows)), rows] = math.inf
        radius = joint.topk(self.neighbours, largest=False).values[:, -1:]
        if not bool((radius > 0).all()):
            raise InputError(f"KSG: expected continuous samples, got one that occurs {self.neighbours + 1} times")
        # The sample itself is closer than the radius, so these are n_a + 1 and n_b + 1.
        near = torch.stack([(distance < radius).sum(1) for distance in (first, second)])
        return torch.special.digamma(near.to(x)).sum(0)
