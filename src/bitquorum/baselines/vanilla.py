"""One float network, trained on images as they are: what every defence is measured against.

That such a network falls to changes nobody sees is the finding of Szegedy et al., 2014. Its accuracy under attack is
expected to be near zero at any radius that matters; a ladder that leaves it more is a weak ladder.
"""

from dataclasses import dataclass
from typing import ClassVar, final

from bitquorum.baselines.base import Baseline, Setting
from bitquorum.baselines.parts import FLOAT, apart
from bitquorum.config import Arm
from bitquorum.objective import Objective


@final
@dataclass(frozen=True, kw_only=True)
class Vanilla(Baseline):
    """Train one float network by cross-entropy."""

    paper: ClassVar[str] = "Szegedy et al., 2014, https://arxiv.org/abs/1312.6199"

    def __call__(self, setting: Setting) -> Arm:
        """Return the arm."""
        return self._arm(setting, (FLOAT,), Objective(terms=(apart(1),)))
