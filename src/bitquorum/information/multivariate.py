r"""Compute how several variables of a probability table depend on each other, exactly and in bits.

For three or more variables there is no single mutual information. For members A, B and the label Y, the
interaction information says whether the members together know more about the label than the sum of each alone.
Gradients are finite, as in `tables`.
"""

from itertools import combinations

import torch
from jaxtyping import Float
from torch import Tensor

from bitquorum.information import _check
from bitquorum.information.tables import xlog2x
from bitquorum.interface import InputError


def total_correlation(joint: Float[Tensor, "..."], *, variables: int | None = None) -> Float[Tensor, "..."]:
    r"""Compute the total correlation: how far the variables are from independence.

    $$T(X_1; \ldots; X_n) = \sum_i H(X_i) - H(X_1, \ldots, X_n)$$

    Args:
        joint: Tables of joint probabilities; each sums to one over its last `variables` dimensions.
        variables: The number n of variables, at least 2; all dimensions when omitted.

    Returns:
        The total correlation of each table in bits, in [0, sum of log2 sizes less the largest]; the MI for two.

    Raises:
        InputError: if a table is no distribution or has too few dimensions.

    Reference: Watanabe, 1960, information theoretical analysis of multivariate correlation.

    Examples:
        >>> total_correlation(torch.tensor([[[0.5, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 0.5]]])).item()
        2.0
    """
    p, dims = _table(joint, variables, "total_correlation")
    singles = sum((_entropy(p, dims, (dim,)) for dim in dims), torch.zeros((), dtype=p.dtype, device=p.device))
    return singles - _entropy(p, dims, dims)


def dual_total_correlation(joint: Float[Tensor, "..."], *, variables: int | None = None) -> Float[Tensor, "..."]:
    r"""Compute the dual total correlation: the entropy that no variable has for itself.

    $$D(X_1; \ldots; X_n) = H(X_1, \ldots, X_n) - \sum_i H(X_i \mid X_{-i})$$

    Args:
        joint: Tables of joint probabilities; each sums to one over its last `variables` dimensions.
        variables: The number n of variables, at least 2; all dimensions when omitted.

    Returns:
        The dual total correlation of each table in bits, in [0, joint entropy]; the MI for two variables.

    Raises:
        InputError: if a table is no distribution or has too few dimensions.

    Reference: Han, 1978, nonnegative entropy measures of multivariate symmetric correlations.

    Examples:
        >>> dual_total_correlation(torch.tensor([[[0.5, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 0.5]]])).item()
        1.0
    """
    p, dims = _table(joint, variables, "dual_total_correlation")
    whole = _entropy(p, dims, dims)
    others = [_entropy(p, dims, tuple(other for other in dims if other != dim)) for dim in dims]
    return torch.stack(others).sum(0) - (len(dims) - 1) * whole


def interaction_information(joint: Float[Tensor, "..."], *, variables: int | None = None) -> Float[Tensor, "..."]:
    r"""Compute the interaction information, positive for synergy.

    $$I(A; B; Y) = I(A; B \mid Y) - I(A; B) = I(Y; A, B) - I(Y; A) - I(Y; B)$$

    This is McGill's sign: parity has +1 bit, three copies of a bit have -1; the co-information of three
    variables is its negative. For n variables it is $-\sum_T (-1)^{n - |T|} H(T)$ over the nonempty subsets T; for
    two it is the MI. It does not depend on the order of the variables.

    Args:
        joint: Tables of joint probabilities; each sums to one over its last `variables` dimensions.
        variables: The number n of variables, at least 2; all dimensions when omitted.

    Returns:
        The interaction information of each table in bits; for three variables within plus and minus the smallest
        log2 of a size.

    Raises:
        InputError: if a table is no distribution or has too few dimensions.

    Reference: McGill, 1954, multivariate information transmission.

    Examples:
        >>> parity = torch.tensor([[[0.25, 0.0], [0.0, 0.25]], [[0.0, 0.25], [0.25, 0.0]]])
        >>> interaction_information(parity).item()
        1.0
    """
    p, dims = _table(joint, variables, "interaction_information")
    terms = [
        (-1) ** (len(dims) - size + 1) * _entropy(p, dims, kept)
        for size in range(1, len(dims) + 1)
        for kept in combinations(dims, size)
    ]
    return torch.stack(terms).sum(0)


def _table(joint: Float[Tensor, "..."], variables: int | None, name: str) -> tuple[Tensor, tuple[int, ...]]:
    count = joint.dim() if variables is None else variables
    if not 2 <= count <= joint.dim():
        raise InputError(f"{name}: expected 2 to {joint.dim()} variables for shape {tuple(joint.shape)}, got {count}")
    dims = tuple(range(-count, 0))
    return _check.distribution(joint, dims, name), dims


def _entropy(p: Float[Tensor, "..."], dims: tuple[int, ...], kept: tuple[int, ...]) -> Float[Tensor, "..."]:
    """Return the entropy of the variables `kept` of the variables `dims`, both counted from the end."""
    gone = tuple(dim for dim in dims if dim not in kept)
    marginal = p.sum(gone) if gone else p
    return -xlog2x(marginal).sum(tuple(range(-len(kept), 0)))
