"""Record what every member says of images under fresh draws: the raw material of the plane and of detectors."""

from typing import Final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bitquorum import rng
from bitquorum.ensemble import Ensemble

_BLOCK: Final = 50  # images that meet the same draws of the weights


@torch.no_grad()
def observe(
    ensemble: Ensemble,
    images: Float[Tensor, "images *image"],
    examples: Int[Tensor, "images"],
    *,
    draws: int,
    seed: int,
) -> Float[Tensor, "draws members images classes"]:
    """Return the logits of every member under `draws` draws of `seed`; under one where no member has noise.

    Every 50 images in order meet draws of their own: noise of the weights is common to the images of a draw, and few
    draws for all would leave what they share in every mean. The same number of the same images in the same order meets
    the same draws, so that what is said of clean and of attacked versions can be compared.

    Args:
        ensemble: In evaluation mode.
        images: In [0, 1].
        examples: Identity of each example; with the seed it decides the noise of activations.
        draws: Number of draws of each image.
        seed: Of the draws; their noise differs from that of any other seed.

    Examples:
        >>> linear = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 3))
        >>> observe(Ensemble([linear]), torch.rand(5, 1, 2, 2), torch.arange(5), draws=8, seed=0).shape
        torch.Size([1, 1, 5, 3])
    """
    device = next(ensemble.parameters()).device
    parts = []
    for number, rows in enumerate(torch.arange(len(images)).split(_BLOCK)):
        batch, index = images[rows].to(device), examples[rows].to(device)
        logits = []
        for one in rng.derive_many(seed, draws if ensemble.stochastic else 1, "observe", number):
            with rng.draw(one, index):
                logits.append(ensemble(batch))
        parts.append(torch.cat(logits).cpu())
    return torch.cat(parts, 2)
