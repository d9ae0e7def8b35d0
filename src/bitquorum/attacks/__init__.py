"""White-box attacks on random ensembles. Each one is a method that sees a callable, never a quantizer."""

from bitquorum.attacks.apgd import APGD
from bitquorum.attacks.base import Attack, AttackResult, Criterion, Loss, Pooling, pooled_loss
from bitquorum.attacks.gradient import FGSM, PGD

__all__ = ["APGD", "FGSM", "PGD", "Attack", "AttackResult", "Criterion", "Loss", "Pooling", "pooled_loss"]
