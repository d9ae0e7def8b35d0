"""EMPIR: low-precision members beside a full-precision one, trained apart, that vote.

Paper: Sen, Ravindran, Raghunathan, 2020. Two members have few bits by DoReFa's quantizers in every convolution, the
first one included, so that the image is quantized too; linear layers stay in float. The last member has full precision
and decides every tie. Precisions for CIFAR-10 are w4a2 and w2a2; for MNIST write `precisions = [[2, 4], [2, 4]]`, for
AlexNet on ImageNet `[[2, 2], [4, 4]]`.

Published (CIFARconv, CIFAR-10): 72.56 % clean, 13.55 % under PGD-40 at radius 0.1 by the authors; 1.41 % under PGD-100
on the mean probability at radius 0.031. MNISTconv: 98.89 % clean, 17.51 % under PGD-40 at 0.3.

Deviations: members are trained in one go on the same batches, each with its own cross-entropy in full; the setting's
network, optimizer and epochs in place of the authors'; with other than three members, one has full precision and the
others repeat the precisions in turn.
"""

from dataclasses import dataclass
from typing import ClassVar, final

from bitquorum.baselines.base import Baseline, Setting
from bitquorum.baselines.parts import FLOAT, apart, cycle
from bitquorum.config import Arm
from bitquorum.dorefa import Dorefa
from bitquorum.ensemble import EmpirVote
from bitquorum.objective import Objective


@final
@dataclass(frozen=True, kw_only=True)
class Empir(Baseline):
    """Train low-precision members and a full-precision one apart, and let them vote.

    Attributes:
        precisions: Bits of weights and activations of the low-precision members, in turn.
    """

    precisions: tuple[tuple[int, int], ...] = ((4, 2), (2, 2))
    paper: ClassVar[str] = "Sen, Ravindran, Raghunathan, 2020, https://arxiv.org/abs/2004.10162"

    def __call__(self, setting: Setting) -> Arm:
        """Return the arm."""
        low = [
            Dorefa(weight_bits=weights, activation_bits=activations, first=True)
            for weights, activations in cycle(self.precisions, setting.members - 1)
        ]
        objective = Objective(terms=(apart(setting.members),))
        return self._arm(setting, (*low, FLOAT), objective, aggregation=EmpirVote(full_precision=-1))
