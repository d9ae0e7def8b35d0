"""Defensive quantization: low bits, and layers that do not stretch what reaches them.

Paper: Lin, Gan, Han, 2019, equation 8. Rounding amplifies a perturbation that a layer has stretched already; a penalty
on every layer's distance from orthogonality keeps the network from stretching.

Deviations: weights are quantized like activations, by LSQ, while the paper quantizes activations behind ReLU6 to 1 to 5
bits; the penalty's weight is our choice; those of `objective.Orthogonality`.
"""

from dataclasses import dataclass
from typing import ClassVar, final

from bitquorum.baselines.base import Baseline, Setting
from bitquorum.baselines.parts import apart, lsq
from bitquorum.config import Arm
from bitquorum.objective import Objective, Orthogonality


@final
@dataclass(frozen=True, kw_only=True)
class DefensiveQuantization(Baseline):
    """Train one low-bit network with nearly orthogonal layers.

    Attributes:
        bits: Of weights and activations.
        beta: Weight of the orthogonality penalty.
    """

    bits: int = 4
    beta: float = 1e-3
    paper: ClassVar[str] = "Lin, Gan, Han, 2019, https://arxiv.org/abs/1904.08444"

    def __call__(self, setting: Setting) -> Arm:
        """Return the arm."""
        terms = (apart(1), Orthogonality(weight=self.beta))
        return self._arm(setting, (lsq(self.bits, self.bits),), Objective(terms=terms))
