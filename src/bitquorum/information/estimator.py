"""Define what every estimator of mutual information on samples declares and returns."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from statistics import NormalDist
from typing import ClassVar, Literal, TypeAlias

from jaxtyping import Shaped
from torch import Tensor

from bitquorum.interface import InputError, Method

Bound: TypeAlias = Literal["plug-in", "lower", "upper"]


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Hold an estimate in bits, its standard error in bits and the number of samples behind both.

    Examples:
        >>> Estimate(value=0.5, standard_error=0.01, samples=1000)
        Estimate(value=0.5, standard_error=0.01, samples=1000)
    """

    value: float
    standard_error: float
    samples: int

    def __post_init__(self) -> None:
        """Refuse a negative standard error and an estimate without samples."""
        if not self.standard_error >= 0 or self.samples < 1:
            raise InputError(
                f"Estimate: expected standard_error >= 0 and samples >= 1, got {self.standard_error} and {self.samples}"
            )

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """Return the normal interval around the value; it covers chance and not the bias of the estimator.

        Raises:
            InputError: if `confidence` is not in (0, 1).

        Examples:
            >>> print("{:.2f} to {:.2f}".format(*Estimate(value=0.5, standard_error=0.01, samples=1000).interval()))
            0.48 to 0.52
        """
        if not 0 < confidence < 1:
            raise InputError(f"Estimate: expected a confidence in (0, 1), got {confidence}")
        reach = NormalDist().inv_cdf((1 + confidence) / 2) * self.standard_error
        return self.value - reach, self.value + reach


@dataclass(frozen=True, kw_only=True)
class Estimator(Method, ABC):
    """Estimate the mutual information of two variables from paired samples.

    A subclass declares `bound`: whether its expectation lies below the MI (`lower`: right to maximise), above
    it (`upper`: right to minimise) or approaches it from a finite table or density (`plug-in`).
    """

    unit: ClassVar[Literal["bits"]] = "bits"
    bound: ClassVar[Bound]

    @abstractmethod
    def __call__(self, a: Shaped[Tensor, "samples *a"], b: Shaped[Tensor, "samples *b"]) -> Estimate:
        """Return the estimate for samples in the first dimension of `a` and `b`, row for row.

        Raises:
            InputError: if the samples are of the wrong shape or kind.
        """
