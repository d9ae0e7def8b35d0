"""Count what one prediction costs on hardware that makes use of low bits: memory, multiplications, bit operations."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn

from bitquorum import rng
from bitquorum.ensemble import Ensemble
from bitquorum.layers import WEIGHTED, Noise, QuantActivation, Weighted
from bitquorum.quantizers import Quantizer

FLOAT_BITS: Final = 32
IMAGE_BITS: Final = 8
_DRAWS: Final = 32  # over which a network that draws its precision is averaged


@dataclass(frozen=True, kw_only=True)
class Complexity:
    """State the cost of one prediction for one image.

    Attributes:
        bytes: Memory of the parameters: each weight at its bits, everything else in 32 bits, shared weights once and
            at the largest of their bits.
        macs: Multiply-accumulates of convolutions and linear layers, over all members and passes.
        bit_operations: Each multiply-accumulate times the bits of its weight and of its input, 32 for float and 8 for
            an image that is not quantized (the measure of van Baalen et al., 2020, https://arxiv.org/abs/2005.07093).
    """

    bytes: float
    macs: float
    bit_operations: float


@torch.no_grad()
def complexity(ensemble: Ensemble, shape: tuple[int, ...]) -> Complexity:
    """Return the cost of one prediction of an ensemble, in the mode that it is in, for an image of a shape.

    A network that draws its precision costs the mean over draws. The input of a layer has the bits of the activation
    that ran last before it; norm layers, activations and the noise itself are not counted.

    Examples:
        >>> network = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
        >>> complexity(Ensemble([network]), (1, 2, 2))
        Complexity(bytes=60.0, macs=12.0, bit_operations=3072.0)
    """
    image = torch.full((1, *shape), 0.5, device=next(ensemble.parameters()).device)
    counts: list[tuple[int, int]] = []
    draws = _DRAWS if ensemble.stochastic else 1
    with _counting(ensemble, lambda macs, bits: counts.append((macs, macs * bits))):
        for draw in range(draws):
            with rng.draw(rng.derive(0, "complexity", draw)):
                ensemble(image)
    macs, operations = (sum(column) * ensemble.passes / draws for column in zip(*counts, strict=True))
    return Complexity(bytes=_bits(ensemble) / 8, macs=macs, bit_operations=operations)


@contextmanager
def _counting(ensemble: Ensemble, count: Callable[[int, int], None]) -> Iterator[None]:
    """Call `count` with the multiply-accumulates and the product of both bits of every layer that runs in the block."""
    last = IMAGE_BITS

    def restart(*_: object) -> None:
        nonlocal last
        last = IMAGE_BITS

    def activated(module: nn.Module, *_: object) -> None:
        nonlocal last
        last = module.bits if isinstance(module, Quantizer) else FLOAT_BITS

    def applied(module: nn.Module, _: object, output: Tensor) -> None:
        weight = _layer(module).weight
        inputs = getattr(module, "inputs", None)
        bits = inputs.bits if isinstance(inputs, Quantizer) else last
        count(weight.numel() * output.numel() // (len(output) * weight.shape[0]), _weight_bits(module) * bits)

    hooks = [member.register_forward_pre_hook(restart) for member in ensemble.members]
    hooks += [module.register_forward_hook(applied) for module in _weighted(ensemble)]
    hooks += [module.register_forward_hook(activated) for module in _activations(ensemble)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _weighted(root: nn.Module) -> list[nn.Module]:
    """Return the modules that multiply by weights: what wraps a layer, and layers that nothing wraps."""
    wrappers = [module for module in root.modules() if isinstance(getattr(module, "layer", None), WEIGHTED)]
    inner = {id(_layer(module)) for module in wrappers}
    plain = [module for module in root.modules() if isinstance(module, WEIGHTED) and id(module) not in inner]
    return [*wrappers, *plain]


def _layer(module: nn.Module) -> Weighted:
    layer = getattr(module, "layer", module)
    if not isinstance(layer, WEIGHTED):
        raise TypeError(f"expected a layer with weights, got {type(layer).__name__}")
    return layer


def _weight_bits(module: nn.Module) -> int:
    quantizer = getattr(module, "quantizer", None)
    return quantizer.bits if isinstance(quantizer, Quantizer) else FLOAT_BITS


def _activations(root: nn.Module) -> list[nn.Module]:
    """Return the quantizers and the noise of activations and images, and the activations that stay in float."""
    weights = {id(getattr(module, "quantizer", None)) for module in _weighted(root)}
    rounding = [m for m in root.modules() if isinstance(m, Quantizer | Noise) and id(m) not in weights]
    inside = {id(module.activation) for module in root.modules() if isinstance(module, QuantActivation)}
    floats = [
        module
        for module in root.modules()
        if type(module).__module__ == "torch.nn.modules.activation" and id(module) not in inside
    ]
    return [*rounding, *floats]


def _bits(ensemble: Ensemble) -> int:
    held = {id(parameter): FLOAT_BITS * parameter.numel() for parameter in ensemble.parameters()}
    for buffer in ensemble.buffers():
        if buffer.is_floating_point():
            held[id(buffer)] = FLOAT_BITS * buffer.numel()
    weights: dict[int, int] = {}
    for module in _weighted(ensemble):
        weight = _layer(module).weight
        weights[id(weight)] = max(weights.get(id(weight), 0), _weight_bits(module) * weight.numel())
    return sum((held | weights).values())
