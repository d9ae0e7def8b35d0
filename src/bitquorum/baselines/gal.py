"""GAL: members whose input gradients point apart, so that what fools one does not fool the next.

Paper: Kariyappa, Qureshi, 2019. Mean cross-entropy of the members plus 0.5 times the log-sum-exp of the cosines
between the members' input gradients.

Deviations: those of `objective.GAL`; the paper's leaky ReLU is not kept, the setting's network is. The whole loss is
taken times the number of members: it leaves Adam, the paper's optimizer, as it was, and gives each member under SGD the
learning rate of the other rows.
"""

from dataclasses import dataclass
from typing import ClassVar, final

from bitquorum import objective
from bitquorum.baselines.base import Baseline, Setting
from bitquorum.baselines.parts import FLOAT, apart
from bitquorum.config import Arm


@final
@dataclass(frozen=True, kw_only=True)
class GAL(Baseline):
    """Train float members by the gradient alignment loss.

    Attributes:
        weight: Of the log-sum-exp of cosines, beside the mean cross-entropy.
    """

    weight: float = 0.5
    paper: ClassVar[str] = "Kariyappa, Qureshi, 2019, https://arxiv.org/abs/1901.09981"

    def __call__(self, setting: Setting) -> Arm:
        """Return the arm."""
        count = setting.members
        terms = (apart(count), objective.GAL(weight=count * self.weight))
        return self._arm(setting, (FLOAT,) * count, objective.Objective(terms=terms))
