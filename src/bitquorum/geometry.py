"""Measure and project perturbations of images in [0, 1]."""

from collections.abc import Sequence
from typing import Literal

from jaxtyping import Float, Shaped
from torch import Tensor

from bitquorum import rng

Norm = Literal["linf", "l2"]


def increasing(epsilons: Sequence[float]) -> bool:
    """Return whether radii increase, and by enough for the names of their results, which have six decimals.

    Examples:
        >>> increasing([0.1, 0.2]), increasing([0.2, 0.1]), increasing([0.1, 0.1000001])
        (True, False, False)
    """
    names = [f"{epsilon:.6f}" for epsilon in epsilons]
    return list(epsilons) == sorted(epsilons) and len(set(names)) == len(names)


def norm_of(difference: Float[Tensor, "batch *image"], norm: Norm) -> Float[Tensor, "batch"]:
    """Return the norm of each example's difference.

    Examples:
        >>> import torch
        >>> norm_of(torch.tensor([[3.0, -4.0]]), "linf"), norm_of(torch.tensor([[3.0, -4.0]]), "l2")
        (tensor([4.]), tensor([5.]))
    """
    flat = difference.flatten(1)
    return flat.abs().amax(1) if norm == "linf" else flat.square().sum(1).sqrt()


def project(
    adversarial: Float[Tensor, "batch *image"], images: Float[Tensor, "batch *image"], epsilon: float, norm: Norm
) -> Float[Tensor, "batch *image"]:
    """Return a point within `epsilon` of `images` and within [0, 1]: the nearest one for `linf`.

    For `l2` it is the nearest point of the ball, then of the box; it stays in the ball, but is not always the nearest
    point of both.

    Examples:
        >>> import torch
        >>> project(torch.tensor([[0.9, -0.2]]), torch.tensor([[0.5, 0.1]]), 0.25, "linf")
        tensor([[0.7500, 0.0000]])
    """
    if norm == "linf":
        return adversarial.clamp(images - epsilon, images + epsilon).clamp(0, 1)
    delta = adversarial - images
    shrink = (epsilon / norm_of(delta, norm).clamp(min=1e-30)).clamp(max=1.0)
    return (images + per_example(shrink, delta) * delta).clamp(0, 1)


def random_point(
    images: Float[Tensor, "batch *image"], epsilon: float, norm: Norm, *, seed: int, examples: Tensor
) -> Float[Tensor, "batch *image"]:
    """Return points drawn uniformly from the ball around `images`, cut at [0, 1]; keyed by example."""
    size = images.shape[1:].numel()
    u = rng.uniform(seed, examples, size + 1, address="random start").to(images.dtype)
    ball = (2 * u[:, :size] - 1).view_as(images)
    if norm == "linf":
        return project(images + epsilon * ball, images, epsilon, norm)
    normal = ball.erfinv()  # up to a factor, which the direction does not see
    length = epsilon * u[:, -1] ** (1 / size)
    return project(ascend(images, normal, length, norm), images, epsilon, norm)


def ascend(
    x: Float[Tensor, "batch *image"], gradient: Float[Tensor, "batch *image"], length: float | Tensor, norm: Norm
) -> Float[Tensor, "batch *image"]:
    """Return the step of the given length (a number, or one for each example) in the direction of steepest ascent."""
    if isinstance(length, Tensor):
        length = per_example(length, x)
    if norm == "linf":
        return x + length * gradient.sign()
    return x + length * gradient / per_example(norm_of(gradient, norm).clamp(min=1e-30), gradient)


def per_example(values: Shaped[Tensor, "batch"], like: Float[Tensor, "batch *image"]) -> Tensor:
    """Return one value for each example, shaped to broadcast against images."""
    return values.view(-1, *[1] * (like.dim() - 1))
