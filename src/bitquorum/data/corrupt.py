"""Corrupt images without an adversary: noise, blur, contrast and brightness, in five severities."""

import math
from collections.abc import Callable
from typing import Final, Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from bitquorum import rng
from bitquorum.interface import InputError

CorruptionName = Literal["gaussian-noise", "blur", "contrast", "brightness"]
SEVERITIES: Final = (1, 2, 3, 4, 5)

_STRENGTHS: Final[dict[CorruptionName, tuple[float, ...]]] = {
    "gaussian-noise": (0.02, 0.04, 0.06, 0.08, 0.12),  # standard deviation
    "blur": (0.4, 0.6, 0.8, 1.0, 1.4),  # standard deviation in pixels
    "contrast": (0.8, 0.6, 0.45, 0.3, 0.2),  # share of the contrast that is left
    "brightness": (0.05, 0.1, 0.15, 0.2, 0.3),  # added
}


def corrupt(
    images: Float[Tensor, "batch channels height width"],
    name: CorruptionName,
    severity: int,
    *,
    examples: Int[Tensor, "batch"],
    seed: int = 0,
) -> Float[Tensor, "batch channels height width"]:
    """Return the images under a corruption, cut at [0, 1].

    `gaussian-noise` adds noise that is keyed by seed and example; `blur` is a Gaussian one with reflected borders;
    `contrast` draws each image towards its mean, and `brightness` adds a constant. The kinds are among those of
    Hendrycks and Dietterich, 2019, https://arxiv.org/abs/1903.12261, section 4.1; the strengths are ours, so that
    results do not compare with their benchmark's.

    Args:
        images: In [0, 1].
        name: Kind of corruption.
        severity: 1 to 5.
        examples: Identity of each example.
        seed: Of the noise.

    Raises:
        InputError: for an unknown kind or severity, or bytes in place of floats.

    Examples:
        >>> grey = torch.full((1, 1, 2, 2), 0.5)
        >>> float(corrupt(grey, "brightness", 2, examples=torch.tensor([0])).mean())
        0.6000000238418579
    """
    if name not in get_args(CorruptionName) or severity not in SEVERITIES:
        raise InputError(
            f"expected a corruption among {', '.join(get_args(CorruptionName))} and a severity of 1 to 5, got "
            f"{name!r} and {severity}"
        )
    if not images.is_floating_point():
        raise InputError(f"expected float images in [0, 1], got {images.dtype}; divide by 255")
    strength = _STRENGTHS[name][severity - 1]
    if name == "gaussian-noise":
        u = rng.uniform(rng.derive(seed, name), examples, images.shape[1:].numel(), address=name)
        changed = images + strength * math.sqrt(2) * (2 * u - 1).erfinv().view_as(images).to(images)
    else:
        changed = _SMOOTH[name](images, strength)
    return changed.clamp(0, 1)


def _blur(images: Tensor, deviation: float) -> Tensor:
    radius = min(math.ceil(3 * deviation), min(images.shape[2:]) - 1)
    weights = torch.exp(-0.5 * (torch.arange(-radius, radius + 1, dtype=images.dtype) / deviation) ** 2)
    kernel = (weights / weights.sum()).to(images.device)
    flat = images.flatten(0, 1)[:, None]
    for shape, padding in (((1, 1, -1, 1), (0, 0, radius, radius)), ((1, 1, 1, -1), (radius, radius, 0, 0))):
        flat = F.conv2d(F.pad(flat, padding, mode="reflect"), kernel.view(shape))
    return flat.view_as(images)


def _fade(images: Tensor, share: float) -> Tensor:
    mean = images.mean((1, 2, 3), keepdim=True)
    return mean + share * (images - mean)


_SMOOTH: Final[dict[str, Callable[[Tensor, float], Tensor]]] = {
    "blur": _blur,
    "contrast": _fade,
    "brightness": lambda images, amount: images + amount,
}
