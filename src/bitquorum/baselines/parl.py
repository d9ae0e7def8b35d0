"""PARL: members whose layers respond to different directions in the image.

Paper: Alam et al., 2021, the first version of arXiv 2112.04948, by its abstract. Mean cross-entropy of the members plus
0.25 times the cosines between the input gradients of the summed outputs of their first five layers, summed over pairs
and averaged over layers. Sums, layers and weight are those of the authors' code, which is of the second version
(Shukla et al., 2025): there gradients are in the weights, and a correlation of outputs multiplies the cosines.

Deviations: those of `objective.PARL`. The whole loss is taken times the number of members: it leaves Adam, the authors'
optimizer, as it was, and gives each member under SGD the learning rate of the other rows.
"""

from dataclasses import dataclass
from typing import ClassVar, final

from bitquorum import objective
from bitquorum.baselines.base import Baseline, Setting
from bitquorum.baselines.parts import FLOAT, apart
from bitquorum.config import Arm


@final
@dataclass(frozen=True, kw_only=True)
class PARL(Baseline):
    """Train float members by the pairwise adversarially robust loss.

    Attributes:
        weight: Of the cosines, beside the mean cross-entropy.
        layers: Largest number of layers that are compared, from the image on.
    """

    weight: float = 0.25
    layers: int = 5
    paper: ClassVar[str] = "Alam, Datta, Mukhopadhyay et al., 2021, https://arxiv.org/abs/2112.04948v1"

    def __call__(self, setting: Setting) -> Arm:
        """Return the arm."""
        count = setting.members
        terms = (apart(count), objective.PARL(weight=count * self.weight, layers=self.layers))
        return self._arm(setting, (FLOAT,) * count, objective.Objective(terms=terms))
