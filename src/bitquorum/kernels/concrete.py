r"""Take the slope of a concrete relaxation code by code: no number is kept for each code of each element.

With what `quantizers.concrete` defines, the probability $p_k$ of each code, its slope $s_k = (\log p_k)'$, the waiting
times and the drawn code c, the slope is

$$\frac{1}{T W} \left[\sum_k (k - c)\, w_k s_k - \frac{1}{W} \sum_k (k - c)\, w_k \sum_k w_k s_k\right], \quad
w_k = \left(1 + \frac{E_k}{p_k E_c}\right)^{-1 / T}, \quad w_c = 1, \quad W = \sum_k w_k.$$

Probabilities are differences of tails, those beyond a threshold on the side away from the value, so that they are exact
to rounding on both sides. Waiting times follow from keys and counters, as noise does.
"""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any, no_type_check

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from bitquorum.kernels import choice, layout, noise
from bitquorum.kernels.mean import SmoothLawName

LEAST = 1e-20  # probability, below which a code counts as impossible
_LARGEST = 80.0  # of the exponents, for float32


@torch.no_grad()
def relaxed_slope(
    code: Float[Tensor, "rows *rest"],
    z: Float[Tensor, "rows *rest"],
    keys: Int[Tensor, "rows"],
    *,
    law: SmoothLawName,
    top: int,
    scale: float,
    temperature: float,
) -> Float[Tensor, "rows *rest"]:
    """Return the derivative in `z` of the relaxation of drawn codes, without a graph.

    Args:
        code: Drawn codes.
        z: Values in steps above the lowest level, of which they were drawn.
        keys: One 64-bit key for each row, of its waiting times.
        law: `logistic`, `gaussian` or `smooth-rounding`.
        top: The largest code.
        scale: Of the noise, in steps.
        temperature: T.

    Examples:
        >>> z, keys = torch.tensor([[0.4], [0.4]]), torch.tensor([1, 2])
        >>> slope = relaxed_slope(z.round(), z, keys, law="logistic", top=1, scale=0.25, temperature=1.0)
        >>> bool((slope > 0).all())
        True
    """
    flat, codes, halves = layout.rows(z), layout.rows(layout.like_layout(code, z)), noise.key_halves(keys)
    found, counter = torch.empty_like(flat), noise.row_counter(z).view(torch.float32)
    constants = {"law": law, "narrow": 0.5 / scale > _LARGEST, "power": 1 / temperature}
    for rows in _blocks(flat):
        found[rows] = _slope(codes[rows], flat[rows], halves[rows], counter, top, scale, constants)
    return layout.unflatten(found, z, 1)


def _blocks(flat: Tensor) -> list[slice]:
    """Return parts of the rows that fit a cache, of two rows at least: of one, a kernel would be compiled anew."""
    rows = len(flat)
    parts = max(1, min(flat.numel() // (layout.BLOCK * torch.get_num_threads()), rows // 2))
    ends = [rows * part // parts for part in range(parts + 1)] if flat.device.type == "cpu" else [0, rows]
    return [slice(start, end) for start, end in pairwise(ends)]


def _slope(
    code: Tensor, z: Tensor, halves: Tensor, counter: Tensor, top: int, scale: float, constants: dict[str, Any]
) -> Tensor:
    fused = choice.applies(z) and min(z.shape) > 1

    def run(kernel: Callable[..., Any], *tensors: Tensor, **options: Any) -> Any:
        return choice.compute(kernel, *tensors, **options) if fused else kernel(*tensors, **options)

    def numbers(k: int) -> Tensor:
        return noise.numbers((float(top), float(k), scale), z.device).to(z.dtype)

    first = run(_wait, halves, counter, numbers(0), code)
    state = [torch.zeros_like(z) for _ in range(6)]
    for k in range(top + 1):
        state = run(_add, halves, counter, numbers(k), code, z, first, *state, **constants)
    *_, whole, slopes, gaps, both = state
    return (both - gaps * slopes / whole) / whole * constants["power"]


# The functions below are traced by the compiler; type checks at run time would break the trace.


@no_type_check
def _wait(
    halves: Int[Tensor, "rows 2"],
    counter: Float[Tensor, "count"],
    numbers: Float[Tensor, "3"],
    code: Float[Tensor, "#rows #count"],
) -> Float[Tensor, "rows count"]:
    """Return the waiting time of a code of each element."""
    place = counter.view(torch.int32) * (numbers[0].to(torch.int32) + 1) + code.to(torch.int32)
    return -noise.uniform_of(halves, place).to(code.dtype).log()


@no_type_check
def _add(
    halves: Int[Tensor, "rows 2"],
    counter: Float[Tensor, "count"],
    numbers: Float[Tensor, "3"],
    code: Float[Tensor, "rows count"],
    z: Float[Tensor, "rows count"],
    first: Float[Tensor, "rows count"],
    *state: Float[Tensor, "rows count"],
    law: SmoothLawName,
    narrow: bool,
    power: float,
) -> tuple[Float[Tensor, "rows count"], ...]:
    """Add a code to the sums, whose number stands between the largest one and the scale of the noise.

    The state begins with tail and density at the code's lower threshold, and comes back with those at its upper one.
    """
    below, entering, whole, slopes, gaps, both = state
    top, k, scale = numbers[0], numbers[1], numbers[2]
    upper = k + 0.5 - z
    above, leaving = _tail(upper, law, scale, narrow)
    above, leaving = torch.where(k == top, 0.0, above), torch.where(k == top, 0.0, leaving)
    inside = ((k == 0) | (upper <= 1)) & ((k == top) | (upper > 0))
    p = torch.where(inside, 1 - below - above, (below - above).abs())
    share = torch.where(p >= LEAST, (entering - leaving) / p.clamp(min=LEAST), 0.0)
    reached = p.clamp(min=LEAST) * first
    ratio = reached / (reached + _wait(halves, counter, numbers, k.expand(1, 1)))
    gap = k - code
    weight = torch.where(gap == 0, 1.0, ratio * ratio if power == 2 else ratio**power)
    slope = weight * share
    return above, leaving, whole + weight, slopes + slope, gaps + gap * weight, both + gap * slope


@no_type_check
def _tail(y: Tensor, law: SmoothLawName, scale: Tensor, narrow: bool) -> tuple[Tensor, Tensor]:
    """Return the probability of noise beyond |y|, and its density there, per step."""
    far, half = y.abs() * (-1 / scale), 0.5 / scale
    if law == "gaussian":
        return 0.5 * torch.erfc(far * -math.sqrt(0.5)), torch.exp(-0.5 * far * far) / (scale * math.sqrt(2 * math.pi))
    if law == "logistic":
        s = torch.sigmoid(far)
        return s, s * (1 - s) * (1 / scale)
    if narrow:
        tail = scale * (functional.softplus(far + half) - functional.softplus(far - half))
        return tail, torch.sigmoid(far + half) - torch.sigmoid(far - half)
    a, decay = torch.exp(far + half), torch.exp(-2 * half)
    ratio = a * (1 - decay) / (1 + a * decay)
    return scale * torch.log1p(ratio), ratio / (1 + a)
