"""Prepare paired feature vectors for the estimators on continuous samples."""

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from bitquorum.information import _check
from bitquorum.interface import InputError


def paired(
    a: Shaped[Tensor, "samples *a"], b: Shaped[Tensor, "samples *b"], least: int, name: str
) -> tuple[Float[Tensor, "samples a"], Float[Tensor, "samples b"]]:
    """Return both as rows of features in float64 on the CPU, each column with mean zero and variance one.

    MI does not change when a coordinate is moved or scaled; a constant one becomes zero.

    Raises:
        InputError: if there are fewer than `least` samples, they are not paired, not floating point or not finite.
    """
    if a.dim() < 1 or a.shape[:1] != b.shape[:1] or a.shape[0] < least:
        raise InputError(f"{name}: expected at least {least} paired samples, got {tuple(a.shape)}, {tuple(b.shape)}")
    return _standardized(a, name), _standardized(b, name)


def _standardized(x: Shaped[Tensor, "samples *x"], name: str) -> Float[Tensor, "samples x"]:
    values = _check.wide(x, name).detach().cpu().double()
    rows = values[:, None] if values.dim() == 1 else values.flatten(1)
    if rows.shape[1] == 0 or not bool(rows.isfinite().all()):
        raise InputError(f"{name}: expected at least one feature and finite values, got shape {tuple(x.shape)}")
    centred = rows - rows.mean(0)
    scale = centred.square().mean(0).sqrt()
    # Below this a column is constant up to the rounding of its mean.
    still = scale <= 1e-12 * rows.abs().amax(0)
    return torch.where(still, 0.0, centred / scale.masked_fill(still, 1.0))
