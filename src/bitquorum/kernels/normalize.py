r"""Normalize a batch by its own statistics, with compiled first and second derivatives.

With $\hat x = (x - \mu) r$, $r = (\sigma^2 + \epsilon)^{-1/2}$ and $P_g = g - \bar g - \hat x\,\overline{g \hat x}$,
means over the batch and the image, the backward pass is $\bar x = w r P_g$. A loss of $\bar x$ with gradient $v$ has

$$\nabla_g = w r P_v, \quad
\nabla_x = -w r^2 (\hat x S + \overline{g \hat x} P_v + \overline{v \hat x} P_g), \quad
\nabla_w = n r S, \quad S = \overline{v g} - \bar v \bar g - \overline{v \hat x}\,\overline{g \hat x}.$$

Each is one pass for the means and one for the values, where torch's own double backward takes some twenty.

An image's own gradient is another one: in evaluation the statistics are constants, $\bar x = w r g$, while $P_g$ also
holds what an image does to all others of its batch through $\mu$ and $\sigma$. Inside `statistics_held` backward passes
give the former; its derivatives are those above where only the mean of $v g$ is not zero.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, no_type_check

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from bitquorum.kernels import choice, noise
from bitquorum.kernels.layout import like_layout
from bitquorum.kernels.precision import wide


def fits_normalization(x: Tensor) -> bool:
    """Return whether `normalize` serves this batch: compiled code, images with their channels last in memory."""
    return (
        choice.applies(x, (torch.float32, torch.bfloat16))
        and x.dim() == 4
        and min(x.shape) > 1
        and x.is_contiguous(memory_format=torch.channels_last)
    )


def normalize(
    x: Float[Tensor, "batch channels height width"],
    weight: Float[Tensor, "channels"],
    bias: Float[Tensor, "channels"],
    *,
    near: Float[Tensor, "channels"],
    eps: float,
) -> tuple[Float[Tensor, "batch channels height width"], Float[Tensor, "channels"], Float[Tensor, "channels"]] | None:
    """Return the normalized batch, its means and its (biased) variances, or `None` where the compiler fails.

    Differentiable twice, not more often. Statistics are float32.

    Args:
        x: Channels last in memory; `fits_normalization` tells.
        weight: Factor of each channel.
        bias: Added to each channel.
        near: Any numbers near the means, such as running ones: they keep the variance exact to rounding.
        eps: Added to the variances.
    """
    moments = choice.call(_moments, _rows(x.detach()), near, noise.scalar(eps, x.device))
    if moments is None:
        return None
    mean, variance, rate = moments
    y: Tensor = _Normalize.apply(x, weight, bias, mean, rate)  # type: ignore[assignment]
    return y, mean, variance


class _State:
    """Hold the process-wide choice: autograd's own threads must see it, so it is no context variable."""

    held = False


@contextmanager
def statistics_held() -> Iterator[None]:
    """Run the backward passes of the block as in evaluation: with the statistics as constants of each channel.

    The gradients still know that the statistics follow from the batch, for derivatives of their own.
    """
    before, _State.held = _State.held, True
    try:
        yield
    finally:
        _State.held = before


def normalize_plain(
    x: Float[Tensor, "batch channels height width"],
    weight: Float[Tensor, "channels"] | None,
    bias: Float[Tensor, "channels"] | None,
    *,
    running: tuple[Float[Tensor, "channels"], Float[Tensor, "channels"]],
    momentum: float,
    eps: float,
) -> Float[Tensor, "batch channels height width"]:
    """Return the normalized batch, by torch's own kernels; running mean and variance follow in place."""
    return _Plain.apply(x, weight, bias, *running, momentum, eps)  # type: ignore[return-value]


class _Normalize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rate: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, mean, rate)
        return _images(choice.compute(_values, _rows(x), mean, rate, weight, bias), x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return (*_Backward.apply(grads[0], *ctx.saved_tensors), None, None)  # type: ignore[misc]


class _Plain(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, variance: Tensor, *rest: float
    ) -> Tensor:
        y, *own = torch.native_batch_norm(x, weight, bias, mean, variance, True, *rest)
        ctx.save_for_backward(x, weight, *own)
        ctx.eps = rest[1]
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, rate = ctx.saved_tensors
        of_x, of_weight, of_bias = torch.ops.aten.native_batch_norm_backward(
            grads[0], x, weight, None, None, mean, rate, True, ctx.eps, [not _State.held, *[weight is not None] * 2]
        )
        if _State.held:
            scale = torch.rsqrt(wide(x).var((0, 2, 3), correction=0) + ctx.eps)
            scale = scale if weight is None else scale * weight
            of_x = (grads[0] * scale[:, None, None]).to(x.dtype)
        return of_x, of_weight, of_bias, None, None, None, None


class _Backward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, g: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rate: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        g = like_layout(g, x)
        *means, of_weight, of_bias = choice.compute(_gradient_means, _rows(x), _rows(g), mean, rate)
        ctx.held = _State.held
        if ctx.held:
            means = [torch.zeros_like(mean)] * 2
        ctx.save_for_backward(g, x, weight, mean, rate, *means)
        ctx.set_materialize_grads(False)
        of_x = choice.compute(_gradient, _rows(x), _rows(g), mean, rate, weight, *means)
        return _images(of_x, x), of_weight, of_bias

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        g, x, weight, mean, rate, mean_g, mean_gx = ctx.saved_tensors
        of_x, of_weight, of_bias = grads
        v = torch.zeros_like(x) if of_x is None else like_layout(of_x, x)
        rows = (_rows(x), _rows(g), _rows(v))
        *means, to_weight = choice.compute(_second_means, *rows, mean, rate, mean_g, mean_gx)
        if ctx.held:
            means[:2] = [torch.zeros_like(mean)] * 2
        to_g, to_x = choice.compute(_second, *rows, mean, rate, weight, mean_g, mean_gx, *means)
        to_g, to_x = _images(to_g, x), _images(to_x, x)
        if of_weight is not None or of_bias is not None:  # somebody differentiates the gradients of the parameters
            a = torch.zeros_like(weight) if of_weight is None else of_weight
            b = torch.zeros_like(weight) if of_bias is None else of_bias
            hat = (x.float() - mean[:, None, None]) * rate[:, None, None]
            to_g = to_g + (a[:, None, None] * hat + b[:, None, None]).to(to_g.dtype)
            inner = g.float() - mean_g[:, None, None] - hat * mean_gx[:, None, None]
            to_x = to_x + ((a * rate)[:, None, None] * inner).to(to_x.dtype)
        return to_g, to_x, to_weight, None, None


def _rows(x: Tensor) -> Float[Tensor, "rows channels"]:
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def _images(rows: Float[Tensor, "rows channels"], like: Tensor) -> Tensor:
    batch, channels, height, width = like.shape
    return rows.view(batch, height, width, channels).permute(0, 3, 1, 2)


# The functions below are traced by the compiler; type checks at run time would break the trace.


@no_type_check
def _moments(x: Tensor, near: Tensor, eps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    shifted = x.float() - near
    first, second = shifted.mean(0), (shifted * shifted).mean(0)
    variance = (second - first * first).clamp(min=0)
    return near + first, variance, torch.rsqrt(variance + eps)


@no_type_check
def _values(x: Tensor, mean: Tensor, rate: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return ((x.float() - mean) * (rate * weight) + bias).to(x.dtype)


@no_type_check
def _gradient_means(x: Tensor, g: Tensor, mean: Tensor, rate: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    hat, wide = (x.float() - mean) * rate, g.float()
    of_bias, of_weight = wide.sum(0), (wide * hat).sum(0)
    return of_bias / x.shape[0], of_weight / x.shape[0], of_weight, of_bias


@no_type_check
def _gradient(
    x: Tensor, g: Tensor, mean: Tensor, rate: Tensor, weight: Tensor, mean_g: Tensor, mean_gx: Tensor
) -> Tensor:
    hat = (x.float() - mean) * rate
    return ((g.float() - mean_g - hat * mean_gx) * (rate * weight)).to(g.dtype)


@no_type_check
def _second_means(
    x: Tensor, g: Tensor, v: Tensor, mean: Tensor, rate: Tensor, mean_g: Tensor, mean_gx: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    hat, wide_v = (x.float() - mean) * rate, v.float()
    mean_v, mean_vx, mean_vg = wide_v.mean(0), (wide_v * hat).mean(0), (wide_v * g.float()).mean(0)
    shared = mean_vg - mean_v * mean_g - mean_vx * mean_gx
    return mean_v, mean_vx, mean_vg, x.shape[0] * rate * shared


@no_type_check
def _second(x: Tensor, g: Tensor, v: Tensor, *channels: Tensor) -> tuple[Tensor, Tensor]:
    mean, rate, weight, mean_g, mean_gx, mean_v, mean_vx, mean_vg = channels
    hat = (x.float() - mean) * rate
    inner_v = v.float() - mean_v - hat * mean_vx
    inner_g = g.float() - mean_g - hat * mean_gx
    shared = mean_vg - mean_v * mean_g - mean_vx * mean_gx
    to_x = hat * shared + mean_gx * inner_v + mean_vx * inner_g
    return (rate * weight * inner_v).to(g.dtype), (-(weight * rate * rate) * to_x).to(x.dtype)
