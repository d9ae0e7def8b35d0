r"""Tabulate and sample laws whose mutual information is known: references for figures, oracles for estimators.

All tables are float64, on the CPU, and sum to one.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from bitquorum.information import _check
from bitquorum.information.tables import xlog2x
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
        >>> symmetric_channel(0.75, 2).tolist()
        [[0.375, 0.125], [0.125, 0.375]]
    """
    _expect_classes(classes)
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
    first, second = accuracy, accuracy if other is None else other
    rates = torch.tensor([first, second], dtype=torch.float64)
    return float(independent_error_bits(rates[0], rates[1], classes))


def independent_error_bits(
    accuracy: Float[Tensor, "*batch"], other: Float[Tensor, "*batch"], classes: int
) -> Float[Tensor, "*batch"]:
    r"""Compute the MI that two members share although they err independently, in closed form.

    $$I = \log_2 C + q \log_2 q + (1 - q) \log_2 \frac{1 - q}{C - 1}, \quad
    q = r s + \frac{(1 - r)(1 - s)}{C - 1}$$

    The predictions agree with probability q and disagree uniformly, so the pair is a symmetric channel itself:
    this is the MI of `independent_error_joint`.

    Args:
        accuracy: The accuracy r of the first member, in [0, 1].
        other: The accuracy s of the second member, of the same shape.
        classes: The number C of classes, at least 2; labels are uniform.

    Returns:
        The MI in bits, in [0, log2 C], in float32 or wider.

    Raises:
        InputError: if a value is out of range.

    Examples:
        >>> accuracies = torch.tensor([1.0, 0.9, 0.1], dtype=torch.float64)
        >>> [round(bits, 2) for bits in independent_error_bits(accuracies, accuracies, 10).tolist()]
        [3.32, 2.02, 0.0]
    """
    r, s = _check.wide(accuracy, "independent_error_bits"), _check.wide(other, "independent_error_bits")
    _expect_classes(classes)
    for rate in (r, s):
        if not bool(((rate >= 0) & (rate <= 1)).all()):
            low, high = float(rate.min()), float(rate.max())
            raise InputError(f"expected probabilities in [0, 1], got {low} to {high}")
    agree = r * s + (1 - r) * (1 - s) / (classes - 1)
    wrong = 1 - agree
    return math.log2(classes) + xlog2x(agree) + xlog2x(wrong) - wrong * math.log2(classes - 1)


def correlated_gaussians(
    information: float, width_a: int, width_b: int, *, samples: int, generator: torch.Generator
) -> tuple[Float[Tensor, "samples a"], Float[Tensor, "samples b"]]:
    r"""Draw two Gaussian vectors of a given MI, spread evenly over the shared dimensions.

    $$b_i = \rho a_i + \sqrt{1 - \rho^2} \, \eta_i, \quad I = -\frac{d}{2} \log_2 (1 - \rho^2), \quad
    d = \min(d_a, d_b)$$

    Further dimensions of the wider vector are independent noise. Any bijection of a or of b leaves the MI as it is.

    Args:
        information: The MI in bits, at least 0.
        width_a: The number of dimensions of a.
        width_b: The number of dimensions of b.
        samples: The number of rows.
        generator: The source of chance.

    Returns:
        Standard normal vectors in float64.

    Raises:
        InputError: if a value is out of range.

    Examples:
        >>> a, b = correlated_gaussians(1.0, 2, 3, samples=5, generator=torch.Generator().manual_seed(0))
        >>> a.shape, b.shape
        (torch.Size([5, 2]), torch.Size([5, 3]))
    """
    if not 0 <= information < math.inf or min(width_a, width_b, samples) < 1:
        raise InputError(
            "correlated_gaussians: expected finite bits >= 0, widths and samples of at least 1, got "
            f"{information}, {width_a}, {width_b} and {samples}"
        )
    shared = min(width_a, width_b)
    noise = 2 ** (-information / shared)
    a, b = (torch.randn(samples, width, generator=generator, dtype=torch.float64) for width in (width_a, width_b))
    b[:, :shared] = math.sqrt(1 - noise**2) * a[:, :shared] + noise * b[:, :shared]
    return a, b


def _expect_classes(classes: int) -> None:
    if classes < 2:
        raise InputError(f"expected at least 2 classes, got {classes}")
