r"""Sum the density of the noise, and its slope, over the thresholds of a quantizer.

With the mean code $M(z) = \sum_k F(z - k - 1/2)$ these are $M'(z)$ and $M''(z)$. Both follow from the lower half of the
range by symmetry about $\mathrm{top} / 2$, where no difference of numbers near one occurs: exact to rounding in both
tails. The sum runs over all thresholds, or over a window that holds every threshold nearer than the law's reach; the
rest contribute less than 1e-7.

- Logistic noise needs one exponential for all thresholds, since $\sigma((x - t) / \rho) = a / (a + c)$ with
  $a = e^{x / \rho}$ and constants $c = e^{t / \rho}$. With many levels even that is too much. Over thresholds without
  end the density is periodic, a Fourier series with the coefficients $2 m \theta / \sinh(m \theta)$,
  $\theta = 2 \pi^2 \rho$ (Poisson's summation; the transform of the logistic density is $x / \sinh x$): four terms at
  the default scale. What the thresholds beyond the range's end add to it at $x$ is what the true ones sum to at $-x$,
  so that one sum serves both sides of zero. It is analytic in $q = e^{-|x| / \rho}$, with its next pole at
  $-e^{1 / (2 \rho)}$: q times a polynomial in $2 q - 1$, by which small sums are as exact as large ones.
- The mean of rounding to nearest has no useful slope; straight-through it is taken for the clip of z, whose slope is 1
  from the lowest level to the highest, both included, and 0 outside.
- The sum of smooth rounding telescopes to $\sigma(z / \rho) - \sigma((z - \mathrm{top}) / \rho)$; in the lower half of
  a wide range the second part is below half a unit in the last place of the first.
"""

import math
from collections.abc import Hashable
from functools import lru_cache, partial
from itertools import chain
from typing import Any, Literal, TypeAlias, no_type_check

import torch
from jaxtyping import Float
from numpy.polynomial.chebyshev import cheb2poly
from torch import Tensor

from bitquorum.interface import InputError
from bitquorum.kernels import choice, layout, noise, polynomial

SmoothLawName = Literal["logistic", "gaussian", "smooth-rounding"]
MeanName = Literal["logistic", "gaussian", "smooth-rounding", "clip"]
Table: TypeAlias = Tensor | tuple[float, ...]  # on a device for compiled code, where a number would be a constant

# In scales: beyond, the density is below 1e-7; the end of a smooth clip, below half a unit in the last place of 1/2.
_REACH = {"logistic": 17.0, "gaussian": 5.5, "smooth-rounding": 18.0}
_LARGEST = 80.0  # of the exponents, for float32
_END = 19.0  # digits, in natural logarithms, of the polynomial for the thresholds beyond the end
_TINY = 60.0  # exponent of the least density: smaller ones would soon be denormal numbers
_POWERS = 15  # coefficients of a Fourier series up to which powers of the cosine are as exact, and which compile soon
_FOURIER = 22.0  # the multiple of theta from which a coefficient is below 1e-7
_ONE_BY_ONE = 6  # thresholds up to which the plain sum is cheaper
UNROLLED = 40  # thresholds in a compiled kernel; more take too long to compile


def fits(law: SmoothLawName, top: int, scale: float) -> bool:
    """Return whether the sums stay inside float32: only very narrow logistic noise leaves it."""
    return _exponents_fit(law, top / 2 if _half(law, top, scale) is None else 0.5, scale)


def slope(z: Float[Tensor, "*shape"], *, law: SmoothLawName, top: int, scale: float) -> Float[Tensor, "*shape"]:
    """Return $M'(z)$, without a graph and in the memory order of `z`.

    Args:
        z: Values in steps above the lowest level.
        law: `logistic`, `gaussian` or `smooth-rounding`.
        top: The largest code.
        scale: Of the noise, in steps.

    Raises:
        InputError: if the noise is too narrow for float32; `fits` tells beforehand.

    Examples:
        >>> slope(torch.tensor([0.5, 7.5, 14.5]), law="logistic", top=15, scale=0.5)
        tensor([0.7510, 1.0020, 0.7510])
    """
    return _run(z, law, top, scale, 1)[0]


def slope_and_curvature(
    z: Float[Tensor, "*shape"], *, law: SmoothLawName, top: int, scale: float
) -> tuple[Float[Tensor, "*shape"], Float[Tensor, "*shape"]]:
    """Return $M'(z)$ and $M''(z)$ in one pass; arguments as in `slope`.

    Examples:
        >>> slope_and_curvature(torch.tensor([0.5, 1.0, 1.5]), law="gaussian", top=2, scale=0.5)[1]
        tensor([ 0.4319,  0.0000, -0.4319])
    """
    first, second = _run(z, law, top, scale, 2)
    return first, second


@torch.no_grad()
def _run(z: Tensor, law: SmoothLawName, top: int, scale: float, order: int) -> list[Tensor]:
    if not fits(law, top, scale):
        raise InputError(f"expected {law} noise that fits float32, got scale={scale} on {top + 1} levels; widen it")
    half = _half(law, top, scale)
    table = _table(law, top, half, scale)
    constants = {**_constants(law, top, scale), "order": order}
    if compiles(law, top, scale) and choice.applies(z):
        flat = layout.flatten(z.detach()).contiguous()
        results = choice.call(sums, flat, noise.numbers(table, z.device), **constants)
        if results is not None:
            return [layout.unflatten(result, z) for result in results]
    return layout.by_blocks(z, lambda part: sums(part, table, **constants), order)


def compiles(law: MeanName, top: int, scale: float) -> bool:
    """Return whether the sums are short enough for compiled code, and inside float32."""
    if law in ("smooth-rounding", "clip"):
        return True
    half = _half(law, top, scale)
    if law == "logistic" and half is not None:
        return fits(law, top, scale) and _terms(scale) < _POWERS
    return fits(law, top, scale) and (top if half is None else 2 * half + 1) <= UNROLLED


def compiled_table(
    law: MeanName, top: int, scale: float, device: torch.device
) -> tuple[Float[Tensor, "entries"], dict[str, Hashable]]:
    """Return the table of numbers and the constants that `sums` takes in compiled code, but for its order."""
    return noise.numbers(_table(law, top, _half(law, top, scale), scale), device), _constants(law, top, scale)


def _constants(law: MeanName, top: int, scale: float) -> dict[str, Hashable]:
    half = _half(law, top, scale)
    terms = _terms(scale) if law == "logistic" and half is not None else 0
    return {"law": law, "top": top, "half": half, "terms": terms}


def _exponents_fit(law: SmoothLawName, reach: float, scale: float) -> bool:
    return law != "logistic" or reach / scale < _LARGEST


def _half(law: MeanName, top: int, scale: float) -> int | None:
    """Return how many thresholds on a side are summed one by one, or `None` to sum all of them so.

    Smooth rounding has two ends in place of thresholds: 0 leaves the far one out. Logistic noise has a polynomial in
    place of those beyond an end, with so many coefficients. A clip has neither.
    """
    if law == "clip":
        return None
    if law == "smooth-rounding":
        return 0 if top / 2 > _REACH[law] * scale else None
    if law == "logistic":  # the thresholds above the highest, which the series counts, must be out of reach
        pole = 1 + 2 * math.exp(min(0.5 / scale, _LARGEST))  # of the polynomial, in 2 q - 1, to the left
        half = math.ceil(_END / math.acosh(pole)) + 1
        far, cheaper = (top + 1) / 2 < _REACH[law] * scale, top <= _ONE_BY_ONE
        return None if far or (cheaper and _exponents_fit(law, top / 2, scale)) else half
    half = math.ceil(_REACH[law] * scale) + 1
    return None if 3 * (2 * half + 1) >= 2 * top else half


def _terms(scale: float) -> int:
    """Return how many terms the Fourier series of logistic densities takes."""
    return int(_FOURIER / (2 * math.pi**2 * scale))


@lru_cache(maxsize=256)
def _table(law: MeanName, top: int, half: int | None, scale: float) -> tuple[float, ...]:
    """Return 1 / scale, the least argument in scales, and a constant for each threshold; or, for series, their own."""
    if law in ("smooth-rounding", "clip"):
        return (1 / scale,)
    if law == "logistic" and half is not None:
        ends = (polynomial.fit(partial(_end, scale, order), half, -1.0, 1.0) for order in (1, 2))
        return (-1 / (scale * math.log(2)), *_fourier(scale), *chain.from_iterable(ends))
    if half is None:
        offsets = [k + 0.5 - top / 2 for k in range(top)]
        least = offsets[0] / scale - 30.0
    else:
        offsets = [k + 0.5 for k in range(-half, half + 1)]
        least = -1 / scale  # below the window everything is masked
    constants = (math.exp(t / scale) if law == "logistic" else t / scale for t in offsets)
    return (1 / scale, least, *constants)


def _fourier(scale: float) -> tuple[float, ...]:
    """Return the coefficients of cosines of multiples of an angle or, where they are few, of powers of its cosine.

    Powers are cheaper in compiled code; of many they would cancel.
    """
    theta = 2 * math.pi**2 * scale
    series = [1.0, *((-1) ** m * 2 * m * theta / math.sinh(m * theta) for m in range(1, _terms(scale) + 1))]
    return tuple(cheb2poly(series).tolist()) if len(series) <= _POWERS else tuple(series)


def _end(scale: float, order: int, place: Tensor) -> Tensor:
    """Return the densities (or their slopes) of thresholds |x| + 1/2, |x| + 3/2, ... away, over q, at 2 q - 1."""
    thresholds = torch.arange(math.ceil(45 * scale) + 1, dtype=torch.float64, device="cpu") + 0.5
    decay = torch.exp(-thresholds / scale)
    y = (1 + place[:, None]) / 2 * decay
    density = decay / (1 + y) ** 2 / scale
    return (density if order == 1 else density * (1 - y) / (1 + y) / scale).sum(1)


# The functions below are traced by the compiler; type checks at run time would break the trace.


@no_type_check
def sums(
    z: Float[Tensor, "count"],
    table: Table,
    *,
    law: MeanName,
    top: int,
    half: int | None,
    terms: int,
    order: int,
) -> tuple[Float[Tensor, "count"], ...]:
    """Return the slope and, for order 2, the curvature."""
    if law == "clip":
        inside = ((z >= 0) & (z <= top)).to(z.dtype)
        return (inside,) if order == 1 else (inside, torch.zeros_like(z))
    if law == "smooth-rounding":
        return _smooth_rounding(z, table, top, half, order)
    x = torch.minimum(z, top - z)
    if law == "logistic" and half is not None:
        sums = _logistic_periodic(x, table, half, terms, order)
    else:
        anchor = None if half is None else x.floor().clamp_(min=-half - 1)
        x.sub_(top / 2 if half is None else anchor).mul_(table[0]).clamp_(min=table[1])
        sums = _logistic(x, table, top, order) if law == "logistic" else _gaussian(x, anchor, table, top, half, order)
        sums[0].mul_(table[0])
        if order == 2:
            sums[1].mul_(table[0]).mul_(table[0])
    if order == 2:
        sums[1].mul_((top - 2 * z).sign_())
    return sums


@no_type_check
def _smooth_rounding(z: Tensor, table: Table, top: int, half: int | None, order: int) -> tuple[Tensor, ...]:
    x = torch.minimum(z, top - z)
    s = torch.sigmoid((x * table[0]).clamp(min=-_TINY))
    t = torch.sigmoid(((x - top) * table[0]).clamp(min=-_TINY)) if half is None else 0.0
    if order == 1:
        return (s - t,)
    return s - t, (s * (1 - s) - t * (1 - t)) * table[0] * (top - 2 * z).sign()


@no_type_check
def _logistic(x: Tensor, table: Table, top: int, order: int) -> tuple[Tensor, ...]:
    a, s, first = x.exp_(), torch.empty_like(x), torch.zeros_like(x)
    square, second = (torch.empty_like(x), torch.zeros_like(x)) if order == 2 else (None, None)
    for index in range(top):
        torch.add(a, table[2 + index], out=s)
        torch.div(a, s, out=s)
        if order == 1:
            first.add_(s).addcmul_(s, s, value=-1)  # s (1 - s)
        else:
            torch.mul(s, s, out=square)
            first.add_(s).sub_(square)
            second.add_(square).addcmul_(square, s, value=-1)  # s^2 (1 - s)
    return (first,) if order == 1 else (first, second.mul_(-2).add_(first))


@no_type_check
def _logistic_periodic(x: Tensor, table: Table, half: int, terms: int, order: int) -> tuple[Tensor, ...]:
    """Sum over thresholds from 1/2 to infinity; x in steps, in the lower half."""
    q = polynomial.exp2((x.abs() * table[0]).clamp(min=-_TINY))
    place = 2 * q - 1
    series = [table[1 + m] for m in range(terms + 1)]
    ends = [[table[2 + terms + n * half + m] for m in range(half)] for n in range(order)]
    inside, turns = x >= 0, x.clamp(min=0)
    turns = turns - turns.round()
    cosine = polynomial.cosine(turns)
    end = polynomial.horner(ends[0], place) * q
    first = torch.where(inside, _cosines(cosine, series) - end, end)
    if order == 1:
        return (first,)
    second = polynomial.sine(turns) * _slope_of_cosines(cosine, series) * (-2 * math.pi)
    return first, torch.where(inside, second, 0.0) + polynomial.horner(ends[1], place) * q


@no_type_check
def _cosines(c: Tensor, series: list[Any]) -> Tensor:
    """Return the Fourier series at the angle with cosine c; see `_fourier`."""
    if len(series) <= _POWERS:
        return polynomial.horner(series, c)
    a = b = torch.zeros_like(c)
    for coefficient in reversed(series[1:]):
        a, b = coefficient + 2 * c * a - b, a
    return series[0] + c * a - b


@no_type_check
def _slope_of_cosines(c: Tensor, series: list[Any]) -> Tensor:
    """Return the derivative of `_cosines` by c."""
    if len(series) <= _POWERS:
        return polynomial.horner([m * series[m] for m in range(1, len(series))] or [0.0], c)
    a = b = torch.zeros_like(c)
    for m in range(len(series) - 1, 0, -1):
        a, b = m * series[m] + 2 * c * a - b, a
    return a


@no_type_check
def _gaussian(
    x: Tensor, anchor: Tensor | None, table: Table, top: int, half: int | None, order: int
) -> tuple[Tensor, ...]:
    d, p, first = torch.empty_like(x), torch.empty_like(x), torch.zeros_like(x)
    second = torch.zeros_like(x) if order == 2 else None
    for index in range(top if half is None else 2 * half + 1):
        torch.sub(x, table[2 + index], out=d)
        torch.mul(d, d, out=p).mul_(-0.5).exp_()
        if half is not None:
            p.mul_(anchor >= half - index)
        first.add_(p)
        if order == 2:
            second.addcmul_(p, d, value=-1)
    factor = 1 / math.sqrt(2 * math.pi)
    return (first.mul_(factor),) if order == 1 else (first.mul_(factor), second.mul_(factor))
