"""Read a network as nodes: a rule for each type of module, none for others."""

from collections.abc import Callable
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from bitquorum.bounds.activations import SHAPES, apply_shape
from bitquorum.bounds.nodes import Affine, Box, Linear, Node, affine, total
from bitquorum.bounds.quantizers import drawn_weights, quantize
from bitquorum.bounds.scope import Scope
from bitquorum.interface import InputError
from bitquorum.layers import WEIGHTED, QuantActivation, QuantImage, QuantLayer, Weighted
from bitquorum.quantizers import Quantizer
from bitquorum.randomized import AddedNoise, RangeNoise
from bitquorum.zoo import BasicBlock, BatchNorm, Normalize, PadShortcut, PreActBlock

Rule: TypeAlias = Callable[[Any, Node, Scope], Node]


def propagate(module: nn.Module, node: Node, scope: Scope) -> Node:
    """Return the node of a module's output for the node of its input, as in evaluation mode.

    Raises:
        InputError: if the module, or one inside of it, is of a type without a rule, as subclasses are, or has hooks.
    """
    rule = RULES.get(type(module))
    if rule is None:
        known = ", ".join(sorted(cls.__name__ for cls in RULES))
        raise InputError(
            f"expected modules that have bounds, got {type(module).__name__}; known are {known}; give it a rule in "
            "`bitquorum.bounds.RULES`, or build the network of these"
        )
    if module._forward_pre_hooks or module._forward_hooks or "forward" in vars(module):
        raise InputError(
            f"expected modules that compute what their type says, got {type(module).__name__} with a hook or a forward "
            "of its own, which bounds do not see; remove it, or make it a module with a rule in "
            "`bitquorum.bounds.RULES`"
        )
    return rule(module, node, scope)


def weighted(layer: Weighted, node: Node, scope: Scope, *, least: Tensor, most: Tensor) -> Affine:
    r"""Return the node of a layer whose weights lie between two: $|W x - W_c x| \le W_r |x|$ with their midpoint.

    Intervals of weights and values in midpoint and radius, at most 1.5 times as wide as the tightest (Rump, *Fast and
    parallel interval arithmetic*, 1999), and exact for one weight. Rounding of a sum of n products in any order is
    within $\gamma_n$ of the sum of their magnitudes (Higham, *Accuracy and Stability of Numerical Algorithms*, 2002,
    section 3.1); kernels that sum otherwise, such as Winograd's, or round more coarsely, such as TF32, are not covered.
    """
    dtype = node.lower.dtype
    middle, spread = ((least + most) / 2).to(dtype), ((most - least) / 2).to(dtype)
    gamma = (least[0].numel() + 8) * scope.unit
    spread = spread + gamma * (middle.abs() + spread)

    def apply(x: Tensor, weight: Tensor) -> Tensor:
        if isinstance(layer, nn.Linear):
            return functional.linear(x, weight)
        return layer._conv_forward(x, weight, None)  # knows the padding modes

    reach = apply((node.upper - node.lower) / 2, middle.abs())
    fixed = least is most and not scope.unit
    radius = torch.zeros_like(reach[:1]) if fixed else apply(node.largest, spread)
    offset = torch.zeros((), dtype=dtype, device=reach.device)
    if layer.bias is not None:
        offset = layer.bias.to(dtype).view(-1, *[1] * (0 if isinstance(layer, nn.Linear) else reach.dim() - 2))
    return affine(node, lambda x: apply(x, middle), reach=reach, offset=offset, radius=radius + gamma * offset.abs())


def _plain(layer: Weighted, node: Node, scope: Scope) -> Node:
    return weighted(layer, node, scope, least=layer.weight, most=layer.weight)


def _quantized(layer: QuantLayer, node: Node, scope: Scope) -> Node:
    if layer.inputs is not None:
        node = quantize(node, layer.inputs, scope)
    least, most = drawn_weights(layer, scope)
    return weighted(layer.layer, node, scope, least=least, most=most)


def _activation(module: nn.Module, node: Node, scope: Scope) -> Node:
    shape = SHAPES[type(module)](module)
    if isinstance(module, nn.PReLU):
        return apply_shape(node, lambda x: functional.prelu(x, module.weight.to(x.dtype)), shape, scope)
    return apply_shape(node, lambda x: module(x.clone()), shape, scope)  # it may work in place


def _quantized_activation(module: QuantActivation, node: Node, scope: Scope) -> Node:
    return quantize(node if module.absorbed else propagate(module.activation, node, scope), module.quantizer, scope)


def _image(module: QuantImage, node: Node, scope: Scope) -> Node:
    return propagate(module.network, quantize(node, module.quantizer, scope), scope)


def _sequence(module: nn.Module, node: Node, scope: Scope) -> Node:
    for part in cast(nn.Sequential, module):  # a part may stand at several places
        node = propagate(part, node, scope)
    return node


def _basic_block(block: BasicBlock, node: Node, scope: Scope) -> Node:
    branch = node
    for part in (block.conv1, block.norm1, block.activation1, block.conv2, block.norm2):
        branch = propagate(part, branch, scope)
    return propagate(block.activation2, total(branch, propagate(block.shortcut, node, scope), scope.unit), scope)


def _preact_block(block: PreActBlock, node: Node, scope: Scope) -> Node:
    hidden = propagate(block.activation1, propagate(block.norm1, node, scope), scope)
    branch = hidden
    for part in (block.conv1, block.norm2, block.activation2, block.conv2):
        branch = propagate(part, branch, scope)
    return total(branch, node if block.shortcut is None else propagate(block.shortcut, hidden, scope), scope.unit)


def _average(linear: Linear, node: Node, scope: Scope) -> Affine:
    """Return the node of a mean over some pixels, or of a choice of them."""
    zero = torch.zeros((), dtype=node.lower.dtype, device=node.lower.device)
    radius = (node.lower[0, 0].numel() + 8) * scope.unit * linear(node.largest)
    return affine(node, linear, reach=linear((node.upper - node.lower) / 2), offset=zero, radius=radius)


def _pool(module: nn.Module, node: Node, scope: Scope) -> Node:
    return _average(module, node, scope)


def _rows(module: nn.Module, node: Node, scope: Scope) -> Node:
    return _average(module, node, Scope(validity=scope.validity, rounding=False))  # only moves numbers


def _maximum(module: nn.Module, node: Node, scope: Scope) -> Node:
    return Box(lower=module(node.lower), upper=module(node.upper))


def _identity(module: nn.Module, node: Node, scope: Scope) -> Node:
    return node


def _scaled(node: Node, scope: Scope, *, scale: Tensor, shift: Tensor, doubt: Tensor) -> Affine:
    """Return the node of $s x + t$; `doubt` is the magnitude of what was added up to the shift."""
    dtype = node.lower.dtype
    scale, shift, doubt = (value.to(dtype) for value in (scale, shift, doubt))
    radius = 8 * scope.unit * (scale.abs() * node.largest + doubt)
    reach = scale.abs() * (node.upper - node.lower) / 2
    return affine(node, lambda x: x * scale, reach=reach, offset=shift, radius=radius)


def _normalize(module: Normalize, node: Node, scope: Scope) -> Node:
    mean, std = module.mean.to(node.lower.dtype), module.std.to(node.lower.dtype)
    return _scaled(node, scope, scale=1 / std, shift=-mean / std, doubt=mean.abs() / std)


def _batch_norm(module: nn.BatchNorm1d | nn.BatchNorm2d, node: Node, scope: Scope) -> Node:
    if module.running_mean is None or module.running_var is None:
        raise InputError("expected batch norm with running statistics, got one without; it mixes the images of a batch")
    shape = (-1, *[1] * (node.lower.dim() - 2))
    dtype = node.lower.dtype
    mean = module.running_mean.to(dtype).clone()  # a later pass of a training step moves the buffer
    scale = (module.running_var.to(dtype) + module.eps).rsqrt()
    scale = scale if module.weight is None else scale * module.weight.to(dtype)
    bias = torch.zeros_like(mean) if module.bias is None else module.bias.to(dtype)
    doubt = (mean * scale).abs() + bias.abs()
    parts = (part.view(shape) for part in (scale, bias - mean * scale, doubt))
    return _scaled(node, scope, **dict(zip(("scale", "shift", "doubt"), parts, strict=True)))


def _group_norm(module: nn.GroupNorm, node: Node, scope: Scope) -> Node:
    r"""Return the node of group norm; linear bounds end there.

    Over a box of midpoint c and radii r the deviation of n values lies within $\|r\| / \sqrt n$ of that of c, for it is
    a norm of their centred values over $\sqrt n$; and no value of n lies farther than $\sqrt{n - 1}$ deviations from
    their mean.
    """
    shape = node.lower.shape
    low, high, size = (part.reshape(shape[0], module.num_groups, -1) for part in (node.lower, node.upper, node.largest))
    count = low.shape[2]
    middle, radius = (low + high) / 2, (high - low) / 2
    below = low - high.mean(2, keepdim=True) + 2 * radius / count
    above = high - low.mean(2, keepdim=True) - 2 * radius / count
    tiny = 1e-24  # keeps the gradient of the root finite; far below the slack
    deviation = (middle.var(2, correction=0, keepdim=True) + tiny).sqrt()
    reach = (radius.square().mean(2, keepdim=True) + tiny).sqrt()
    least = ((deviation - reach).clamp(min=0).square() + module.eps).sqrt()
    most = ((deviation + reach).square() + module.eps).sqrt()
    farthest = (count - 1) ** 0.5
    lower = (below / torch.where(below >= 0, most, least)).clamp(-farthest, farthest)
    upper = (above / torch.where(above >= 0, least, most)).clamp(-farthest, farthest)
    slack = (count + 8) * scope.unit * (1 + size.mean(2, keepdim=True) / least) * 2
    lower, upper = lower - slack, upper + slack
    node = Box(lower=lower.reshape(shape), upper=upper.reshape(shape))
    if module.weight is None:
        return node
    scale, shift = (part.view(-1, *[1] * (len(shape) - 2)) for part in (module.weight, module.bias))
    return _scaled(node, scope, scale=scale, shift=shift, doubt=shift.abs())


RULES: dict[type[nn.Module], Rule] = {
    **dict.fromkeys(WEIGHTED, _plain),
    **dict.fromkeys(SHAPES, _activation),
    **dict.fromkeys((nn.Identity, nn.Dropout, nn.Dropout2d), _identity),
    **dict.fromkeys((nn.AvgPool1d, nn.AvgPool2d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d), _pool),
    **dict.fromkeys((nn.MaxPool1d, nn.MaxPool2d, nn.AdaptiveMaxPool2d), _maximum),
    **dict.fromkeys((nn.Flatten, PadShortcut), _rows),
    **dict.fromkeys((BatchNorm, nn.BatchNorm1d, nn.BatchNorm2d), _batch_norm),
    **dict.fromkeys((Quantizer, AddedNoise, RangeNoise), lambda module, node, scope: quantize(node, module, scope)),
    nn.Sequential: _sequence,
    nn.GroupNorm: _group_norm,
    QuantLayer: _quantized,
    QuantActivation: _quantized_activation,
    QuantImage: _image,
    BasicBlock: _basic_block,
    PreActBlock: _preact_block,
    Normalize: _normalize,
}
"""Type of module -> how its bounds are found; add types of your own."""
