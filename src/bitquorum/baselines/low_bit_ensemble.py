"""Deterministic members of several bit widths, without noise and without MI: the control of all that is ours.

Paper: Bernhard, Moellic, Dutertre, 2019, who find that attacks transfer poorly between networks of different bit
widths. Members round to nearest on learned ranges (LSQ) and are trained together, by their own cross-entropies and that
of their mean probability.

Deviations: bits, quantizer and loss are not the paper's but those of `Sq`, `Mi` and `SqMi`, of which this is the corner
without either.
"""

from dataclasses import dataclass
from typing import ClassVar, final

from bitquorum.baselines.base import Baseline, Setting
from bitquorum.baselines.parts import PRECISIONS, cycle, lsq
from bitquorum.config import Arm
from bitquorum.objective import Objective


@final
@dataclass(frozen=True, kw_only=True)
class LowBitEnsemble(Baseline):
    """Train deterministic low-bit members together.

    Attributes:
        precisions: Bits of weights and activations, repeated in turn where there are more members.
    """

    precisions: tuple[tuple[int, int], ...] = PRECISIONS
    paper: ClassVar[str] = "Bernhard, Moellic, Dutertre, 2019, https://arxiv.org/abs/1909.12741"

    def __call__(self, setting: Setting) -> Arm:
        """Return the arm."""
        members = tuple(lsq(*bits) for bits in cycle(self.precisions, setting.members))
        return self._arm(setting, members, Objective())
