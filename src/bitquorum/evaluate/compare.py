"""Compare two models on the same images and seeds: the difference with its interval, and how sure its sign is."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from bitquorum.evaluate.accuracy import unseen
from bitquorum.interface import InputError


@dataclass(frozen=True, kw_only=True)
class Difference:
    """State a difference of accuracies.

    Attributes:
        value: Mean difference, in [-1, 1].
        low: Lower end of the 95 % interval.
        high: Upper end of the 95 % interval.
        p: Two-sided p-value of no difference.
    """

    value: float
    low: float
    high: float
    p: float


def difference(ours: Float[Tensor, "seeds images"], theirs: Float[Tensor, "seeds images"]) -> Difference:
    r"""Return the mean difference of paired rates of being right, over images and seeds of training.

    Images and seeds are crossed random factors: the variance of the mean is $s^2_{images}/N + s^2_{seeds}/S -
    s^2_{residual}/(N S)$, never below that of the images alone. Its degrees of freedom are Satterthwaite's, so that
    three seeds that disagree make a wide interval; a single seed says nothing of others, and the interval is then one
    over images alone. Interval and p-value are Student's.

    Args:
        ours: Rate of each image under each seed, in [0, 1].
        theirs: The same images and seeds of the other model.

    Raises:
        InputError: if the shapes differ or there are fewer than two images.

    Examples:
        >>> import torch
        >>> ours = torch.tensor([[1.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0, 0.0]])
        >>> found = difference(ours, torch.zeros(1, 8))
        >>> found.value, round(found.low, 2), round(found.high, 2), round(found.p, 3)
        (0.75, 0.36, 1.0, 0.003)
    """
    from scipy.special import stdtr, stdtrit

    if ours.shape != theirs.shape or ours.dim() != 2 or ours.shape[1] < 2:
        raise InputError(
            f"expected rates of the same seeds and images, at least two images, got shapes {tuple(ours.shape)} and "
            f"{tuple(theirs.shape)}"
        )
    d = ours.double() - theirs.double()
    seeds, images = d.shape
    mean = float(d.mean())
    by_image = float(d.mean(0).var()) / images
    by_seed = float(d.mean(1).var()) / seeds if seeds > 1 else 0.0
    residual = d - d.mean(0) - d.mean(1, keepdim=True) + mean
    alone = float(residual.square().sum()) / max(1, (seeds - 1) * (images - 1)) / d.numel()
    variance = by_image + max(0.0, by_seed - alone)
    if variance <= 0:  # every image differs by the same: unlike ones may exist, as `interval` has it
        edge = unseen(images)
        p = 1.0 if mean == 0 else 2.0 ** (1 - images)  # of the sign test
        return Difference(value=mean, low=max(-1.0, mean - edge), high=min(1.0, mean + edge), p=p)
    freedom = variance**2 / (by_image**2 / (images - 1) + (variance - by_image) ** 2 / max(1, seeds - 1))
    half = float(stdtrit(freedom, 0.975)) * math.sqrt(variance)
    p = 2 * float(stdtr(freedom, -abs(mean) / math.sqrt(variance)))
    return Difference(value=mean, low=max(-1.0, mean - half), high=min(1.0, mean + half), p=p)


def holm(p: Sequence[float]) -> list[float]:
    """Return p-values adjusted for their number by the step-down method of Holm, 1979, in the given order.

    Examples:
        >>> holm([0.01, 0.04, 0.03])
        [0.03, 0.06, 0.06]
    """
    order = sorted(range(len(p)), key=lambda index: p[index])
    adjusted, largest = [0.0] * len(p), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p) - rank) * p[index]))
        adjusted[index] = largest
    return adjusted
