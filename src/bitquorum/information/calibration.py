"""Say how far an estimator of features can be trusted at a given size, by a law whose mutual information is known."""

from dataclasses import dataclass
from statistics import fmean
from typing import final

import torch

from bitquorum import rng
from bitquorum.information.estimator import Bound, Estimator
from bitquorum.information.laws import correlated_gaussians
from bitquorum.interface import InputError


@final
@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Hold what an estimator returns, in the mean, on Gaussians of known MI; print it beside every estimate.

    `returned[i]` bits belong to `true[i]` bits. Gaussians are kind: features of a network are seldom easier.

    Examples:
        >>> shape = {"width_a": 20, "width_b": 20, "samples": 1000}
        >>> print(Calibration(name="KSG", bound="plug-in", **shape, true=(6.4,), returned=(1.3,)))
        KSG, no bound; on Gaussians of 20 + 20 dimensions and 1,000 samples it returns 1.30 where 6.4 bits are true
    """

    name: str
    bound: Bound
    width_a: int
    width_b: int
    samples: int
    true: tuple[float, ...]
    returned: tuple[float, ...]

    def __str__(self) -> str:
        """Return one sentence with the direction of the estimator and each pair of numbers."""
        kind = "no bound" if self.bound == "plug-in" else f"{self.bound} bound"
        pairs = [f"{found:.2f} where {truth:.3g}" for truth, found in zip(self.true, self.returned, strict=True)]
        return (
            f"{self.name}, {kind}; on Gaussians of {self.width_a} + {self.width_b} dimensions and "
            f"{self.samples:,} samples it returns {', '.join(pairs)} bits are true"
        )


def calibrate(
    estimator: Estimator,
    width_a: int,
    width_b: int,
    samples: int,
    *,
    true: tuple[float, ...] = (1.0, 4.0),
    repeats: int = 1,
    seed: int = 0,
) -> Calibration:
    """Return what an estimator makes of Gaussians with the widths and the number of samples at hand.

    Args:
        estimator: An estimator of features; those of codes do not take Gaussians.
        width_a: The number of dimensions of one variable, as flattened.
        width_b: That of the other variable.
        samples: The number of samples of the estimate that is to be judged.
        true: The MI of the Gaussians in bits, in rising order.
        repeats: Samples that each mean is taken over.
        seed: Of the samples.

    Raises:
        InputError: if `true` is empty or a number is out of range.

    Examples:
        >>> from bitquorum.information import KSG
        >>> print(calibrate(KSG(), 2, 2, 300, true=(1.0,)))
        KSG, no bound; on Gaussians of 2 + 2 dimensions and 300 samples it returns 1.0... where 1 bits are true
    """
    if not true or repeats < 1:
        raise InputError(f"calibrate: expected at least one true value and one repeat, got {true} and {repeats}")

    def mean(information: float, place: int) -> float:
        generators = (
            torch.Generator().manual_seed(rng.derive(seed, "calibrate", place, repeat)) for repeat in range(repeats)
        )
        drawn = (
            correlated_gaussians(information, width_a, width_b, samples=samples, generator=generator)
            for generator in generators
        )
        return fmean(estimator(a, b).value for a, b in drawn)

    return Calibration(
        name=type(estimator).__name__,
        bound=estimator.bound,
        width_a=width_a,
        width_b=width_b,
        samples=samples,
        true=true,
        returned=tuple(mean(information, place) for place, information in enumerate(true)),
    )
