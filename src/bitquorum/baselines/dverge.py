"""DVERGE: members that learn from what the features of the others cannot tell apart.

Paper: Yang et al., 2020, equations 1-3. A member fits the label of an image that was changed within radius 0.07, in 10
steps of 0.007, until a layer of another member takes it for another image.

Deviations: those of `objective.DVERGE`; and the paper first trains on clean images, then on the changed ones alone.
There is one training here: every member's clean cross-entropy stays, and the distilled one grows over its first half.

Adversarial images of a surrogate loss, that of the features, enter the training, so that the row counts as adversarial.
"""

from dataclasses import dataclass
from typing import ClassVar, final

from bitquorum import objective
from bitquorum.baselines.base import Baseline, Setting
from bitquorum.baselines.parts import FLOAT, apart
from bitquorum.config import Arm


@final
@dataclass(frozen=True, kw_only=True)
class DVERGE(Baseline):
    """Train float members on images distilled from each other's features.

    Attributes:
        epsilon: Radius of the distillation in the maximum norm; the setting's has no part in it.
        step_size: Length of a step, in units of the image.
        steps: Number of steps.
        warmup: Share of the training over which the weight grows from 0.
    """

    epsilon: float = 0.07
    step_size: float = 0.007
    steps: int = 10
    warmup: float = 0.5
    paper: ClassVar[str] = "Yang, Zhang, Dong et al., 2020, https://arxiv.org/abs/2009.14720"

    def __call__(self, setting: Setting) -> Arm:
        """Return the arm."""
        term = objective.DVERGE(epsilon=self.epsilon, step_size=self.step_size, steps=self.steps, warmup=self.warmup)
        terms = (apart(setting.members), term)
        return self._arm(setting, (FLOAT,) * setting.members, objective.Objective(terms=terms))
