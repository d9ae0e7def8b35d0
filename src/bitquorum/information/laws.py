r"""Tabulate laws whose mutual information is known, as references for figures and oracles for estimators.

All tables are float64, on the CPU, and sum to one.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from bitquorum.information.tables import mutual_information
from bitquorum.interface import InputError


def symmetric_channel(accuracy: float, classes: int) -> Float[Tensor, "y a"]:
    r"""Tabulate a uniform label and a prediction that errs uniformly.

    $$P(y, a) = \frac{1}{C} \cdot \begin{cases} r & a = y \\ (1 - r) / (C - 1) & a \neq y \end{cases}$$

    Its MI is $\log_2 C - h(r) - (1 - r) \log_2 (C - 1)$ bits with h the binary entropy.

    Args:
        accuracy: The probability r of a right prediction, in [0, 1].
        classes: The number C of classes, at least 2.

    Raises:
        InputError: if a value is out of range.

    Examples:
        >>> mutual_information(symmetric_channel(1.0, 4)).item()
        2.0
    """
    if classes < 2:
        raise InputError(f"expected at least 2 classes, got {classes}")
    if not 0.0 <= accuracy <= 1.0:
        raise InputError(f"expected a probability in [0, 1], got {accuracy}")
    wrong = (1 - accuracy) / (classes - 1)
    table = torch.full((classes, classes), wrong, dtype=torch.float64)
    return table.fill_diagonal_(accuracy) / classes


def binary_symmetric_channel(p: float) -> Float[Tensor, "2 2"]:
    """Tabulate a fair bit and its copy that is flipped with probability `p`; its MI is 1 - h(p) bits.

    Raises:
        InputError: if `p` is not in [0, 1].

    Examples:
        >>> binary_symmetric_channel(0.25).tolist()
        [[0.375, 0.125], [0.125, 0.375]]
    """
    return symmetric_channel(1 - p, 2)


def independent_error_joint(
    accuracy: float, classes: int, *, other: float | None = None
) -> Float[Tensor, "classes classes"]:
    r"""Tabulate the predictions of two members that err independently of each other given a uniform label.

    $$P(a, b) = \sum_y P(y) \, P(a \mid y) \, P(b \mid y)$$

    Args:
        accuracy: The accuracy of the first member, in [0, 1].
        classes: The number of classes, at least 2.
        other: The accuracy of the second member; that of the first when omitted.

    Raises:
        InputError: if a value is out of range.

    Examples:
        >>> independent_error_joint(0.5, 2).tolist()
        [[0.25, 0.25], [0.25, 0.25]]
    """
    first = symmetric_channel(accuracy, classes)
    second = symmetric_channel(accuracy if other is None else other, classes)
    return classes * first.T @ second


def independent_error_information(accuracy: float, classes: int, *, other: float | None = None) -> float:
    """Compute the MI in bits that two members share although they err independently.

    Args:
        accuracy: The accuracy of the first member, in [0, 1].
        classes: The number of classes, at least 2.
        other: The accuracy of the second member; that of the first when omitted.

    Raises:
        InputError: if a value is out of range.

    Examples:
        >>> round(independent_error_information(0.9, 10), 2)
        2.02
    """
    return float(mutual_information(independent_error_joint(accuracy, classes, other=other)))
