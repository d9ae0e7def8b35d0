"""Add the terms up."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from bitquorum.interface import InputError, Method
from bitquorum.objective.likelihood import EnsembleCrossEntropy, MemberCrossEntropy
from bitquorum.objective.term import Step, Term


@final
@dataclass(frozen=True, kw_only=True)
class Objective(Method):
    r"""Sum weighted terms.

    $$\frac{1}{M} \sum_m CE(p_m, y) + CE(\bar p, y)
    + \beta \, \overline{I(z_i; z_j)} + \gamma \, \overline{I(p_i; p_j \mid Y)} + \dots$$

    The default holds the first two terms; the form is our reconstruction.

    Attributes:
        terms: At least one.
    """

    terms: tuple[Term, ...] = (MemberCrossEntropy(), EnsembleCrossEntropy())

    def __post_init__(self) -> None:
        if not self.terms:
            raise InputError("expected an objective of at least one term, got none")
        repeated = [name for name, count in Counter(type(term).__name__ for term in self.terms).items() if count > 1]
        if repeated:
            raise InputError(f"expected each term once in an objective, got {repeated[0]} several times")

    @property
    def needs_image_gradient(self) -> bool:
        """Whether the images of a step must carry a gradient."""
        return any(term.needs_image_gradient for term in self.terms)

    def weights_at(self, progress: float) -> list[float]:
        """Return the weight of each term at a share of the training."""
        return [term.weight_at(progress) for term in self.terms]

    def __call__(
        self, step: Step, weights: Sequence[float | Tensor] | None = None
    ) -> tuple[Float[Tensor, ""], dict[str, float | Tensor]]:
        """Return the loss and every term's unweighted value by name; a term whose weight is the number 0 is left out.

        Args:
            step: The batch.
            weights: Of the terms; by default those of the step's progress.
        """
        total = torch.zeros((), device=step.images.device)
        values: dict[str, float | Tensor] = {}
        for term, weight in zip(self.terms, weights or self.weights_at(step.progress), strict=True):
            if isinstance(weight, float) and weight == 0:
                continue
            value = term(step)
            values[type(term).__name__] = value.detach()
            total = total + weight * value
        return total, values
