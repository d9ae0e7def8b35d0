"""White-box and gradient-free attacks on random ensembles. Each is a method that sees a callable, never a quantizer."""

from bitquorum.attacks.apgd import APGD, APGDTargeted
from bitquorum.attacks.base import Attack, AttackResult, Criterion, Kind, Loss, Pooling, Problem, pooled_loss
from bitquorum.attacks.blackbox import NES, SPSA, RandomNoise, Square
from bitquorum.attacks.empir import EmpirAttack
from bitquorum.attacks.ensembles import ARC, MORA
from bitquorum.attacks.fab import FAB
from bitquorum.attacks.gradient import FGSM, PGD
from bitquorum.attacks.transfer import DIVA, Transfer, TwinModel

__all__ = [
    "APGD",
    "ARC",
    "DIVA",
    "FAB",
    "FGSM",
    "MORA",
    "NES",
    "PGD",
    "SPSA",
    "APGDTargeted",
    "Attack",
    "AttackResult",
    "Criterion",
    "EmpirAttack",
    "Kind",
    "Loss",
    "Pooling",
    "Problem",
    "RandomNoise",
    "Square",
    "Transfer",
    "TwinModel",
    "pooled_loss",
]
