"""Gaussian noise of equal variance in place of stochastic quantization: is it the grid, or just the noise?

Paper: Farkya, Raghavan, Ziskind, 2023; the control is ours. Each member is the float counterpart of a member of `SqMi`:
what the stochastic quantizer adds to weights and activations in variance is added as normal noise, without a grid. The
objective is that of `SqMi`. If this row stands as well as `SqMi`, low precision has nothing to do with it.
"""

from dataclasses import dataclass
from typing import ClassVar, final

from bitquorum import randomized
from bitquorum.baselines.base import Baseline, Setting
from bitquorum.baselines.parts import FARKYA, PRECISIONS, cycle, mi_objective
from bitquorum.config import Arm


@final
@dataclass(frozen=True, kw_only=True)
class GaussianControl(Baseline):
    """Train members with Gaussian noise of the variance that stochastic quantization has, under the MI objective.

    Attributes:
        precisions: Bits whose noise is imitated, of weights and activations.
        beta: Weight of the MI between features.
        gamma: Weight of the MI between outputs given the class.
    """

    precisions: tuple[tuple[int, int], ...] = PRECISIONS
    beta: float = 0.1
    gamma: float = 0.1
    paper: ClassVar[str] = FARKYA

    def __call__(self, setting: Setting) -> Arm:
        """Return the arm."""
        members = tuple(
            randomized.GaussianControl(weight_bits=weights, activation_bits=activations)
            for weights, activations in cycle(self.precisions, setting.members)
        )
        return self._arm(setting, members, mi_objective(self.beta, self.gamma))
