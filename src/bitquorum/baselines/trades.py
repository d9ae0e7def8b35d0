"""TRADES: trade accuracy for a flat output around every image; a reference row, trained on adversarial images.

Paper: Zhang et al., 2019, equation 5. Cross-entropy on the image plus beta = 6 times the divergence between the output
there and at the worst neighbour, which 10 steps of PGD on that divergence find.

Deviations: steps have a quarter of the radius (the authors' 0.007 at 0.031 are 0.23 of it); the start is uniform in
the ball, where the authors start from a normal cloud of 0.001.
"""

from dataclasses import dataclass
from typing import ClassVar, final

from bitquorum import objective
from bitquorum.attacks import PGD
from bitquorum.baselines.base import RadiusBaseline, Setting
from bitquorum.baselines.parts import FLOAT, apart
from bitquorum.config import Arm
from bitquorum.interface import InputError


@final
@dataclass(frozen=True, kw_only=True)
class Trades(RadiusBaseline):
    """Train one float network by TRADES.

    Attributes:
        beta: Weight of the divergence, the paper's 1 / lambda.
        steps: Number of steps of PGD.
    """

    beta: float = 6.0
    steps: int = 10
    paper: ClassVar[str] = "Zhang et al., 2019, https://arxiv.org/abs/1901.08573"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.beta <= 0 or self.steps < 1:
            raise InputError(f"expected a positive beta and at least one step, got {self.beta} and {self.steps}")

    def __call__(self, setting: Setting) -> Arm:
        """Return the arm."""
        attack = PGD(steps=self.steps, step_size=0.25)
        term = objective.Trades(weight=self.beta, attack=attack, epsilon=self._radius(setting))
        return self._arm(setting, (FLOAT,), objective.Objective(terms=(apart(1), term)))
