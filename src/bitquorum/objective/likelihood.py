"""Fit the labels: cross-entropy of the members and of the ensemble, and what the other members say."""

import math
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from bitquorum.interface import InputError
from bitquorum.objective.term import Step, Term


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
        return step.cross_entropy(step.logits, self.smoothing).mean()


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
        logp = step.logits.log_softmax(-1).logsumexp(1, keepdim=True) - math.log(step.logits.shape[1])
        return step.cross_entropy(logp).mean()  # the logarithms of probabilities are logits of them


@final
@dataclass(frozen=True, kw_only=True)
class Distillation(Term):
    r"""Teach each member what the others say: $\frac{\tau^2}{M} \sum_m KL(\bar p_{-m} \| p_m)$, in nats.

    Here $p_m$ is the member's probability at temperature $\tau$, and $\bar p_{-m}$ the mean of the others', through
    which no gradient flows. The factor keeps gradients of equal size at every temperature (Hinton et al., 2015). It
    pulls members together, against the terms of mutual information.

    Reference: Zhang et al., 2018, Deep mutual learning, https://arxiv.org/abs/1706.00384, section 2.4, with the mean of
    the others as the teacher.

    Attributes:
        temperature: $\tau$, above zero.
    """

    temperature: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.temperature < math.inf:
            raise InputError(f"expected a temperature above 0, got {self.temperature}")

    @property
    def capturable(self) -> bool:
        """Always."""
        return True

    def __call__(self, step: Step) -> Float[Tensor, ""]:
        """Return the mean over members and examples; zero for a single member."""
        logp = (step.logits / self.temperature).log_softmax(-1)
        members = logp.shape[1]
        if members < 2:
            return step.images.new_zeros(())
        said = logp.detach().exp()
        others = (said.sum(1, keepdim=True) - said) / (members - 1)
        teacher = others.clamp(min=torch.finfo(others.dtype).tiny)
        return self.temperature**2 * (teacher * (teacher.log() - logp)).sum(-1).mean()
