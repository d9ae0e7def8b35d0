"""Fit the labels: cross-entropy of the members and of the ensemble."""

from dataclasses import dataclass
from typing import final

from jaxtyping import Float
from torch import Tensor

from bitquorum.interface import InputError
from bitquorum.objective.term import Step, Term, cross_entropy, mean_probability_cross_entropy


@final
@dataclass(frozen=True, kw_only=True)
class MemberCrossEntropy(Term):
    r"""Average the members' cross-entropies: $\frac{1}{M} \sum_m CE(p_m, y)$, in nats.

    Attributes:
        smoothing: Label smoothing in [0, 1).
    """

    smoothing: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.smoothing < 1:
            raise InputError(f"expected label smoothing in [0, 1), got {self.smoothing}")

    @property
    def capturable(self) -> bool:
        """Always."""
        return True

    def __call__(self, step: Step) -> Float[Tensor, ""]:
        """Return the mean over members and examples."""
        return cross_entropy(step.logits, step.labels, self.smoothing).mean()


@final
@dataclass(frozen=True, kw_only=True)
class EnsembleCrossEntropy(Term):
    r"""Take the cross-entropy of the mean probability: $CE(\bar p, y)$, in nats."""

    @property
    def capturable(self) -> bool:
        """Always."""
        return True

    def __call__(self, step: Step) -> Float[Tensor, ""]:
        """Return the mean over examples."""
        return mean_probability_cross_entropy(step.logits, step.labels).mean()
