"""Describe a plane: which threats are laid into it."""

from dataclasses import dataclass
from typing import final, get_args

from bitquorum.data.corrupt import SEVERITIES, CorruptionName
from bitquorum.interface import InputError, Method


@final
@dataclass(frozen=True, kw_only=True)
class Plane(Method):
    """Lay the threats of a stored evaluation, and everyday ones, into the adversarial information plane.

    Every arm is judged on the same images under: no threat; each attack and epsilon of the evaluation; the worst
    versions of the stored ladders; the images that the evaluation's last attack made for every other arm (transfer);
    corners of the ball at random; and corruptions. The threats are stored images, so that no attack runs again.

    Attributes:
        evaluation: Digest of a stored evaluation of the run; empty for the run's own.
        ladders: Digests of stored ladders whose worst versions are laid into the plane; `None` for all of them.
        corruptions: Kinds, as `data.corrupt` has them.
        severities: Of the corruptions, 1 to 5, increasing.
        transfer: Whether images made for the other arms are tried.
        draws: Predictions of each image; members without noise are asked once.
        permutations: Of each test of a correlation, where there are too many to count all.
        seed: Of draws, noise and permutations.
    """

    evaluation: str = ""
    ladders: tuple[str, ...] | None = None
    corruptions: tuple[CorruptionName, ...] = get_args(CorruptionName)
    severities: tuple[int, ...] = (1, 3, 5)
    transfer: bool = True
    draws: int = 10
    permutations: int = 10_000
    seed: int = 0

    def __post_init__(self) -> None:
        if not set(self.severities) <= set(SEVERITIES) or list(self.severities) != sorted(set(self.severities)):
            raise InputError(f"expected increasing severities among {SEVERITIES}, got {self.severities}")
        if min(self.draws, self.permutations) < 1:
            raise InputError(f"expected at least one draw and permutation, got {self.draws} and {self.permutations}")
