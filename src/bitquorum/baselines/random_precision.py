"""Double-Win Quant: one set of weights, run at a precision that is drawn for every pass.

Paper: Fu et al., 2021. Each training step and each prediction draws one precision for all layers; every precision has
norm layers of its own. With `adversarial_training` it is the paper's recipe: adversarial images alone, by PGD with 7
steps of a quarter of the radius. Without it the row tells what random precision is worth alone.

Published (PreActResNet-18, CIFAR-10, adversarial training): 82.16 % clean, 65.15 % under PGD-20 at 8/255, an attack on
one precision that is tested on another, without expectation over precisions.

Deviations: precisions of 4 to 8 bits, the authors have 4 to 16; each step of the training's attack draws a precision
of its own, the authors' attack and update share one; those of `randomized.RandomPrecision`.
"""

from dataclasses import dataclass
from typing import ClassVar, final

from bitquorum import randomized
from bitquorum.attacks import PGD
from bitquorum.baselines.base import RadiusBaseline, Setting
from bitquorum.baselines.parts import apart
from bitquorum.config import Arm
from bitquorum.objective import Adversarial, Objective


@final
@dataclass(frozen=True, kw_only=True)
class RandomPrecision(RadiusBaseline):
    """Train and run one network at random precision.

    Attributes:
        bits: Precisions, of weights and activations alike.
        adversarial_training: Whether to train on the images of PGD-7, as the paper does.
    """

    bits: tuple[int, ...] = (4, 5, 6, 7, 8)
    adversarial_training: bool = False
    paper: ClassVar[str] = "Fu et al., 2021, https://proceedings.mlr.press/v139/fu21c.html"

    def __call__(self, setting: Setting) -> Arm:
        """Return the arm."""
        attack = PGD(steps=7, step_size=0.25)
        adversarial = Adversarial(attack=attack, epsilon=self._radius(setting))
        term = adversarial if self.adversarial_training else apart(1)
        return self._arm(setting, (randomized.RandomPrecision(bits=self.bits),), Objective(terms=(term,)))
