"""Record what every member says of images under fresh draws: the raw material of the plane and of detectors."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bitquorum import rng
from bitquorum.ensemble import Ensemble


@torch.no_grad()
def observe(
    ensemble: Ensemble,
    images: Float[Tensor, "images *image"],
    examples: Int[Tensor, "images"],
    *,
    draws: int,
    seed: int,
    batch_size: int = 100,
) -> Float[Tensor, "draws members images classes"]:
    """Return the logits of every member under `draws` draws of `seed`; under one where no member has noise.

    Args:
        ensemble: In evaluation mode.
        images: In [0, 1].
        examples: Identity of each example; with the seed it decides the noise.
        draws: Number of draws.
        seed: Of the draws; their noise differs from that of any other seed.
        batch_size: Images seen at once; it changes results by rounding alone.

    Examples:
        >>> linear = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 3))
        >>> observe(Ensemble([linear]), torch.rand(5, 1, 2, 2), torch.arange(5), draws=8, seed=0).shape
        torch.Size([1, 1, 5, 3])
    """
    seeds = rng.derive_many(seed, draws if ensemble.stochastic else 1, "observe")
    device = next(ensemble.parameters()).device
    parts = []
    for rows in torch.arange(len(images)).split(batch_size):
        batch, index = images[rows].to(device), examples[rows].to(device)
        logits = []
        for one in seeds:
            with rng.draw(one, index):
                logits.append(ensemble(batch))
        parts.append(torch.cat(logits).cpu())
    return torch.cat(parts, 2)
