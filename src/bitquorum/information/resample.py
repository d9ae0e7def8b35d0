r"""Correct the bias of a functional of a mean table, and state its standard error, by leaving out examples.

An example may contribute a whole table: the pooled votes of many draws, or the product of two predictive
distributions. Its entries depend on each other, so it is left out as a whole; the number of draws never counts
as the number of samples.
"""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from bitquorum.information import _check
from bitquorum.information.estimator import Estimate
from bitquorum.interface import InputError

_ENTRIES = 1 << 20  # of the tables that are held at once


@torch.no_grad()
def jackknife(contributions: Float[Tensor, "examples *table"], functional: Callable[[Tensor], Tensor]) -> Estimate:
    r"""Estimate a functional of the mean of per-example tables by leaving out one example at a time.

    $$\hat f = N f(\bar t) - (N - 1) \overline{f_{-n}}, \quad
    \mathrm{se}^2 = \frac{N - 1}{N} \sum_n (f_{-n} - \overline{f_{-n}})^2$$

    with $f_{-n}$ the functional of the mean without example n. The bias of order 1/N goes; of order 1/N^2 and of
    events rarer than 1/N it keeps what it had, so the result has no bound. It is not clipped: a quantity that is
    never negative can get a negative estimate, which is what makes the mean right. Where the functional is at its
    minimum, as MI is for independent variables, the standard error is up to 1.4 times too large.

    Args:
        contributions: The table of each example, at least two; their mean is the table that is measured. The
            table of one draw is one-hot, that of several draws their mean.
        functional: Map tables `[*batch, *table]` to `[*batch]`, such as `mutual_information`. It is called in
            float64 on slices that hold 2^20 entries.

    Returns:
        The corrected value, its standard error and the number of examples, in the unit of the functional.

    Raises:
        InputError: if there are fewer than two examples or they are not floating point, or the functional
            returns another shape or a value that is not finite.

    Reference: Quenouille, 1956, notes on bias in estimation; Efron and Stein, 1981, the jackknife estimate of
    variance.

    Examples:
        >>> from bitquorum.information.tables import mutual_information
        >>> hot = torch.eye(4).view(4, 2, 2).repeat(100, 1, 1)
        >>> plain, corrected = mutual_information(hot.mean(0)).item(), jackknife(hot, mutual_information)
        >>> print(f"{plain:.4f} {corrected.value:.4f} of {corrected.samples}")
        0.0000 -0.0018 of 400
    """
    return of_left_out(leave_one_out(contributions, functional))


@torch.no_grad()
def leave_one_out(
    contributions: Float[Tensor, "examples *table"], functional: Callable[[Tensor], Tensor]
) -> Float[Tensor, "values"]:
    """Return a functional of the mean of all tables, and then of the mean without each of the examples in turn.

    What is linear in the functional's values, such as a mean over pairs of variables or a difference, may be computed
    of several such results before `of_left_out` makes an estimate of it: tables of one pair at a time need be held.

    Args:
        contributions: As for `jackknife`.
        functional: As for `jackknife`.

    Raises:
        InputError: as `jackknife` does.
    """
    values = _check.wide(contributions, "jackknife").double()
    count = values.shape[0] if values.dim() else 0
    if count < 2:
        raise InputError(f"jackknife: expected [examples >= 2, *table], got shape {tuple(values.shape)}")
    mean = values.mean(0)
    # Sums of numbers >= 0 less one of them can be rounded to below zero, which a functional of laws refuses.
    floor = 0.0 if bool((values >= 0).all()) else -math.inf
    size = max(1, _ENTRIES // max(1, mean.numel()))
    left = [
        _measure(functional, (mean + (mean - part) / (count - 1)).clamp_min(floor), mean.dim())
        for part in values.split(size)
    ]
    return torch.cat([_measure(functional, mean[None], mean.dim()), *left])


def of_left_out(values: Float[Tensor, "values"]) -> Estimate:
    """Return the jackknife's estimate from what `leave_one_out` returned."""
    whole, without = values[0], values[1:]
    count, centre = len(without), without.mean()
    value = count * whole - (count - 1) * centre
    spread = (without - centre).square().sum() * (count - 1) / count
    if not bool(value.isfinite() & spread.isfinite()):
        raise InputError(f"jackknife: expected a functional with finite values, got an estimate of {float(value)}")
    return Estimate(value=float(value), standard_error=float(spread.sqrt()), samples=count)


def _measure(functional: Callable[[Tensor], Tensor], tables: Tensor, dims: int) -> Float[Tensor, "batch"]:
    result = functional(tables)
    if result.shape != tables.shape[: tables.dim() - dims]:
        raise InputError(
            f"jackknife: expected a functional that maps {tuple(tables.shape)} to {tuple(tables.shape[:1])}, "
            f"got {tuple(result.shape)}"
        )
    return result.double()
