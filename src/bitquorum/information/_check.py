"""Check what the public functions of this folder are given; each check waits for the device once."""

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from bitquorum.interface import InputError


def wide(x: Shaped[Tensor, "..."], name: str) -> Float[Tensor, "..."]:
    """Return `x` in float32 or wider.

    Raises:
        InputError: if `x` does not hold floating point numbers.
    """
    if not x.is_floating_point():
        raise InputError(f"{name}: expected a floating point tensor, got {x.dtype}; do x.float() or one-hot codes")
    return x.to(torch.promote_types(x.dtype, torch.float32))


def tolerance(dtype: torch.dtype) -> float:
    """Return how far from one a sum of probabilities of this dtype may be."""
    return max(1e-4, 8 * torch.finfo(dtype).eps)


def at_least(x: Shaped[Tensor, "..."], dims: int, name: str) -> None:
    """Raise `InputError` unless `x` has `dims` dimensions or more."""
    if x.dim() < dims:
        raise InputError(f"{name}: expected at least {dims} dimensions, got shape {tuple(x.shape)}")


def distribution(p: Shaped[Tensor, "..."], dim: int | tuple[int, ...], name: str) -> Float[Tensor, "..."]:
    """Return `p` in float32 or wider after checking that it is a probability distribution over `dim`.

    Raises:
        InputError: if an entry is negative or not finite, or a sum over `dim` is not one.
    """
    values = wide(p, name)
    if p.numel() == 0:
        raise InputError(f"{name}: expected a table with entries, got shape {tuple(p.shape)}")
    sums = values.detach().sum(dim)
    # A comparison with NaN is false, so one reduction finds all three faults.
    if not bool(((sums - 1).abs() <= tolerance(p.dtype)).all() & (values.detach() >= 0).all()):
        raise InputError(
            f"{name}: expected probabilities >= 0 that sum to 1 over dimension {dim}, got a minimum of "
            f"{float(values.detach().min()):.4g} and sums from {float(sums.min()):.4g} to {float(sums.max()):.4g}; "
            "do a softmax, or divide by the sum"
        )
    return values
