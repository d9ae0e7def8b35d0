"""White-box attacks on random ensembles. Each one is a method that sees a callable, never a quantizer."""

from bitquorum.attacks.apgd import APGD, APGDTargeted
from bitquorum.attacks.base import Attack, AttackResult, Criterion, Loss, Pooling, Problem, pooled_loss
from bitquorum.attacks.gradient import FGSM, PGD

__all__ = [
    "APGD",
    "FGSM",
    "PGD",
    "APGDTargeted",
    "Attack",
    "AttackResult",
    "Criterion",
    "Loss",
    "Pooling",
    "Problem",
    "pooled_loss",
]
