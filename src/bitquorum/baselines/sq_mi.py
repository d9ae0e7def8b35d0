"""Stochastically quantized members under the MI objective: our reconstruction of the paper this library follows.

Paper: Farkya, Raghavan, Ziskind, 2023, of which the abstract and the opening of the patent application are public to
us. Known from there: members of different bit widths, a differentiable stochastic quantizer, a training objective
with the MI between members. Our reconstruction: the noise law, the bits w4a4, w3a3 and w4a2, separate weights, Rényi MI
of features, MI of outputs given the class, both with weight 0.1 that grows over the first third of the training.

Extension: with `gradient` above 0 the input-gradient penalty of Rodríguez-Muñoz et al., 2024, joins, for which the
quantizer's closed-form mean supplies second derivatives. It is no part of the paper; name such a row apart, for
instance `sq-mi-gradient`.
"""

from dataclasses import dataclass
from typing import ClassVar, final

from bitquorum.baselines.base import Baseline, Setting
from bitquorum.baselines.parts import FARKYA, PRECISIONS, cycle, mi_objective, sq
from bitquorum.config import Arm
from bitquorum.interface import InputError


@final
@dataclass(frozen=True, kw_only=True)
class SqMi(Baseline):
    """Train stochastically quantized members under the MI objective, on request with an input-gradient penalty.

    Attributes:
        precisions: Bits of weights and activations, repeated in turn where there are more members.
        beta: Weight of the MI between features; a negative one turns the sign.
        gamma: Weight of the MI between outputs given the class.
        gradient: Radius of the input-gradient penalty, in units of the setting's epsilon; 0 leaves it out. At 1 each
            likelihood term is raised by the first-order effect of an attack of that radius.
    """

    precisions: tuple[tuple[int, int], ...] = PRECISIONS
    beta: float = 0.1
    gamma: float = 0.1
    gradient: float = 0.0
    paper: ClassVar[str] = FARKYA

    def __post_init__(self) -> None:
        if self.gradient < 0:
            raise InputError(f"expected a gradient penalty of at least 0, got {self.gradient}")

    def __call__(self, setting: Setting) -> Arm:
        """Return the arm."""
        members = tuple(sq(*bits) for bits in cycle(self.precisions, setting.members))
        return self._arm(setting, members, mi_objective(self.beta, self.gamma, radius=self.gradient * setting.epsilon))
