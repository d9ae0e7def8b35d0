"""Make the members differ: mutual information between their features and between their outputs, in bits.

Variables, estimators, signs and weights are our reconstruction: the paper (arXiv 2312.00105) says that MI between
members captures diversity and accuracy, and no more is public. A positive weight makes MI small.
"""

from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from bitquorum.information import (
    conditional_mutual_information,
    moving,
    mutual_information,
    pairs,
    pairwise_class_joints,
    pairwise_joints,
    renyi_mutual_information,
)
from bitquorum.interface import InputError
from bitquorum.objective.term import Step, Term


@final
@dataclass(frozen=True, kw_only=True)
class FeatureMI(Term):
    r"""Average over pairs the matrix-based Rényi MI of penultimate features: $I_\alpha(z_i; z_j)$.

    The estimate is one of the mini-batch and is biased by its size: use it as a training term, never as a result.

    Attributes:
        alpha: Order; 2 needs no eigenvalues.
    """

    alpha: float = 2.0

    def __call__(self, step: Step) -> Float[Tensor, ""]:
        """Return the mean over pairs, zero for a single member."""
        features = [z.flatten(1).float() for z in step.outputs.features]
        values = [renyi_mutual_information(features[i], features[j], self.alpha) for i, j in pairs(len(features))]
        return torch.stack(values).mean() if values else step.logits.new_zeros(())


@dataclass(frozen=True, kw_only=True)
class _OutputTerm(Term):
    """Share the moving joint of the terms on outputs.

    Attributes:
        decay: Share of the stored joint that each step keeps; 0 uses the batch alone.
    """

    decay: float = 0.95

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.decay < 1:
            raise InputError(f"expected decay in [0, 1), got {self.decay}")

    def _moved(self, step: Step, batch: Tensor) -> Tensor:
        """Return the moving joint with the batch's gradient, and remember its value."""
        key = f"{type(self).__name__}.joint"
        everywhere = step.reduce(batch.detach()) + (batch - batch.detach())
        joint = moving(step.memory.get(key), everywhere, self.decay)
        step.memory[key] = joint.detach()
        return joint


@final
@dataclass(frozen=True, kw_only=True)
class OutputMI(_OutputTerm):
    r"""Average over pairs the MI of the soft joint of outputs: $I(p_i; p_j)$.

    Two accurate members must share information, so that this term fights accuracy; `ConditionalMI` does not.
    """

    def __call__(self, step: Step) -> Float[Tensor, ""]:
        """Return the mean over pairs, zero for a single member."""
        p = step.logits.mean(0).softmax(-1)
        if len(p) < 2:
            return p.new_zeros(())
        return mutual_information(self._moved(step, pairwise_joints(p))).mean()


@final
@dataclass(frozen=True, kw_only=True)
class ConditionalMI(_OutputTerm):
    r"""Average over pairs the MI of outputs given the class: $I(p_i; p_j \mid Y)$."""

    def __call__(self, step: Step) -> Float[Tensor, ""]:
        """Return the mean over pairs, zero for a single member."""
        p = step.logits.mean(0).softmax(-1)
        if len(p) < 2:
            return p.new_zeros(())
        return conditional_mutual_information(self._moved(step, pairwise_class_joints(p, step.labels))).mean()
