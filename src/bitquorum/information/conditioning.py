"""Estimate the mutual information that remains when a third, discrete variable is known."""

import math

from jaxtyping import Int, Shaped
from torch import Tensor

from bitquorum.information.estimator import Estimate, Estimator
from bitquorum.interface import InputError


def conditional(
    estimator: Estimator,
    a: Shaped[Tensor, "samples *a"],
    b: Shaped[Tensor, "samples *b"],
    given: Int[Tensor, "samples"],
) -> Estimate:
    r"""Estimate I(A; B | Y) by the mean of the estimates within each value of Y.

    $$\hat I = \sum_y \frac{n_y}{N} \hat I_y, \quad
    \mathrm{se}^2 = \sum_y \frac{n_y^2}{N^2} \mathrm{se}_y^2
    + \frac{1}{N} \sum_y \frac{n_y}{N} (\hat I_y - \hat I)^2$$

    Direction and bias are those of the estimator at the $n_y$ samples of a value, not at all N of them: a table of
    10 x 10 cells is met by 30 samples when 300 are split by ten labels. The second part of the error is the chance in
    how often each value occurs.

    Args:
        estimator: Any estimator; it is called once for each value.
        a: Samples of one variable, as the estimator takes them.
        b: Samples of the other variable.
        given: The integer value y of each sample.

    Raises:
        InputError: if the samples are not paired, `given` holds no integers, or a value has too few samples for the
            estimator.

    Examples:
        >>> from bitquorum.information import PlugIn
        >>> import torch
        >>> bits = torch.tensor([0, 1, 0, 1] * 50)
        >>> copies, constant = conditional(PlugIn(), bits, bits, bits // 2), conditional(PlugIn(), bits, bits, bits)
        >>> print(f"{copies.value:.3f} {constant.value:.3f}")
        1.004 0.000
    """
    whole = not (given.is_floating_point() or given.is_complex())
    if not whole or given.dim() != 1 or not a.shape[:1] == b.shape[:1] == given.shape or len(given) == 0:
        raise InputError(
            f"conditional: expected as many integers as paired samples, got {given.dtype} {tuple(given.shape)} for "
            f"{tuple(a.shape)} and {tuple(b.shape)}"
        )
    values, counts = given.unique(return_counts=True)
    found = [estimator(a[given == value], b[given == value]) for value in values]
    shares = (counts.double() / len(given)).tolist()
    mean = sum(share * part.value for share, part in zip(shares, found, strict=True))
    inside = sum((share * part.standard_error) ** 2 for share, part in zip(shares, found, strict=True))
    between = sum(share * (part.value - mean) ** 2 for share, part in zip(shares, found, strict=True)) / len(given)
    return Estimate(value=mean, standard_error=math.sqrt(inside + between), samples=len(given))
