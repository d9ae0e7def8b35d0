"""A penalty on the input gradient, and nothing else: what holds without noise, low precision or an adversarial image.

Paper: Rodríguez-Muñoz, Wang, Torralba, 2024. Loss: cross-entropy plus epsilon times the L1 norm of its gradient with
respect to the image, the first-order rise of the loss under an L-inf attack of radius epsilon. It needs smooth
activations, for a ReLU network has no curvature to shape: where the setting's network has `relu`, GELU takes its place.

Published (ImageNet, radius 4/255, AutoAttack): 51.6 % against 56.1 % for adversarial training.

Deviations: the weight grows over the first half of the training; images are small and networks too.
"""

from dataclasses import dataclass
from typing import ClassVar, final

from bitquorum import objective
from bitquorum.baselines.base import RadiusBaseline, Setting
from bitquorum.baselines.parts import FLOAT, activated, apart
from bitquorum.config import Arm


@final
@dataclass(frozen=True, kw_only=True)
class InputGradient(RadiusBaseline):
    """Train one smooth float network with an input-gradient penalty.

    Attributes:
        epsilon: Weight of the penalty, a radius in the maximum norm; `None` takes the setting's.
        activation: What replaces ReLU; `relu` leaves it.
    """

    activation: str = "gelu"
    paper: ClassVar[str] = "Rodríguez-Muñoz, Wang, Torralba, 2024, https://arxiv.org/abs/2409.20139"

    def __call__(self, setting: Setting) -> Arm:
        """Return the arm."""
        if getattr(setting.network, "activation", "") == "relu":
            setting = activated(setting, self.activation)
        terms = (apart(1), objective.InputGradient(weight=self._radius(setting)))
        return self._arm(setting, (FLOAT,), objective.Objective(terms=terms))
