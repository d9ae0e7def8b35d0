"""State how much noise every quantizer adds, and how much information it lets through."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from bitquorum import rng
from bitquorum.ensemble import Ensemble
from bitquorum.layers import QuantActivation, QuantImage, QuantLayer
from bitquorum.quantizers import Quantizer
from bitquorum.registry import type_name

_PART: Final = 1 << 16  # elements whose probabilities are held at once
_ROLES: Final = {QuantLayer: "weight", QuantActivation: "activation", QuantImage: "image"}


@torch.no_grad()
def layer_rows(
    ensemble: Ensemble, images: Float[Tensor, "images *image"], examples: Int[Tensor, "images"], *, seed: int = 0
) -> list[dict[str, Any]]:
    """Return a row for each quantizer: mean H(Q(x) | x) and I(x; Q(x)), in bits for each element, in closed form.

    x is uniform over the elements that the quantizer meets, under one draw of the layers before it: those of a handful
    of images are enough, and memory grows with them, though not with the number of levels.

    Args:
        ensemble: In evaluation mode.
        images: In [0, 1].
        examples: Identity of each example.
        seed: Of the draw.
    """
    seen: dict[nn.Module, Tensor] = {}
    roles = {id(layer.quantizer): _ROLES[type(layer)] for layer in ensemble.modules() if type(layer) in _ROLES}
    with _inputs(ensemble, seen), rng.draw(rng.derive(seed, "layers"), examples):
        ensemble(images)
    rows = []
    for name, module in ensemble.named_modules():
        if not isinstance(module, Quantizer) or module not in seen:
            continue
        _, member, layer = name.split(".", 2)
        noise, rate = _bits(module, seen[module])
        rows.append(
            {
                "member": int(member),
                "layer": layer.removesuffix("quantizer").removesuffix(".") or "image",
                "role": roles.get(id(module), "activation"),
                "bits": module.bits,
                "law": type_name(type(module.law)),
                "noise_bits": noise,
                "rate_bits": rate,
                "images": len(images),
            }
        )
    return rows


def _bits(quantizer: Quantizer, x: Tensor) -> tuple[float, float]:
    """Return the means of `Quantizer.entropy` and `rate`, from parts of the elements where all share a range."""
    parts = x.reshape(-1).split(_PART) if quantizer.log_step.dim() == 0 else (x,)
    noise, levels = torch.zeros((), dtype=torch.float64), torch.zeros(quantizer.top + 1, dtype=torch.float64)
    for part in parts:
        p = quantizer.probabilities(part).flatten(0, -2).double().cpu()
        noise, levels = noise + torch.special.entr(p).sum(), levels + p.sum(0)
    noise, total = noise / x.numel(), torch.special.entr(levels / x.numel()).sum()
    return float(noise) / math.log(2), float(total - noise) / math.log(2)


def _note(module: nn.Module, args: tuple[Tensor, ...], into: dict[nn.Module, Tensor]) -> None:
    into.setdefault(module, args[0].detach())


@contextmanager
def _inputs(ensemble: Ensemble, into: dict[nn.Module, Tensor]) -> Iterator[None]:
    """Keep what every quantizer is given, the first time that it is called."""
    quantizers = [module for module in ensemble.modules() if isinstance(module, Quantizer)]
    hooks = [module.register_forward_pre_hook(lambda module, args: _note(module, args, into)) for module in quantizers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
