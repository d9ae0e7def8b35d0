r"""Estimate Rényi entropy and mutual information of features from the eigenvalues of Gram matrices, in bits.

No density is estimated and no network is trained: N feature vectors give an N x N Gaussian kernel matrix of
trace one, whose spectrum plays the part of a distribution. The order $\alpha = 2$ needs no eigenvalues.

References: Giraldo, Rao, Principe, 2015, measures of entropy from data using infinitely divisible kernels,
https://arxiv.org/abs/1211.2459; Yu, Giraldo, Jenssen, Principe, 2019, multivariate extension of matrix-based
Rényi's alpha-order entropy functional, https://arxiv.org/abs/1808.07912.
"""

import math
from typing import Literal, TypeAlias, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from bitquorum.information import _check
from bitquorum.information.tables import xlog2x
from bitquorum.interface import InputError

Rule: TypeAlias = Literal["median", "silverman"]
Bandwidth: TypeAlias = float | Rule


def gram(features: Float[Tensor, "batch features"], bandwidth: Bandwidth = "median") -> Float[Tensor, "batch batch"]:
    r"""Compute the Gaussian kernel matrix of a batch, normalised to trace one.

    $$A_{ij} = \frac{1}{N} \exp\left(-\frac{\|z_i - z_j\|^2}{2 \sigma^2}\right)$$

    Features are not standardised per dimension, which would blow up units that are nearly dead. A rule
    measures $\sigma$ in units of the spread $s^2 = \mathrm{mean}_{i \neq j} \|z_i - z_j\|^2$ instead:

    - `median` (default): $\sigma$ is the median distance, so a typical entry is $e^{-1/2} / N$ in every
      dimension.
    - `silverman`: $\sigma^2 = \frac{s^2}{2d} (4 / (N (d + 2)))^{2 / (d + 4)}$, the rule of thumb for density
      estimates (Silverman, 1986, eq. 4.14), common with these entropies. At tens of dimensions neighbours are
      farther away than $\sigma$, A approaches the identity over N and gradients vanish; hence not the
      default.

    The ratio $s^2 / \sigma^2$ is detached and the spread is not: values do not depend on the scale of the
    features and gradients have no component along it, so no training term is lowered by mere shrinking. The
    gradient of `silverman` and of a number is exact; that of `median` leaves out how the ratio moves.

    Args:
        features: One row per example; at least two.
        bandwidth: A rule, or $\sigma$ itself in units of the features.

    Returns:
        A positive semidefinite matrix of trace one. Rows that agree up to rounding count as identical.

    Raises:
        InputError: if there are fewer than two rows, a feature is not finite or the bandwidth is unknown or
            not positive.

    Examples:
        >>> gram(torch.tensor([[0.0], [2.0]]), bandwidth=1.0) * 2
        tensor([[1.0000, 0.1353],
                [0.1353, 1.0000]])
    """
    if features.dim() != 2 or features.shape[0] < 2:
        raise InputError(f"gram: expected [batch >= 2, features], got shape {tuple(features.shape)}; do flatten(1)")
    x = _check.wide(features, "gram")
    if not bool(x.isfinite().all()):
        raise InputError("gram: expected finite features, got NaN or infinity")
    squared = _squared_distances(x)
    exponent = _by_rule(squared, x, bandwidth) if isinstance(bandwidth, str) else _by_width(squared, bandwidth)
    same = torch.eye(len(x), device=x.device, dtype=torch.bool)
    return (-exponent).exp().masked_fill(same, 1.0) / len(x)


def renyi_entropy(gram: Float[Tensor, "*matrices n n"], alpha: float = 2.0) -> Float[Tensor, "*matrices"]:
    r"""Compute the matrix-based Rényi entropy of order `alpha`.

    $$S_\alpha(A) = \frac{1}{1 - \alpha} \log_2 \sum_i \lambda_i(A)^\alpha, \quad S_2(A) = -\log_2 \|A\|_F^2$$

    The order 1 is the limit $-\sum_i \lambda_i \log_2 \lambda_i$. Eigenvalues below the machine epsilon are
    rounding and count as zero; use float64 for orders below one, which weigh them most.

    Args:
        gram: Positive semidefinite matrices of trace one.
        alpha: The order, above 0; 1.01 is usual in the papers, 2 needs no eigenvalues.

    Returns:
        The entropy in bits, in [0, log2 n].

    Raises:
        InputError: if `alpha` is not positive and finite, or a matrix is not square or not of trace one.

    Reference: Giraldo, Rao, Principe, 2015.

    Examples:
        >>> renyi_entropy(torch.eye(8) / 8).item(), renyi_entropy(torch.eye(8) / 8, alpha=1.0).item()
        (3.0, 3.0)
    """
    if not (alpha > 0 and math.isfinite(alpha)):
        raise InputError(f"renyi_entropy: expected a finite alpha above 0, got {alpha}")
    matrix = _normalised(gram, "renyi_entropy")
    if alpha == 2:
        return -matrix.square().sum((-2, -1)).log2()
    spectrum = torch.linalg.eigvalsh(matrix)
    kept = spectrum > torch.finfo(spectrum.dtype).eps
    spectrum = spectrum.where(kept, 1.0)
    if alpha == 1:
        return -xlog2x(spectrum).sum(-1)
    if abs(alpha - 1) < 0.1:  # the eigenvalues add up to one: their powers, to almost one, would lose the digits
        less = (spectrum * torch.expm1((alpha - 1) * spectrum.log()) * kept).sum(-1)
        return less.log1p() / (math.log(2) * (1 - alpha))
    return (spectrum**alpha * kept).sum(-1).log2() / (1 - alpha)


def gram_mutual_information(
    a: Float[Tensor, "*matrices n n"], b: Float[Tensor, "*matrices n n"], alpha: float = 2.0
) -> Float[Tensor, "*matrices"]:
    r"""Compute the mutual information of two variables from their Gram matrices on the same examples.

    $$I_\alpha(A; B) = S_\alpha(A) + S_\alpha(B)
    - S_\alpha\left(\frac{A \circ B}{\mathrm{tr}(A \circ B)}\right)$$

    It is at most the smaller of the two entropies. Unlike Shannon's MI it can be slightly negative,
    and that of A with itself is S(A) only when every two examples are either identical or far apart.

    Args:
        a: Matrices of trace one, as from `gram`; compute them once per member and reuse them for all pairs.
        b: Matrices of the other variable.
        alpha: The order, above 0.

    Raises:
        InputError: if the shapes differ, a matrix is not of trace one or `alpha` is not positive.

    Reference: Giraldo, Rao, Principe, 2015; Yu et al., 2019 (joint entropy by the Hadamard product).

    Examples:
        >>> a = gram(torch.tensor([[0.0], [0.0], [9.0], [9.0]]), bandwidth=1.0)
        >>> b = gram(torch.tensor([[0.0], [9.0], [0.0], [9.0]]), bandwidth=1.0)
        >>> f"{gram_mutual_information(a, a).item():.3f} {gram_mutual_information(a, b).item():.3f}"
        '1.000 0.000'
    """
    if a.shape != b.shape:
        raise InputError(
            f"gram_mutual_information: expected two matrices of one shape, got {tuple(a.shape)} and {tuple(b.shape)}"
        )
    product = _check.wide(a, "gram_mutual_information") * _check.wide(b, "gram_mutual_information")
    trace = product.diagonal(dim1=-2, dim2=-1).sum(-1)
    joint = product / trace[..., None, None]
    return renyi_entropy(a, alpha) + renyi_entropy(b, alpha) - renyi_entropy(joint, alpha)


def renyi_mutual_information(
    features_a: Float[Tensor, "batch features_a"],
    features_b: Float[Tensor, "batch features_b"],
    alpha: float = 2.0,
    bandwidth: Bandwidth = "median",
) -> Float[Tensor, ""]:
    """Estimate the mutual information of two sets of features of the same examples, in bits.

    It is `gram_mutual_information` of `gram(features_a)` and `gram(features_b)`. Its level depends on the
    bandwidth and grows with the batch up to log2 of its size, so compare only values of equal batch size,
    order and bandwidth.

    Args:
        features_a: One row per example; at least two.
        features_b: Rows of the same examples; any number of features.
        alpha: The order, above 0.
        bandwidth: A rule or a number, as in `gram`.

    Raises:
        InputError: if the batches differ, or as in `gram` and `renyi_entropy`.

    Examples:
        >>> x = torch.tensor([[0.0], [0.0], [9.0], [9.0]])
        >>> f"{renyi_mutual_information(x, -x, bandwidth=1.0).item():.3f}"
        '1.000'
    """
    if features_a.shape[:1] != features_b.shape[:1]:
        raise InputError(
            "renyi_mutual_information: expected features of the same examples, got shapes "
            f"{tuple(features_a.shape)} and {tuple(features_b.shape)}"
        )
    return gram_mutual_information(gram(features_a, bandwidth), gram(features_b, bandwidth), alpha)


def _squared_distances(x: Float[Tensor, "n d"]) -> Float[Tensor, "n n"]:
    # Distances ignore a common shift; without it the products lose no digits to a large mean.
    x = x - x.detach().mean(0)
    norms = x.square().sum(1)
    both = norms[:, None] + norms
    with torch.autocast(device_type=x.device.type, enabled=False):
        squared = both - 2 * (x @ x.T)
    # What the subtraction cannot tell from zero is zero: equal rows are at no distance, and have no gradient.
    return squared.where(squared.detach() > 4 * torch.finfo(x.dtype).eps * x.shape[1] ** 0.5 * both.detach(), 0.0)


def _by_width(squared: Float[Tensor, "n n"], width: float) -> Float[Tensor, "n n"]:
    if not (width > 0 and math.isfinite(width)):
        raise InputError(f"gram: expected a finite bandwidth above 0 or one of {get_args(Rule)}, got {width}")
    return squared / (2 * width**2)


def _by_rule(squared: Float[Tensor, "n n"], x: Float[Tensor, "n d"], rule: Rule) -> Float[Tensor, "n n"]:
    n, d = x.shape
    info = torch.finfo(x.dtype)
    # Less than a unit in the last place is rounding: identical rows get a kernel of ones and no gradient.
    floor = info.eps**2 * x.detach().square().sum(1).mean() + info.tiny**0.5
    spread = (squared.sum() / (n * (n - 1))).maximum(floor)
    if rule == "silverman":
        return squared / spread * (d * (n * (d + 2) / 4) ** (2 / (d + 4)))
    if rule != "median":
        raise InputError(f"gram: expected a bandwidth above 0 or one of {get_args(Rule)}, got {rule!r}")
    row, column = torch.triu_indices(n, n, 1, device=x.device)
    middle = squared.detach()[row, column].median().maximum(floor)
    return squared / spread * (spread.detach() / (2 * middle))


def _normalised(gram: Float[Tensor, "*matrices n n"], name: str) -> Float[Tensor, "*matrices n n"]:
    _check.at_least(gram, 2, name)
    if gram.shape[-1] != gram.shape[-2]:
        raise InputError(f"{name}: expected square matrices, got shape {tuple(gram.shape)}")
    matrix = _check.wide(gram, name)
    trace = matrix.detach().diagonal(dim1=-2, dim2=-1).sum(-1)
    if not bool(((trace - 1).abs() <= _check.tolerance(gram.dtype)).all() & matrix.detach().isfinite().all()):
        raise InputError(f"{name}: expected finite matrices of trace 1, got traces {trace.tolist()}; use gram()")
    return matrix
