"""PNI: parametric noise injection, Gaussian noise of learned strength on the weights of every layer.

Paper: He, Rakin, Fan, 2019, equations 1-4. With `adversarial_training` it is the paper's recipe: half the cross-entropy
on the image, half that on an adversarial one, by PGD with 7 steps of 0.01 at radius 0.031, a share of 0.32.
Without it nothing rewards noise and its strength falls; the row tells what noise is worth alone.

Published (ResNet-20, CIFAR-10, PGD-7 at 8/255): without adversarial training 92.11 % clean and 0.00 %; with it 84.89 %
and 45.94 % against 39.14 % for adversarial training alone, without expectation over draws in the attack.

Deviations: the training's attack aims at the true label, the authors' at the predicted one, and starts at once, theirs
after 5 of 160 epochs; those of `randomized.WeightNoise`.
"""

from dataclasses import dataclass
from typing import ClassVar, final

from bitquorum import randomized
from bitquorum.attacks import PGD
from bitquorum.baselines.base import RadiusBaseline, Setting
from bitquorum.baselines.parts import apart
from bitquorum.config import Arm
from bitquorum.objective import Adversarial, MemberCrossEntropy, Objective


@final
@dataclass(frozen=True, kw_only=True)
class ParametricNoise(RadiusBaseline):
    """Train one network with noise of learned strength on its weights.

    Attributes:
        initial: Strength of the noise at the start, in standard deviations of a layer's weights.
        adversarial_training: Whether to train on clean images and those of PGD-7 in equal parts, as the paper does.
    """

    initial: float = 0.25
    adversarial_training: bool = False
    paper: ClassVar[str] = "He, Rakin, Fan, 2019, https://arxiv.org/abs/1811.09310"

    def __call__(self, setting: Setting) -> Arm:
        """Return the arm."""
        objective = Objective(terms=(apart(1),))
        if self.adversarial_training:
            attack = PGD(steps=7, step_size=0.32)
            adversarial = Adversarial(weight=0.5, attack=attack, epsilon=self._radius(setting))
            objective = Objective(terms=(MemberCrossEntropy(weight=0.5), adversarial))
        return self._arm(setting, (randomized.WeightNoise(initial=self.initial),), objective)
