r"""Bound quantizers and noise on intervals, under every noise that a scope allows.

For a common noise $e$ the quantizer $Q(x; e)$ grows with $x$, and it grows with $e$. So

$$Q(l; e_{min}) \le Q(x; e) \le Q(u; e_{max}) \quad \text{for } x \in [l, u],\ e \in [e_{min}, e_{max}]$$

and both ends are taken: bounds are exact. They are computed by the quantizer itself, so that in training they have its
gradients.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from bitquorum import kernels, rng
from bitquorum.bounds.activations import Shape, apply_shape, best
from bitquorum.bounds.nodes import Elementwise, Lines, Node, affine
from bitquorum.bounds.scope import Scope, noise_of, seed_of
from bitquorum.interface import InputError
from bitquorum.layers import Noise, QuantLayer
from bitquorum.quantizers import Quantizer
from bitquorum.randomized import AddedNoise, RangeNoise, WeightScaledNoise

# Noise is computed in single precision, by kernels whose quantiles differ in the last digits.
_NOISE_SLACK = 2.0**-16


def quantize(node: Node, quantizer: Quantizer | Noise, scope: Scope) -> Node:
    """Return the node of quantized, or noisy, activations.

    Raises:
        InputError: if the noise is of a type that has no bounds here.
    """
    if isinstance(quantizer, Quantizer):
        return _quantize(node, quantizer, scope)
    if not isinstance(quantizer, AddedNoise | RangeNoise):
        raise InputError(f"expected noise that has bounds, got {_name(quantizer)}; leave the layer out of it")
    size = 0.0
    if isinstance(quantizer, RangeNoise):
        levels = quantizer.range.levels()
        if levels.dim() > 1:
            raise InputError(f"expected one range per tensor of activations, got several in {_name(quantizer)}")
        ends = (float(levels[0]), float(levels[-1]))
        size = max(abs(ends[0]), abs(ends[1]))  # it is subtracted and added again
        node = apply_shape(node, quantizer.mean, Shape(kinks=ends), scope)
    zero = torch.zeros_like(node.lower)
    base = quantizer.mean(zero)
    below, above = (quantizer.sample(zero, u) - base for u in noise_of(quantizer, scope, node.lower))
    radius = (above - below) / 2
    if scope.unit:
        radius = radius + _NOISE_SLACK * torch.maximum(above.abs(), below.abs())
        radius = radius + 8 * scope.unit * (node.largest + size)
    return affine(node, torch.clone, reach=(node.upper - node.lower) / 2, offset=(above + below) / 2, radius=radius)


def drawn_weights(layer: QuantLayer, scope: Scope) -> tuple[Tensor, Tensor]:
    """Return the least and the largest weight that can be drawn: the same tensor twice where only one can.

    Raises:
        InputError: if the weight's noise is of a type that has no bounds here.
    """
    weight, quantizer = layer.layer.weight, layer.quantizer
    if layer.transform is not None:
        weight = layer.transform(weight)
    if isinstance(quantizer, Noise) and not isinstance(quantizer, AddedNoise | RangeNoise | WeightScaledNoise):
        raise InputError(f"expected noise that has bounds, got {_name(quantizer)}; leave the layer out of it")
    if not quantizer.stochastic:
        found = quantizer(weight)
        return found, found
    wide = kernels.wide(weight)
    least, most = scope.noise(wide, quantizer.address, parameter=True)
    with rng.draw(seed_of(scope) or 0):  # whatever else the quantizer draws: the rows of a weight are no examples
        if least is most:
            found = quantizer(weight, noise=least)
            return found, found
        ends = quantizer(weight, noise=least), quantizer(weight, noise=most)
    return torch.minimum(*ends), torch.maximum(*ends)


def grid(quantizer: Quantizer, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the lowest level and the step, which broadcast against `x`."""
    levels = quantizer.levels().to(x.dtype)
    low, step = levels[..., 0], (levels[..., -1] - levels[..., 0]) / quantizer.top
    if levels.dim() == 1:
        return low, step
    shape = [1] * x.dim()
    shape[quantizer.axis] = -1
    return low.view(shape), step.view(shape)


def _quantize(node: Node, quantizer: Quantizer, scope: Scope) -> Elementwise:
    low, step = grid(quantizer, node.lower)
    slack = 0.0 * step
    if scope.unit:
        slack = 8 * scope.unit * (node.largest + low.abs() + step * quantizer.top)
        slack = slack + _NOISE_SLACK * (1 + quantizer.scale()) * step
    noise = noise_of(quantizer, scope, node.lower)
    lower = quantizer(node.lower - slack, noise=noise[0])
    upper = quantizer(node.upper + slack, noise=noise[1])
    value = 4 * scope.unit * (low.abs() + step * quantizer.top)
    return Elementwise(
        lower=lower - value,
        upper=upper + value,
        parents=(node,),
        lines=lambda: _staircase(node, quantizer, noise, slack, value),
    )


def _staircase(node: Node, quantizer: Quantizer, noise: tuple[Tensor, Tensor], slack: Tensor, value: Tensor) -> Lines:
    r"""Return lines below the staircase of the least noise and above that of the largest.

    With codes k from a to b on the interval, a line of slope s in [0, 1], in steps, over a staircase whose stairs
    begin at k - 1/2 - e touches it at the beginning of the interval or of the last stair: there k - s z is largest.
    """
    low, step = grid(quantizer, node.lower)
    z = (node.lower - slack - low) / step, (node.upper + slack - low) / step
    scale = quantizer.scale()
    least, most = (quantizer.law.sample(u, scale) for u in noise)

    def codes(shift: Tensor) -> tuple[Tensor, Tensor]:
        first, last = ((end + shift).round().clamp(0, quantizer.top) for end in z)
        return first, last

    above = _stairs(z, codes(most), lambda code: code - 0.5 - most, above=True)
    below = _stairs(z, codes(least), lambda code: code + 0.5 - least, above=False)
    slopes, offsets = zip(below, above, strict=True)
    base = [low * (1 - slope) + step * offset for slope, offset in zip(slopes, offsets, strict=True)]
    # The input may err by the slack, and touches the corners of the staircase too early by as much.
    return Lines(slopes[0], base[0] - value - slopes[0] * slack, slopes[1], base[1] + value + slopes[1] * slack)


def _stairs(
    z: tuple[Tensor, Tensor], codes: tuple[Tensor, Tensor], edge: Callable[[Tensor], Tensor], *, above: bool
) -> tuple[Tensor, Tensor]:
    """Return slope and offset of the line, in steps, above or below a staircase."""
    (first, last), (start, end) = codes, z
    chord = ((last - first) / (end - start).clamp(min=1e-9)).clamp(0, 1)
    slopes = [torch.zeros_like(chord), chord, torch.ones_like(chord)]
    offsets = []
    for slope in slopes:
        if above:
            corner = torch.where(last > first, last - slope * edge(last).clamp(min=start), first - slope * start)
            offsets.append(torch.maximum(first - slope * start, corner))
        else:
            corner = torch.where(last > first, first - slope * edge(first).clamp(max=end), last - slope * end)
            offsets.append(torch.minimum(last - slope * end, corner))
    return best(slopes, offsets, (start + end) / 2, largest=not above)


def _name(module: Noise) -> str:
    return f"{type(module).__name__} at {module.address!r}"
