"""Mutual information without stochastic quantization: what the objective alone is worth.

Paper: Farkya, Raghavan, Ziskind, 2023. The MI terms are our reconstruction, those of `SqMi`; the members are those of
`LowBitEnsemble`, rounded to nearest. A control of `SqMi`: equal but for the missing noise.
"""

from dataclasses import dataclass
from typing import ClassVar, final

from bitquorum.baselines.base import Baseline, Setting
from bitquorum.baselines.parts import FARKYA, PRECISIONS, cycle, lsq, mi_objective
from bitquorum.config import Arm


@final
@dataclass(frozen=True, kw_only=True)
class Mi(Baseline):
    """Train deterministic low-bit members under the MI objective.

    Attributes:
        precisions: Bits of weights and activations, repeated in turn where there are more members.
        beta: Weight of the MI between features; a negative one turns the sign.
        gamma: Weight of the MI between outputs given the class.
    """

    precisions: tuple[tuple[int, int], ...] = PRECISIONS
    beta: float = 0.1
    gamma: float = 0.1
    paper: ClassVar[str] = FARKYA

    def __call__(self, setting: Setting) -> Arm:
        """Return the arm."""
        members = tuple(lsq(*bits) for bits in cycle(self.precisions, setting.members))
        return self._arm(setting, members, mi_objective(self.beta, self.gamma))
