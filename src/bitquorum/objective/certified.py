"""Train for certificates: the likelihood of the labels at the worst logits that bounds allow."""

from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bitquorum import rng
from bitquorum.bounds import Scope, Validity, margins
from bitquorum.interface import InputError
from bitquorum.objective.term import Step, Term


@final
@dataclass(frozen=True, kw_only=True)
class IntervalBound(Term):
    r"""Average over members the cross-entropy of the worst logits over a ball: $\log \sum_j e^{-m_j}$, in nats.

    $m_j \le z_y - z_j$ are interval bounds, $m_y = 0$. Reference: Gowal et al., 2018, IBP,
    https://arxiv.org/abs/1810.12715, with their linear growth of the radius; their share kappa of the clean loss is the
    weight beside `MemberCrossEntropy`, and `warmup` is how 1 - kappa grows. Without it a network of new weights, whose
    bounds are loose at any radius, may lose all of them before it learns. For deterministic quantizers: Lechner et al.,
    2022, https://arxiv.org/abs/2211.16187.

    Quantizers take part with the noise of the step's draw, the same at both ends of an interval: the network of that
    draw is bounded exactly as it is certified by `fresh`, and gradients at the ends are those of the quantizers
    themselves, of their mean by default. Deviations: norm layers are as in evaluation, with running statistics, taken
    as constants, and dropout passes everything on; single precision, without allowance for rounding.

    Attributes:
        epsilon: Radius in the maximum norm at the end.
        ramp: Share of the training over which the radius grows from zero, linearly.
        validity: `fresh`; `all`, which bounds every draw at once; `nearest`, for a network that will not draw.
    """

    epsilon: float = 2 / 255
    ramp: float = 0.5
    validity: Validity = "fresh"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.epsilon <= 1 or not 0 <= self.ramp <= 1:
            raise InputError(f"expected epsilon in (0, 1] and ramp in [0, 1], got {self.epsilon} and {self.ramp}")
        Scope(validity=self.validity)

    def epsilon_at(self, progress: float) -> float:
        """Return the radius at a share of the training."""
        return self.epsilon * (min(1.0, progress / self.ramp) if self.ramp else 1.0)

    def __call__(self, step: Step) -> Float[Tensor, ""]:
        """Return the mean over members and examples; mixed images are bounded for both of their labels.

        Raises:
            InputError: if a member has a module without bounds.
        """
        scope = Scope(validity=self.validity, rounding=False)
        images, epsilon = step.images.detach(), self.epsilon_at(step.progress)

        def worst(labels: Int[Tensor, "batch"]) -> Float[Tensor, "member batch"]:
            with rng.draw(step.seed, step.examples), torch.autocast(images.device.type, enabled=False):
                bounds = [
                    margins(member, images, labels, epsilon=epsilon, bound="ibp", scope=scope)
                    for member in step.ensemble.members
                ]
            return (-torch.stack(bounds)).logsumexp(-1)

        return step.over_labels(worst).mean()
