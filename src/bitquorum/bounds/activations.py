r"""Bound activations on intervals: the exact range, and two lines.

A line of slope $a$ touches $f$ where $f(x) - a x$ is extreme. Between neighbouring knots at distance $h$ this lies off
the values at the knots by at most $M h^2 / 8$, with $M$ the largest $|f''|$, if every kink is a knot: so the offset of
any slope is found from a grid of the interval. Of a few slopes that line is taken that is best at the midpoint, which
for a line is the mean over the interval.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn

from bitquorum.bounds.nodes import Elementwise, Lines, Node
from bitquorum.bounds.scope import Scope
from bitquorum.interface import InputError

_PARTS: Final = 16  # of the interval, for smooth functions


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Describe a function of one variable.

    Attributes:
        turns: Where it changes its direction; elsewhere it is monotone.
        kinks: Where its derivative jumps.
        curvature: An upper bound of the magnitude of the second derivative elsewhere; 0 for straight pieces.
    """

    turns: tuple[float, ...] = ()
    kinks: tuple[float, ...] = ()
    curvature: float = 0.0


def _gelu(module: nn.Module) -> Shape:
    if getattr(module, "approximate", "none") != "none":
        raise InputError("expected a GELU without approximation, got one with; bounds know the exact one")
    return Shape(turns=(-0.7517915246935645,), curvature=math.sqrt(2 / math.pi))


def _softplus(module: nn.Module) -> Shape:
    beta, threshold = _number(module, "beta"), _number(module, "threshold")
    if beta <= 0 or threshold < 20:
        raise InputError(
            f"expected a Softplus of beta above 0 and a threshold of 20 or more, got {beta} and {threshold}; at lower "
            "ones it jumps"
        )
    return Shape(curvature=beta / 4)


def _number(module: nn.Module, name: str) -> float:
    return float(getattr(module, name))


SHAPES: Mapping[type[nn.Module], Callable[[nn.Module], Shape]] = {
    nn.ReLU: lambda _: Shape(kinks=(0.0,)),
    nn.ReLU6: lambda _: Shape(kinks=(0.0, 6.0)),
    nn.Hardtanh: lambda m: Shape(kinks=(_number(m, "min_val"), _number(m, "max_val"))),
    nn.LeakyReLU: lambda _: Shape(turns=(0.0,), kinks=(0.0,)),
    nn.PReLU: lambda _: Shape(turns=(0.0,), kinks=(0.0,)),
    nn.Sigmoid: lambda _: Shape(curvature=1 / (6 * math.sqrt(3))),
    nn.Hardsigmoid: lambda _: Shape(kinks=(-3.0, 3.0)),
    nn.Tanh: lambda _: Shape(curvature=4 / (3 * math.sqrt(3))),
    nn.Softplus: _softplus,
    nn.GELU: _gelu,
    nn.SiLU: lambda _: Shape(turns=(-1.2784645427610737,), curvature=0.5),
    nn.Mish: lambda _: Shape(turns=(-1.1924312145154952,), curvature=0.65),
    nn.Hardswish: lambda _: Shape(turns=(-1.5,), kinks=(-3.0, 3.0), curvature=1 / 3),
    nn.ELU: lambda m: Shape(turns=(0.0,), kinks=(0.0,), curvature=abs(_number(m, "alpha"))),
    nn.SELU: lambda _: Shape(kinks=(0.0,), curvature=1.7581),
}
"""Type of activation -> its shape."""


def apply_shape(node: Node, function: Callable[[Tensor], Tensor], shape: Shape, scope: Scope) -> Elementwise:
    """Return the node of a function of every element, with its exact range widened by rounding."""
    low, high = node.lower, node.upper
    values = [function(low), function(high)]
    values += [function(low.clamp(min=turn).minimum(high)) for turn in shape.turns]  # a turn inside, else an end
    lower, upper = torch.stack(values).amin(0), torch.stack(values).amax(0)
    slack = 8 * scope.unit * (node.largest + torch.maximum(lower.abs(), upper.abs()))
    return Elementwise(
        lower=lower - slack,
        upper=upper + slack,
        parents=(node,),
        lines=lambda: _lines(node, function, shape, (lower, upper), slack),
    )


def _lines(
    node: Node, function: Callable[[Tensor], Tensor], shape: Shape, limits: tuple[Tensor, Tensor], slack: Tensor
) -> Lines:
    low, high = node.lower, node.upper
    width = high - low
    parts = _PARTS if shape.curvature else 1
    knots = [low + width * (part / parts) for part in range(parts + 1)]
    ends = _PARTS // 2 - 1, _PARTS // 2 + 1
    around = [low + width * (part / _PARTS) for part in ends]
    tiny = width.clamp(min=torch.finfo(width.dtype).tiny)
    chord = (function(high) - function(low)) / tiny
    tangent = (function(around[1]) - function(around[0])) / (tiny * (2 / _PARTS))
    slopes = [torch.zeros_like(low), chord, tangent]
    knots += [low.clamp(min=kink).minimum(high) for kink in shape.kinks]
    least, most = _touch(function, knots, slopes)
    error = shape.curvature * (width / parts).square() / 8
    below = [limits[0], *(offset - error for offset in least[1:])]  # the flat line is known exactly
    above = [limits[1], *(offset + error for offset in most[1:])]
    middle = (low + high) / 2
    slope_below, offset_below = best(slopes, below, middle, largest=True)
    slope_above, offset_above = best(slopes, above, middle, largest=False)
    return Lines(slope_below, offset_below - slack, slope_above, offset_above + slack)


def _touch(
    function: Callable[[Tensor], Tensor], knots: Sequence[Tensor], slopes: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Return the extremes of the function less each line through the origin, over the knots."""
    least: list[Tensor] = []
    most: list[Tensor] = []
    for knot in knots:
        value = function(knot)
        gaps = [value - slope * knot for slope in slopes]
        least = [torch.minimum(a, b) for a, b in zip(least, gaps, strict=True)] if least else gaps
        most = [torch.maximum(a, b) for a, b in zip(most, gaps, strict=True)] if most else gaps
    return least, most


def best(
    slopes: Sequence[Tensor], offsets: Sequence[Tensor], middle: Tensor, *, largest: bool
) -> tuple[Tensor, Tensor]:
    """Return for each element the slope and the offset of the line that is best at the midpoint."""
    slope, offset = slopes[0], offsets[0]
    for other, beside in zip(slopes[1:], offsets[1:], strict=True):
        gain = (other - slope) * middle + beside - offset
        better = gain > 0 if largest else gain < 0
        slope, offset = torch.where(better, other, slope), torch.where(better, beside, offset)
    return slope, offset
