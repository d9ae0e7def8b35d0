"""SAP: stochastic activation pruning, a defence that is put on a trained network.

Paper: Dhillon et al., 2018, algorithm 1. At test each layer keeps units at random, the large ones more often, and
scales them up so that the mean stays; training is that of the float network.

Published (CIFAR-10, radius 0.031): 0 % under an attack that averages gradients over draws (Athalye et al., 2018,
https://arxiv.org/abs/1802.00420).

Deviations: those of `randomized.ActivationPruning`.
"""

from dataclasses import dataclass
from typing import ClassVar, final

from bitquorum import randomized
from bitquorum.baselines.base import Baseline, Setting
from bitquorum.baselines.parts import apart
from bitquorum.config import Arm
from bitquorum.objective import Objective


@final
@dataclass(frozen=True, kw_only=True)
class ActivationPruning(Baseline):
    """Train one float network, and prune its activations at random at test.

    Attributes:
        share: Draws with replacement, as a share of the units of a layer.
    """

    share: float = 1.0
    paper: ClassVar[str] = "Dhillon et al., 2018, https://arxiv.org/abs/1803.01442"

    def __call__(self, setting: Setting) -> Arm:
        """Return the arm."""
        member = randomized.ActivationPruning(share=self.share)
        return self._arm(setting, (member,), Objective(terms=(apart(1),)))
