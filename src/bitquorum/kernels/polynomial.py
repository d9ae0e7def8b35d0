r"""Approximate smooth functions by polynomials, among them the elementary ones that noise and slopes are made of.

A library's logarithm, exponential or cosine serves every float32 number, and costs a CPU some forty cycles for sixteen
of them. Those here know the range of their arguments, and stay within a few units in the last place. Plain code, where
each operation would be a pass of its own, and CUDA, which has fast ones, take those of torch.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, no_type_check

import torch
from jaxtyping import Float
from torch import Tensor


def fit(function: Callable[[Tensor], Tensor], terms: int, low: float, high: float) -> tuple[float, ...]:
    """Return the coefficients, by rising powers, of the polynomial that equals a function at Chebyshev's nodes.

    Examples:
        >>> [round(coefficient, 6) for coefficient in fit(lambda x: 1 + 2 * x + 3 * x**2, 3, 0.0, 2.0)]
        [1.0, 2.0, 3.0]
    """
    angles = (torch.arange(terms, dtype=torch.float64, device="cpu") + 0.5) * (math.pi / terms)
    nodes = (low + high) / 2 + (high - low) / 2 * angles.cos()
    unit = max(abs(low), abs(high))  # powers of numbers up to 1 are what a solver bears
    solved = torch.linalg.solve(torch.linalg.vander(nodes / unit, N=terms), function(nodes))
    return tuple(value / unit**power for power, value in enumerate(solved.tolist()))


# The functions below are traced by the compiler; type checks at run time would break the trace. Coefficients are those
# that `fit` gives, and literals: a number with a name would be read from memory, in double precision.


@no_type_check
def horner(coefficients: Sequence[Any], x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Return the polynomial with these coefficients, by rising powers, at x."""
    total = coefficients[-1]
    for coefficient in coefficients[-2::-1]:
        total = total * x + coefficient
    return total


@no_type_check
def logit(u: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    r"""Return $\log(u / (1 - u))$ of float32 numbers in (0, 1), none of them denormal.

    With u and 1 - u as $2^e m$, m between the roots of 1/2 and of 2, it is $(e - e') \log 2 + 2\,\mathrm{atanh}(s)$,
    $s = (m - m') / (m + m')$.
    """
    if not _own(u):
        return u.logit()
    # 2 atanh(s) / s by s^2 in [0, 1/9]
    atanh = (2.0, 0.66666679, 0.399987112, 0.286202074, 0.213985606, 0.243939078)
    (exponent, m), (other, q) = _split(u), _split(1 - u)
    s = (m - q) / (m + q)
    return (exponent - other).to(torch.float32) * 0.693147181 + horner(atanh, s * s) * s


@no_type_check
def exp2(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Return 2 to the power of float32 numbers in [-120, 120]."""
    if not _own(x):
        return (x * math.log(2)).exp()  # torch's exp2 gives an element other bits at another place
    powers = (1.0, 0.693147207, 0.240226509, 0.0555032723, 0.00961805668, 0.00134004282, 0.000154614447)
    whole = x.round()
    part = horner(powers, x - whole)
    return (part.view(torch.int32) + (whole.to(torch.int32) << 23)).view(torch.float32)


@no_type_check
def cosine(turns: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    r"""Return $\cos 2 \pi t$ of float32 numbers in [-1/2, 1/2]."""
    if not _own(turns):
        return (turns * (2 * math.pi)).cos()
    powers = (-0.605699867, -0.883792937, 0.594574368, -0.115564543)
    powers += (0.0111005946, -0.000641826645, 2.49048542e-05, -6.92838449e-07)
    return horner(powers, 8 * turns * turns - 1)  # powers of t^2 would cancel to a dozen last places


@no_type_check
def sine(turns: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    r"""Return $\sin 2 \pi t$ of float32 numbers in [-1/2, 1/2]."""
    if not _own(turns):
        return (turns * (2 * math.pi)).sin()
    powers = (2.25056023, -3.02814237, 0.882848079, -0.113069914)
    powers += (0.00817198762, -0.000380074166, 1.23525142e-05, -2.95990457e-07)
    return horner(powers, 8 * turns * turns - 1) * turns


@no_type_check
def _own(x: Tensor) -> bool:
    return torch.compiler.is_compiling() and not x.is_cuda


@no_type_check
def _split(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the exponents of positive numbers, and what they are the exponents of."""
    bits = x.view(torch.int32) - 0x3F3504F3  # less those of the root of 1/2
    return bits >> 23, ((bits & 0x7FFFFF) + 0x3F3504F3).view(torch.float32)
