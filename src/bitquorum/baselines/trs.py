"""TRS: members whose input gradients are short and stand across each other.

Paper: Yang et al., 2021. The sum of the members' cross-entropies, plus 40 times the mean absolute cosine between their
input gradients, plus 2.5 times twice the mean squared length of these gradients: the weights quoted for CIFAR-10.

The authors' code takes the gradients of the mean loss of 128 images, which are 128 times shorter than an image's own;
2.5 is therefore 2.5 / 128**2 here. Read as a weight on the gradients of single losses it keeps networks near chance:
29 % on the digits after 8 epochs, against 96 %.

Deviations: those of `objective.TRS`.
"""

from dataclasses import dataclass
from typing import ClassVar, final

from bitquorum import objective
from bitquorum.baselines.base import Baseline, Setting
from bitquorum.baselines.parts import FLOAT, apart
from bitquorum.config import Arm


@final
@dataclass(frozen=True, kw_only=True)
class TRS(Baseline):
    """Train float members by the transferability-reduced smooth loss.

    Attributes:
        similarity: Weight of the cosines.
        smoothness: Weight of the squared lengths of the gradients of single losses.
    """

    similarity: float = 40.0
    smoothness: float = 2.5 / 128**2
    paper: ClassVar[str] = "Yang, Li, Xu et al., 2021, https://arxiv.org/abs/2104.00671"

    def __call__(self, setting: Setting) -> Arm:
        """Return the arm."""
        term = objective.TRS(similarity=self.similarity, smoothness=self.smoothness)
        terms = (apart(setting.members), term)
        return self._arm(setting, (FLOAT,) * setting.members, objective.Objective(terms=terms))
