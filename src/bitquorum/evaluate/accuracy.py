"""State an accuracy over images and draws with its interval."""

import math
from dataclasses import dataclass
from typing import Final

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from bitquorum.interface import InputError

NORMAL: Final = 1.959964
"""Quantile of the normal distribution that leaves 2.5 % on either side."""


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """State an accuracy with everything that belongs to it.

    Attributes:
        value: Expected accuracy in [0, 1].
        low: Lower end of the 95 % interval.
        high: Upper end of the 95 % interval.
        images: Number of images.
        draws: Number of fresh predictions of each image.
    """

    value: float
    low: float
    high: float
    images: int
    draws: int

    def text(self) -> str:
        """Return the value in percent with its interval.

        Examples:
            >>> Accuracy(value=0.284, low=0.241, high=0.329, images=300, draws=10).text()
            '28.4 [24, 33] %'
        """
        digits = 0 if self.images < 1000 else 1  # no more than the interval's width warrants
        return f"{100 * self.value:.1f} [{100 * self.low:.{digits}f}, {100 * self.high:.{digits}f}] %"


def worst_of(correct: Bool[Tensor, "draws images"], tries: int) -> float:
    r"""Return the expected accuracy against an attacker who tries each image under `tries` fresh draws.

    An image counts while every try is right. With k of n draws right, $\\binom{k}{R} / \\binom{n}{R}$ is the unbiased
    estimate of the R-th power of its probability of being right.

    Raises:
        InputError: if there are fewer draws than tries.

    Examples:
        >>> worst_of(torch.tensor([[True, True], [True, False], [True, True]]), 2)
        0.6666666666666666
    """
    draws = len(correct)
    if not 1 <= tries <= draws:
        raise InputError(f"expected a number of tries from 1 to the {draws} draws at hand, got {tries}")
    right = correct.sum(0).double()
    chance = torch.ones_like(right)
    for index in range(tries):
        chance = chance * (right - index).clamp(min=0) / (draws - index)
    return float(chance.mean())


def interval(correct: Bool[Tensor, "draws images"] | Float[Tensor, "draws images"], *, z: float = NORMAL) -> Accuracy:
    r"""Return the mean with a 95 % interval over images and draws.

    The variance is that of two crossed random factors, $s^2_{images}/N + s^2_{draws}/R - s^2_{residual}/(N R)$,
    unbiased, and never below that of the images alone. Divided into the variance of one image, $p (1 - p) N / (N - 1)$,
    it gives an effective number of independent trials, which enters the Wilson score interval, so that the interval
    stays inside [0, 1] and does not shrink to a point; without noise it is that of N trials. What the images share of a
    draw's noise is known from R draws only: there Student's quantile takes the place of the normal one. One right
    prediction more never lowers the upper bound below that of none: images unlike those seen may exist all the same.

    Args:
        correct: Whether each prediction of each image was right; or how often, with seeds of training for draws.
        z: Normal quantile; the default leaves 2.5 % on either side.

    Examples:
        >>> result = interval(torch.tensor([[True, True, False, True]] * 3))
        >>> round(result.value, 2), round(result.low, 2), round(result.high, 2)
        (0.75, 0.3, 0.95)
    """
    x = correct.double()
    draws, images = x.shape
    p = float(x.mean())
    by_image = float((x.mean(0) - p).square().sum()) / max(1, images - 1) / images
    by_draw = float((x.mean(1) - p).square().sum()) / max(1, draws - 1) / draws
    residual = x - x.mean(0) - x.mean(1, keepdim=True) + p
    alone = float(residual.square().sum()) / max(1, (draws - 1) * (images - 1)) / x.numel()
    shared = max(0.0, by_draw - alone)
    variance = by_image + shared
    single = p * (1 - p) * images / max(1, images - 1)
    trials = single / variance if variance > 0 else float(images)
    trials = min(max(trials, 1.0), float(x.numel()))
    if shared:
        from scipy.special import ndtr, stdtrit

        z = float(stdtrit((draws - 1) * (variance / by_draw) ** 2, ndtr(z)))
    low, high = wilson(p, trials, z=z)
    edge = unseen(images, z=z)
    return Accuracy(value=p, low=min(low, 1 - edge), high=max(high, edge), images=images, draws=draws)


def wilson(share: float, trials: int | float, *, z: float = NORMAL) -> tuple[float, float]:
    """Return the ends of the score interval of a share of independent trials (Wilson, 1927), both in [0, 1].

    Examples:
        >>> [round(end, 2) for end in wilson(0.75, 4)]
        [0.3, 0.95]
    """
    s = z * z
    centre = (share + s / (2 * trials)) / (1 + s / trials)
    half = z / (1 + s / trials) * math.sqrt(share * (1 - share) / trials + s / (4 * trials * trials))
    return max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half))


def unseen(trials: int | float, *, z: float = NORMAL) -> float:
    """Return how large a share may be of which not one of so many independent trials was: the end of `wilson(0, n)`.

    Examples:
        >>> round(unseen(4), 2)
        0.49
    """
    return z * z / (trials + z * z)
