"""Adversarial training: a reference row, for it sees in training what it will meet.

Paper: Madry et al., 2018, equation 2.1. The loss is the cross-entropy on adversarial images alone, from a random start
and 7 steps of a quarter of the radius, which are the paper's 2/255 at 8/255 on CIFAR-10.

Published (wide residual networks, CIFAR-10, 8/255): 87.1 % clean, 44.0 % under AutoAttack; with 10 steps and early
stopping (Rice et al., 2020) 85.3 % and 53.4 %.

Deviations: the attack meets the network in evaluation mode.
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
class PgdAt(RadiusBaseline):
    """Train one float network on the images of PGD.

    Attributes:
        steps: Number of steps.
        step_size: Length of a step as a share of the radius.
    """

    steps: int = 7
    step_size: float = 0.25
    paper: ClassVar[str] = "Madry et al., 2018, https://arxiv.org/abs/1706.06083"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 1 or self.step_size <= 0:
            raise InputError(
                f"expected at least one step and a positive step_size, got {self.steps} and {self.step_size}"
            )

    def __call__(self, setting: Setting) -> Arm:
        """Return the arm."""
        attack = PGD(steps=self.steps, step_size=self.step_size)
        term = Adversarial(attack=attack, epsilon=self._radius(setting))
        return self._arm(setting, (FLOAT,), Objective(terms=(term,)))
