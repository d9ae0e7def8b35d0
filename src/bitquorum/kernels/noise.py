r"""Turn keys and counters into uniform noise, and noise into codes.

Element number $i$ of a row gets two rounds of a 32-bit integer mixing function over $i$, the first keyed by the lower
half of the row's 64-bit key, the second by the upper half. The mixing function is the three-shift, two-multiply one
that Wellons, *Prospecting for hash functions*, 2018, found by search (shifts 16, 15, 15; multipliers 0x21f0aaad,
0xd35a2d97). The upper 23 bits $k$ give the number $(k + 1/2) / 2^{23}$: never 0, never 1. All of it is integer
arithmetic, which wraps, so every device and every compiler gives the same bits.
"""

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import Literal, no_type_check

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bitquorum.kernels import choice, layout, polynomial

LawName = Literal["logistic", "gaussian", "smooth-rounding", "uniform"]

_BLOCK = 2 * layout.BLOCK
_TERMS = 8  # of the polynomial in smooth rounding; with them its error is below 1e-7
_NARROWEST = 0.05  # steps, for scales down to this
# Giles, *Approximating the erfinv function*, 2010, table of single precision: near the centre, and in the tails.
_CENTRE = (2.81022636e-08, 3.43273939e-07, -3.5233877e-06, -4.39150654e-06, 0.00021858087)
_CENTRE += (-0.00125372503, -0.00417768164, 0.246640727, 1.50140941)
_TAIL = (-0.000200214257, 0.000100950558, 0.00134934322, -0.00367342844, 0.00573950773)
_TAIL += (-0.0076224613, 0.00943887047, 1.00167406, 2.83297682)


def keys(examples: Int[Tensor, "batch"], streams: Int[Tensor, "two seeds"]) -> Int[Tensor, "seeds batch"]:
    """Return the 64-bit key of every example under every seed, which two numbers stand for.

    Some thirty operations on few numbers: a GPU, where each would be a kernel of its own, gets them compiled.
    """
    if examples.is_cuda and choice.applies(examples, (torch.int64,)):
        made = choice.call(_keys, examples, streams)
        if made is not None:
            return made
    return _keys(examples, streams)


def uniform(keys: Int[Tensor, "rows"], count: int) -> Float[Tensor, "rows count"]:
    """Return `count` float32 numbers in (0, 1) for each 64-bit key; runs plainly in either mode.

    Examples:
        >>> bool((uniform(torch.tensor([1, 2]), 5)[:, :3] == uniform(torch.tensor([1, 2]), 3)).all())
        True
    """
    out = torch.empty(keys.shape[0], count, dtype=torch.float32, device=keys.device)
    halves = key_halves(keys)
    width = min(count, _block()) if keys.device.type == "cpu" else count
    counter = _counter(torch.Size((width,)), (0,), keys.device)
    for rows, columns in _blocks(out):
        part = out[rows, columns]
        those = halves[rows]
        if columns.start:  # never so on a GPU, where a tensor from the host would stop it
            those = those + torch.tensor([columns.start, 0], dtype=torch.int32)
        part.copy_(uniform_of(those, counter[: part.shape[1]]))
    return out


@torch.no_grad()
def draw(
    keys: Int[Tensor, "rows"],
    z: Float[Tensor, "rows *rest"],
    *,
    law: LawName,
    top: int,
    scale: Float[Tensor, ""] | float,
) -> Float[Tensor, "rows *rest"]:
    r"""Return the codes of one draw, without a graph and in the memory order of `z`.

    $$\mathrm{clip}(\mathrm{round}(z + e), 0, \mathrm{top})$$

    with $e$ from the law: $\rho \log(u / (1 - u))$, $\rho\,\Phi^{-1}(u)$, $u - 1/2$, or that plus
    $\rho \log\frac{1 - e^{-u / \rho}}{1 - e^{-(1 - u) / \rho}}$ (smooth rounding; see `edge_terms`). The noise of an
    element depends on its row's key and on its logical place in the row: not on the memory layout, nor on the other
    rows.

    Args:
        keys: One 64-bit key for each row.
        z: Values in steps above the lowest level.
        law: `logistic`, `gaussian`, `smooth-rounding` or `uniform`.
        top: The largest code.
        scale: The scale $\rho$ of the noise, in steps; the uniform law has none.

    Examples:
        >>> draw(torch.tensor([7, 8]), torch.tensor([[-3.0, 1.0], [1.0, 9.0]]), law="logistic", top=3, scale=0.1)
        tensor([[0., 1.],
                [1., 3.]])
    """
    flat = layout.rows(z)
    counter, halves = row_counter(z), key_halves(keys)
    terms = edge_terms(law, scale)
    if choice.applies(z):
        drawn = _draw_compiled(halves, counter, flat, top, scale, law, terms)
        if drawn is not None:
            return layout.unflatten(drawn, z, 1)
    out = torch.empty_like(flat)
    for rows, columns in _blocks(out):
        out[rows, columns] = codes(halves[rows], counter[columns], flat[rows, columns], top, scale, terms, law=law)
    return layout.unflatten(out, z, 1)


def _draw_compiled(
    halves: Tensor,
    counter: Tensor,
    flat: Tensor,
    top: int,
    scale: Tensor | float,
    law: LawName,
    terms: tuple[float, ...] | None,
) -> Tensor | None:
    largest = scalar(float(top), flat.device)
    width = scale if isinstance(scale, Tensor) else scalar(float(scale), flat.device)
    rows = flat.shape[0]
    if rows == 1:  # a size of one would be compiled anew
        halves, flat = halves.repeat(2, 1), flat.repeat(2, 1)
    tables = () if terms is None else (numbers(terms, flat.device),)
    inputs = (halves, counter.view(torch.float32), flat.contiguous(), largest, width, *tables)
    drawn = choice.call(codes, *inputs, exact=True, law=law, compiled=True)
    return None if drawn is None else drawn[:rows]


def row_counter(x: Float[Tensor, "rows *rest"]) -> Int[Tensor, "count"]:
    """Return the logical number of each element of a row, in memory order."""
    order = tuple(axis - 1 for axis in layout.memory_order(x, 1)) or (0,)
    return _counter(x.shape[1:] or torch.Size((1,)), order, x.device)


def key_halves(keys: Int[Tensor, "rows"]) -> Int[Tensor, "rows 2"]:
    """Return the lower and the upper half of each key."""
    return keys.contiguous().view(torch.int32).view(-1, 2)


_counter = lru_cache(maxsize=32)(layout.logical_index)


@lru_cache(maxsize=256)
def scalar(value: float, device: torch.device) -> Float[Tensor, ""]:
    """Return a number as a tensor, which compiled code takes without becoming another code."""
    with torch.inference_mode(False):
        return torch.tensor(value, device=device)


@lru_cache(maxsize=256)
def numbers(values: tuple[float, ...], device: torch.device) -> Float[Tensor, "entries"]:
    """Return numbers as a tensor, as `scalar` does."""
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=torch.float32, device=device)


def edge_terms(law: LawName, scale: Tensor | float) -> tuple[float, ...] | None:
    r"""Return the polynomial in smooth rounding, or `None` where the noise is another, narrow, or of a learned scale.

    With $w = u - 1/2$ the noise is $\rho \log(u / (1 - u)) + w\,T(w^2)$,

    $$T(w^2) = 1 + \frac{\rho}{w} \log\frac{h(u)}{h(1 - u)}, \quad h(t) = (1 - e^{-t / \rho}) / t,$$

    where T is analytic, so that a few powers of $w^2$ serve in place of two exponentials.
    """
    wide = law == "smooth-rounding" and not isinstance(scale, Tensor) and scale >= _NARROWEST
    return _edge_terms(float(scale)) if wide else None


@lru_cache(maxsize=256)
def _edge_terms(scale: float) -> tuple[float, ...]:
    """Return the coefficients of T by powers of w^2."""

    def edge(square: Tensor) -> Tensor:
        w = square.sqrt()
        ratio = torch.expm1(-(0.5 + w) / scale) / torch.expm1(-(0.5 - w) / scale) * (0.5 - w) / (0.5 + w)
        return 1 + scale * ratio.log() / w

    return polynomial.fit(edge, _TERMS, 0.0, 0.25)


def _blocks(out: Tensor) -> Iterator[tuple[slice, slice]]:
    """Yield the rows and columns of the parts that fit a CPU's cache; elsewhere all of them."""
    rows, count = out.shape
    if out.device.type != "cpu":
        yield slice(0, rows), slice(0, count)
        return
    block = _block()
    height = max(1, block // max(count, 1))
    for row in range(0, rows, height):
        for start in range(0, count, block):
            yield slice(row, row + height), slice(start, start + block)


def _block() -> int:
    return _BLOCK * torch.get_num_threads()


# The functions below are traced by the compiler; type checks at run time would break the trace.


@no_type_check
def _keys(examples: Int[Tensor, "batch"], streams: Int[Tensor, "two seeds"]) -> Int[Tensor, "seeds batch"]:
    first, second = streams.unsqueeze(-1).unbind()
    return mix64(mix64(examples + first) ^ second)


@no_type_check
def mix64(x: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
    """Mix 64-bit integers (the finalizer of splitmix64: Steele, Lea, Flood, 2014); overflow wraps."""
    x = x + (0x9E3779B97F4A7C15 - (1 << 64))
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * (0xBF58476D1CE4E5B9 - (1 << 64))
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * (0x94D049BB133111EB - (1 << 64))
    return x ^ ((x >> 31) & ((1 << 33) - 1))


@no_type_check
def _mix(h: Int[Tensor, "*shape"], scratch: Int[Tensor, "*shape"]) -> None:
    for shift, multiplier in ((16, 0x21F0AAAD), (15, 0xD35A2D97 - (1 << 32)), (15, None)):
        torch.bitwise_right_shift(h, shift, out=scratch)
        scratch.bitwise_and_((1 << (32 - shift)) - 1)
        h.bitwise_xor_(scratch)
        if multiplier is not None:
            h.mul_(multiplier)


@no_type_check
def uniform_of(halves: Int[Tensor, "rows 2"], counter: Int[Tensor, "*more"]) -> Float[Tensor, "*shape"]:
    """Return the number of each counter, or counter of a row, under the key of each row."""
    h = counter.view(torch.int32) + halves[:, :1]
    scratch = torch.empty_like(h)
    _mix(h, scratch)
    h.bitwise_xor_(halves[:, 1:])
    _mix(h, scratch)
    torch.bitwise_right_shift(h, 9, out=scratch)
    scratch.bitwise_and_((1 << 23) - 1)
    return scratch.to(torch.float32).add_(0.5).mul_(2.0**-23)


@no_type_check
def codes(
    halves: Int[Tensor, "rows 2"],
    counter: Int[Tensor, "count"],
    z: Float[Tensor, "rows count"],
    top: Float[Tensor, ""] | int,
    scale: Float[Tensor, ""] | float,
    terms: Float[Tensor, "entries"] | tuple[float, ...] | None = None,
    *,
    law: LawName,
    compiled: bool = False,
) -> Float[Tensor, "rows count"]:
    """Return what `draw` says, of flat rows."""
    u = uniform_of(halves, counter).to(z.dtype)
    if law == "logistic":
        e = polynomial.logit(u).mul_(scale)
    elif law == "gaussian":
        # The compiler knows erfinv only one element at a time.
        e = _probit(u) * scale if compiled else u.mul_(2).sub_(1).erfinv_().mul_(math.sqrt(2) * scale)
    elif law == "smooth-rounding" and terms is not None:
        w = u - 0.5
        e = polynomial.logit(u) * scale + polynomial.horner([terms[power] for power in range(_TERMS)], w * w) * w
    elif law == "smooth-rounding":
        edges = torch.log(torch.expm1(-u / scale) / torch.expm1((u - 1) / scale))
        e = u.sub_(0.5).add_(edges.mul_(scale))
    else:
        e = u.sub_(0.5)
    return e.add_(z).clamp_(min=0).clamp_(max=top).round_()  # in this order no zero is negative


@no_type_check
def _probit(u: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    w = -torch.log(4 * u * (1 - u))
    centre, tail = w - 2.5, torch.sqrt(w) - 3
    p, q = polynomial.horner(_CENTRE[::-1], centre), polynomial.horner(_TAIL[::-1], tail)
    return torch.where(w < 5, p, q) * (2 * u - 1) * math.sqrt(2)
