"""Stochastic quantization without mutual information: what the noise alone is worth.

Paper: Farkya, Raghavan, Ziskind, 2023. The noise law, bits and training are our reconstruction: logistic noise of a
quarter step before rounding, drawn afresh in training and at test, gradients through the closed-form mean.
A control of `SqMi`: equal but for the missing MI terms.
"""

from dataclasses import dataclass
from typing import ClassVar, final

from bitquorum.baselines.base import Baseline, Setting
from bitquorum.baselines.parts import FARKYA, PRECISIONS, cycle, sq
from bitquorum.config import Arm
from bitquorum.objective import Objective


@final
@dataclass(frozen=True, kw_only=True)
class Sq(Baseline):
    """Train stochastically quantized members together, without MI.

    Attributes:
        precisions: Bits of weights and activations, repeated in turn where there are more members.
    """

    precisions: tuple[tuple[int, int], ...] = PRECISIONS
    paper: ClassVar[str] = FARKYA

    def __call__(self, setting: Setting) -> Arm:
        """Return the arm."""
        members = tuple(sq(*bits) for bits in cycle(self.precisions, setting.members))
        return self._arm(setting, members, Objective())
