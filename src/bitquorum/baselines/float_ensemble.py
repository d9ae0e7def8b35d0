"""Float members trained apart, their probabilities averaged: the ensemble without any other idea.

Paper: Lakshminarayanan, Pritzel, Blundell, 2017, deep ensembles. Members differ by their initial weights; all see the
same batches in the same order, under one optimizer whose steps for one member do not depend on the others.

Deviations: members share the order of the data (the paper shuffles for each), and there are no adversarial examples,
which the paper proposes as an option for calibration.
"""

from dataclasses import dataclass
from typing import ClassVar, final

from bitquorum.baselines.base import Baseline, Setting
from bitquorum.baselines.parts import FLOAT, apart
from bitquorum.config import Arm
from bitquorum.objective import Objective


@final
@dataclass(frozen=True, kw_only=True)
class FloatEnsemble(Baseline):
    """Train float members apart and average their probabilities."""

    paper: ClassVar[str] = "Lakshminarayanan, Pritzel, Blundell, 2017, https://arxiv.org/abs/1612.01474"

    def __call__(self, setting: Setting) -> Arm:
        """Return the arm."""
        return self._arm(setting, (FLOAT,) * setting.members, Objective(terms=(apart(setting.members),)))
