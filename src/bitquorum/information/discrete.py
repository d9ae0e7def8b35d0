r"""Estimate the mutual information of discrete variables from samples, with the bias of the plug-in.

The plug-in, MI of the table of relative counts, is biased upwards: to first order in 1/N by
$(K_{ab} - K_a - K_b + 1) / (2 N \ln 2)$ bits, with K the numbers of cells, rows and columns that have mass.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, final, get_args

from jaxtyping import Float, Int, Shaped
from torch import Tensor

from bitquorum.information import _codes
from bitquorum.information.estimator import Bound, Estimate, Estimator
from bitquorum.information.tables import xlog2x
from bitquorum.interface import InputError

Correction = Literal["miller-madow", "jackknife", "none"]


def plug_in_bias(a: int, b: int, n: int, *, cells: int | None = None) -> float:
    r"""Compute the first-order bias of the plug-in MI of a table.

    $$E[\hat I] - I \approx \frac{K_{ab} - K_a - K_b + 1}{2 n \ln 2} = \frac{(a - 1)(b - 1)}{2 n \ln 2}
    \text{ if every cell has mass}$$

    Args:
        a: Number of rows with mass.
        b: Number of columns with mass.
        n: Number of samples.
        cells: Number of cells with mass; all a b of them when omitted, which is the largest bias.

    Returns:
        The bias in bits; negative for a table with fewer cells than a + b - 1, such as a diagonal one.

    Raises:
        InputError: if a number is below one, or `cells` is not in [max(a, b), a b].

    Reference: Miller, 1955, note on the bias of information estimates; Roulston, 1999, estimating the errors
    on measured entropy and mutual information.

    Examples:
        >>> [round(plug_in_bias(10, 10, n), 3) for n in (128, 1000, 10000)]
        [0.456, 0.058, 0.006]
    """
    if min(a, b, n) < 1:
        raise InputError(f"plug_in_bias: expected a, b and n of at least 1, got {a}, {b} and {n}")
    occupied = a * b if cells is None else cells
    if not max(a, b) <= occupied <= a * b:
        raise InputError(f"plug_in_bias: expected cells in [{max(a, b)}, {a * b}], got {cells}")
    return (occupied - a - b + 1) / (2 * n * math.log(2))


def occupied_bias(counts: Int[Tensor, "a b"]) -> float:
    """Compute `plug_in_bias` with the rows, columns and cells that are occupied in a table of counts.

    Subtracting it from the plug-in MI is the Miller-Madow correction of its three entropies.

    Raises:
        InputError: if `counts` is no two-dimensional table of integers >= 0 with at least one sample.

    Examples:
        >>> import torch
        >>> round(occupied_bias(torch.tensor([[5, 0], [0, 5]])), 4)
        -0.0721
    """
    whole = not (counts.is_floating_point() or counts.is_complex())
    if counts.dim() != 2 or not whole or counts.numel() == 0 or int(counts.min()) < 0 or int(counts.sum()) == 0:
        raise InputError(
            "occupied_bias: expected a table [a, b] of integer counts >= 0 with at least one sample, got "
            f"{counts.dtype} of shape {tuple(counts.shape)}"
        )
    filled = counts > 0
    rows, columns = int(filled.any(1).sum()), int(filled.any(0).sum())
    return plug_in_bias(rows, columns, int(counts.sum()), cells=int(filled.sum()))


@final
@dataclass(frozen=True, kw_only=True)
class PlugIn(Estimator):
    r"""Estimate the MI of integer codes by the MI of their table of relative counts.

    $$\hat I = \sum_{ab} \frac{n_{ab}}{N} i_{ab} - \mathrm{bias},
    \quad i_{ab} = \log_2 \frac{n_{ab} N}{n_a n_b}$$

    The correction `miller-madow` subtracts `plug_in_bias` of the occupied cells, which is too little where cells
    are so rare that many stay empty. `jackknife` subtracts $(N - 1) (\overline{I_{-n}} - I)$ with $I_{-n}$ the
    plug-in MI without sample n; it needs no number of cells. Neither result is clipped at zero, which would bias
    it again.

    The standard error is that of the delta method to first order, $\sqrt{\mathrm{var}(i) / N}$, or of the
    jackknife: right to leading order where the variables depend on each other, up to 1.4 times too large where
    they do not. It does not hold the bias, so quote the estimate only when N is well above the number of
    occupied cells.

    References: Miller, 1955; Paninski, 2003, estimation of entropy and mutual information, section 4; Efron and
    Stein, 1981, the jackknife estimate of variance.

    Args:
        correction: `miller-madow`, `jackknife` or `none`.

    Raises:
        InputError: if the correction is unknown, or the codes are not integers, of one dimension and paired; for
            `jackknife` also if there are fewer than two.

    Examples:
        >>> import torch
        >>> a = torch.tensor([0, 1] * 50)
        >>> PlugIn(correction="none")(a, 7 - a)
        Estimate(value=1.0, standard_error=0.0, samples=100)
    """

    bound: ClassVar[Bound] = "plug-in"

    correction: Correction = "miller-madow"

    def __post_init__(self) -> None:
        """Refuse an unknown correction."""
        if self.correction not in get_args(Correction):
            raise InputError(f"PlugIn: expected a correction of {get_args(Correction)}, got {self.correction!r}")

    def __call__(self, a: Shaped[Tensor, "samples"], b: Shaped[Tensor, "samples"]) -> Estimate:
        """Return the estimate for two vectors of integer codes; any integers, any number of them."""
        counts = _codes.count(a, b, "PlugIn")
        if self.correction == "jackknife":
            return _jackknife(counts)
        n = counts.samples
        value = float((counts.cells / n * counts.pointwise()).sum())
        if self.correction == "miller-madow":
            value -= plug_in_bias(len(counts.rows), len(counts.columns), n, cells=len(counts.cells))
        return Estimate(value=value, standard_error=counts.standard_error(), samples=n)


def _jackknife(counts: _codes.Counts) -> Estimate:
    """Leave out one sample of each occupied cell in turn, weighted by the samples of that cell."""
    n = counts.samples
    if n < 2:
        raise InputError("PlugIn: expected at least two samples for a jackknife, got one")
    cells, rows, columns = counts.cells, counts.rows, counts.columns
    total = xlog2x(cells).sum() - xlog2x(rows).sum() - xlog2x(columns).sum()
    change = _step(cells) - _step(rows)[counts.row] - _step(columns)[counts.column]
    without = math.log2(n - 1) + (total - change) / (n - 1)
    centre = (cells / n * without).sum()
    variance = (n - 1) * (cells / n * (without - centre).square()).sum()
    value = n * (math.log2(n) + total / n) - (n - 1) * centre
    return Estimate(value=float(value), standard_error=float(variance.sqrt()), samples=n)


def _step(counts: Float[Tensor, "k"]) -> Float[Tensor, "k"]:
    return xlog2x(counts) - xlog2x(counts - 1)
