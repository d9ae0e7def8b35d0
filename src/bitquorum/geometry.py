"""Measure and project perturbations of images in [0, 1]."""

from jaxtyping import Float
from torch import Tensor

from bitquorum import rng


def project_linf(
    adversarial: Float[Tensor, "batch *image"], images: Float[Tensor, "batch *image"], epsilon: float
) -> Float[Tensor, "batch *image"]:
    """Return the nearest point within `epsilon` of `images` in the maximum norm and within [0, 1].

    Examples:
        >>> import torch
        >>> project_linf(torch.tensor([[0.9, -0.2]]), torch.tensor([[0.5, 0.1]]), 0.25)
        tensor([[0.7500, 0.0000]])
    """
    return adversarial.clamp(images - epsilon, images + epsilon).clamp(0, 1)


def random_linf(
    images: Float[Tensor, "batch *image"], epsilon: float, *, seed: int, examples: Tensor
) -> Float[Tensor, "batch *image"]:
    """Return points drawn uniformly from the ball around `images`, cut at [0, 1]; keyed by example."""
    u = rng.uniform(seed, examples, images[0].numel(), address="random start").view_as(images)
    return project_linf(images + epsilon * (2 * u - 1), images, epsilon)


def linf(a: Float[Tensor, "batch *image"], b: Float[Tensor, "batch *image"]) -> Float[Tensor, "batch"]:
    """Return the maximum norm of the difference for each example."""
    return (a - b).abs().flatten(1).amax(1)
