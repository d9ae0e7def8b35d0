r"""Estimate the mutual information of discrete variables when samples are few against the cells of their table.

Both estimators smooth the table: `Shrinkage` towards the uniform one by a closed form, `NSB` by a mean over
priors. They take the product of the values that occur as the number of possible cells, and need memory only for
the occupied ones. Their standard error is that of the plug-in, by the delta method; it does not hold the bias.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from bitquorum.information import _codes
from bitquorum.information.estimator import Bound, Estimate, Estimator
from bitquorum.information.tables import xlog2x

_NODES = 400  # of the integral over the concentration


@final
@dataclass(frozen=True, kw_only=True)
class Shrinkage(Estimator):
    r"""Estimate the MI of integer codes by that of their table, shrunk towards the uniform one (James-Stein).

    $$\tilde p = \lambda / K + (1 - \lambda) \hat p, \quad
    \lambda = \frac{1 - \sum \hat p^2}{(N - 1) (\sum \hat p^2 - 1 / K)}$$

    with $\lambda$ cut to [0, 1] and K the number of cells, which is rows times columns. The weight minimises the
    squared error of the table, not of its MI: the MI is usually too low, most where mass lies on few cells, and of
    small spread where it is near zero. It is never negative.

    Reference: Hausser and Strimmer, 2009, entropy inference and the James-Stein estimator,
    https://arxiv.org/abs/0811.3579.

    Raises:
        InputError: if the codes are not integers, of one dimension and paired.

    Examples:
        >>> a = torch.tensor([0, 1] * 50)
        >>> print(f"{Shrinkage()(a, a).value:.3f}")
        0.919
    """

    bound: ClassVar[Bound] = "plug-in"

    def __call__(self, a: Shaped[Tensor, "samples"], b: Shaped[Tensor, "samples"]) -> Estimate:
        """Return the estimate for two vectors of integer codes; any integers, any number of them."""
        counts = _codes.count(a, b, "Shrinkage")
        n, width, height = counts.samples, len(counts.rows), len(counts.columns)
        cells = width * height
        squares = float((counts.cells / n).square().sum())
        spread = (n - 1) * (squares - 1 / cells)
        weight = min(1.0, (1 - squares) / spread) if spread > 0 else 1.0

        def shrunk(found: Tensor, size: int) -> Tensor:
            filled = xlog2x(weight / size + (1 - weight) * found / n).sum()
            empty = torch.tensor(weight / size, dtype=torch.float64)
            return filled + (size - len(found)) * xlog2x(empty)

        value = shrunk(counts.cells, cells) - shrunk(counts.rows, width) - shrunk(counts.columns, height)
        return Estimate(value=float(value), standard_error=counts.standard_error(), samples=n)


@final
@dataclass(frozen=True, kw_only=True)
class NSB(Estimator):
    r"""Estimate the MI of integer codes from Bayesian entropies under a prior that is flat in the entropy.

    $$\hat I = \hat H(A) + \hat H(B) - \hat H(A, B), \quad
    \hat H = \frac{\int E[H \mid n, \beta] \, P(n \mid \beta) \, \xi'(\beta) \, d\beta}
    {\int P(n \mid \beta) \, \xi'(\beta) \, d\beta}$$

    with a symmetric Dirichlet prior of concentration $\beta$ on K cells, $P(n \mid \beta)$ its evidence and
    $\xi(\beta) = \psi(K \beta + 1) - \psi(\beta + 1)$ its mean entropy. The integral is a sum over 400 nodes in
    $\log \beta$. The three entropies have priors of their own, so the MI can be slightly negative. It is near
    unbiased where the cells are of comparable mass or of two kinds, as right and wrong predictions are, and too
    low for a table that is close to a permutation.

    Reference: Nemenman, Shafee, Bialek, 2002, entropy and inference, revisited,
    https://arxiv.org/abs/physics/0108025; the mean entropy is that of Wolpert and Wolf, 1995.
    Deviation: the standard error is that of the plug-in MI instead of the posterior's, which does not hold the
    dependence of the three entropies.

    Raises:
        InputError: if the codes are not integers, of one dimension and paired.

    Examples:
        >>> a = torch.tensor([0, 1] * 50)
        >>> print(f"{NSB()(a, a).value:.3f}")
        0.971
    """

    bound: ClassVar[Bound] = "plug-in"

    def __call__(self, a: Shaped[Tensor, "samples"], b: Shaped[Tensor, "samples"]) -> Estimate:
        """Return the estimate for two vectors of integer codes; any integers, any number of them."""
        counts = _codes.count(a, b, "NSB")
        width, height = len(counts.rows), len(counts.columns)
        joint = _entropy(counts.cells, width * height)
        value = _entropy(counts.rows, width) + _entropy(counts.columns, height) - joint
        return Estimate(value=value, standard_error=counts.standard_error(), samples=counts.samples)


def _entropy(counts: Float[Tensor, "filled"], cells: int) -> float:
    """Return the posterior mean of the entropy in bits, given the counts of the occupied ones of `cells` cells."""
    if cells == 1:
        return 0.0
    digamma, lgamma = torch.special.digamma, torch.lgamma
    n, empty = float(counts.sum()), cells - len(counts)
    values, multiples = counts.unique(return_counts=True)
    # At the ends of this range the prior entropy is within 1e-4 of zero and of log K.
    log_beta = torch.linspace(math.log(1e-4 / cells), math.log(1e4), _NODES, dtype=torch.float64)
    beta = log_beta.exp()
    slope = cells * _trigamma(cells * beta + 1) - _trigamma(beta + 1)
    each = beta[:, None]
    evidence = lgamma(cells * beta) - lgamma(n + cells * beta)
    evidence = evidence + (multiples * (lgamma(values + each) - lgamma(each))).sum(1)
    weights = (evidence + slope.log() + log_beta).softmax(0)
    filled = (multiples * (values + each) * digamma(values + each + 1)).sum(1)
    inside = (filled + empty * beta * digamma(beta + 1)) / (n + cells * beta)
    mean = digamma(n + cells * beta + 1) - inside
    return float((weights * mean).sum()) / math.log(2)


def _trigamma(x: Float[Tensor, "k"]) -> Float[Tensor, "k"]:
    return torch.special.polygamma(1, x)
