r"""Compute entropy and mutual information of probability tables, exactly and in bits.

Every quantity is a sum of $p \log_2 p$ over the table and its marginals, with $0 \log 0 = 0$. There the
derivative is infinite; it is cut at $\log_2$ of the smallest normal number (-126 in float32), so gradients
stay finite and keep their sign. Inside a row or column without mass the cuts cancel and the derivative is the
exact one. Half precision is computed in float32. Rounding can leave an MI of zero at about -1e-7 in float32.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from bitquorum.information import _check


def entropy(p: Float[Tensor, "..."], dim: int | tuple[int, ...] = -1) -> Float[Tensor, "..."]:
    r"""Compute the Shannon entropy over `dim`.

    $$H(p) = -\sum_k p_k \log_2 p_k$$

    Args:
        p: Probabilities that sum to one over `dim`.
        dim: The dimension, or dimensions, that are summed over.

    Returns:
        The entropy in bits, in [0, log2 of the number of outcomes], of the shape of `p` without `dim`.

    Raises:
        InputError: if `p` is no distribution over `dim`.

    Reference: Shannon, 1948, A mathematical theory of communication, section 6.

    Examples:
        >>> entropy(torch.tensor([[0.5, 0.5], [1.0, 0.0]])).tolist()
        [1.0, 0.0]
    """
    return (-xlog2x(_check.distribution(p, dim, "entropy"))).sum(dim)


def mutual_information(joint: Float[Tensor, "*tables a b"]) -> Float[Tensor, "*tables"]:
    r"""Compute the mutual information of the two variables of a table.

    $$I(A; B) = \sum_{ab} P_{ab} \log_2 \frac{P_{ab}}{P_a P_b}$$

    Args:
        joint: Tables of joint probabilities; each sums to one over its last two dimensions.

    Returns:
        The MI of each table in bits, in [0, min(log2 a, log2 b)].

    Raises:
        InputError: if a table is no distribution.

    Reference: Cover and Thomas, 2006, Elements of information theory, eq. 2.28.

    Examples:
        >>> mutual_information(torch.eye(4) / 4).item()
        2.0
    """
    _check.at_least(joint, 2, "mutual_information")
    p = _check.distribution(joint, (-2, -1), "mutual_information")
    return xlog2x(p).sum((-2, -1)) - xlog2x(p.sum(-1)).sum(-1) - xlog2x(p.sum(-2)).sum(-1)


def conditional_mutual_information(joint: Float[Tensor, "*tables y a b"]) -> Float[Tensor, "*tables"]:
    r"""Compute the mutual information of A and B that remains when Y is known.

    $$I(A; B \mid Y) = \sum_y P(y) \, I(A; B \mid Y = y)$$

    It is computed as H(A, Y) + H(B, Y) - H(A, B, Y) - H(Y), so a class without mass needs no special case.

    Args:
        joint: Tables of joint probabilities; each sums to one over its last three dimensions.

    Returns:
        The conditional MI of each table in bits, in [0, min(log2 a, log2 b)].

    Raises:
        InputError: if a table is no distribution.

    Reference: Cover and Thomas, 2006, Elements of information theory, eq. 2.60.

    Examples:
        >>> parity = torch.tensor([[[0.25, 0.0], [0.0, 0.25]], [[0.0, 0.25], [0.25, 0.0]]])
        >>> conditional_mutual_information(parity).item(), mutual_information(parity.sum(0)).item()
        (1.0, 0.0)
    """
    _check.at_least(joint, 3, "conditional_mutual_information")
    p = _check.distribution(joint, (-3, -2, -1), "conditional_mutual_information")
    both = xlog2x(p).sum((-3, -2, -1)) + xlog2x(p.sum((-2, -1))).sum(-1)
    return both - xlog2x(p.sum(-1)).sum((-2, -1)) - xlog2x(p.sum(-2)).sum((-2, -1))


def xlog2x(p: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Compute p log2 p, with 0 at 0 and a finite derivative there."""
    return p * p.clamp_min(torch.finfo(p.dtype).tiny).log2()
