"""Fast adversarial training: one step from a random start; a reference row at a quarter of the price of PGD-AT.

Paper: Wong, Rice, Kolter, 2020, algorithm 3. The start is uniform in the ball, the step has 1.25 times the radius and
is projected, the loss is the cross-entropy on these images alone.

Published (PreActResNet-18, CIFAR-10, 8/255): 83.3 % clean, 43.2 % under AutoAttack.

Deviations: no stop at catastrophic overfitting, when accuracy under PGD collapses within an epoch; look at the ladder.
"""

from dataclasses import dataclass
from typing import ClassVar, final

from bitquorum.attacks import PGD
from bitquorum.baselines.base import RadiusBaseline, Setting
from bitquorum.baselines.parts import FLOAT
from bitquorum.config import Arm
from bitquorum.interface import InputError
from bitquorum.objective import Adversarial, Objective


@final
@dataclass(frozen=True, kw_only=True)
class FgsmRs(RadiusBaseline):
    """Train one float network on the images of one step from a random start.

    Attributes:
        step_size: Length of the step as a share of the radius.
    """

    step_size: float = 1.25
    paper: ClassVar[str] = "Wong, Rice, Kolter, 2020, https://arxiv.org/abs/2001.03994"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.step_size <= 0:
            raise InputError(f"expected a positive step_size, got {self.step_size}")

    def __call__(self, setting: Setting) -> Arm:
        """Return the arm."""
        term = Adversarial(attack=PGD(steps=1, step_size=self.step_size), epsilon=self._radius(setting))
        return self._arm(setting, (FLOAT,), Objective(terms=(term,)))
