"""Decide by repeated fresh draws whether an image still stands, and stop when the answer is clear."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bitquorum.interface import InputError, Method


@dataclass(frozen=True, kw_only=True, eq=False)
class Tally:
    """Hold what a sequential test saw of each image.

    Attributes:
        right: Number of right predictions.
        draws: Number of predictions.
        broken: Whether the image was found to be broken.
    """

    right: Int[Tensor, "images"]
    draws: Int[Tensor, "images"]
    broken: Bool[Tensor, "images"]

    @property
    def rate(self) -> Float[Tensor, "images"]:
        """The share of right predictions, drawn towards one half by one success and one failure (Laplace)."""
        return (self.right + 1) / (self.draws + 2)


@final
@dataclass(frozen=True, kw_only=True)
class SequentialTest(Method):
    r"""Decide whether the probability that an image is classified correctly is `broken` or `standing`.

    Wald's sequential probability ratio test: after k right predictions of n the log-likelihood ratio

    $$k \log \frac{p_1}{p_0} + (n - k) \log \frac{1 - p_1}{1 - p_0}$$

    of standing ($p_1$) against broken ($p_0$) decides once its magnitude reaches $\log((1 - e) / e)$. An image of
    probability $p_1$ or more is called broken with a probability of at most $e / (1 - e)$; one that is undecided after
    `most` draws is taken to stand, so that the bound holds for the test cut short, and an attack goes on rather than
    off. An error here costs the attacker: the accuracy that is stated is measured on other draws. Source: Wald, 1945,
    *Sequential tests of statistical hypotheses*, https://doi.org/10.1214/aoms/1177731118, section 3.

    Attributes:
        broken: Probability $p_0$ at which an image is given up as broken.
        standing: Probability $p_1$ at which it surely stands.
        error: Error $e$ of either kind.
        least: Draws before an image is taken to stand, so that its rate means something.
        most: Draws after which it is.
    """

    broken: float = 0.03
    standing: float = 0.15
    error: float = 0.01
    least: int = 16
    most: int = 64

    def __post_init__(self) -> None:
        if not 0 < self.broken < self.standing < 1 or not 0 < self.error < 0.5:
            raise InputError(
                "expected 0 < broken < standing < 1 and an error in (0, 0.5), got "
                f"{self.broken}, {self.standing} and {self.error}"
            )
        if not 1 <= self.least <= self.most:
            raise InputError(f"expected 1 <= least <= most, got {self.least} and {self.most}")

    def __call__(
        self,
        predict: Callable[[Int[Tensor, "chosen"], int, int], Bool[Tensor, "draws chosen"]],
        count: int,
        *,
        block: int = 8,
        device: torch.device | str = "cpu",
    ) -> Tally:
        """Test `count` images.

        Args:
            predict: Returns whether draws number `first` to `first + number - 1` of the images at the given positions
                are right: `predict(positions, first, number)`.
            count: Number of images.
            block: Draws taken at once; it changes how many are taken, and no draw.
            device: Where the tally lies.
        """
        right = torch.zeros(count, dtype=torch.int64, device=device)
        draws, broken, open_ = right.clone(), right.bool(), torch.ones(count, dtype=torch.bool, device=device)
        gain, loss = self._steps()
        bound = math.log((1 - self.error) / self.error)
        for first in range(0, self.most, block):
            chosen = open_.nonzero()[:, 0]
            if not len(chosen):
                break
            for outcome in predict(chosen, first, min(block, self.most - first)):
                counted = open_[chosen]
                right[chosen] += (outcome & counted).long()
                draws[chosen] += counted.long()
                ratio = right * gain - (draws - right) * loss
                broken |= open_ & (ratio <= -bound)
                open_ &= ~broken & ~((ratio >= bound) & (draws >= self.least))
        return Tally(right=right, draws=draws, broken=broken)

    def _steps(self) -> tuple[float, float]:
        """Return what a right prediction adds to the ratio, and what a wrong one takes away."""
        return math.log(self.standing / self.broken), math.log((1 - self.broken) / (1 - self.standing))
