"""The training loss: a sum of named terms, each logged apart."""

from bitquorum.objective.certified import IntervalBound
from bitquorum.objective.distill import DVERGE
from bitquorum.objective.diversity import ConditionalMI, FeatureMI, OutputMI
from bitquorum.objective.layerwise import PARL
from bitquorum.objective.likelihood import Distillation, EnsembleCrossEntropy, MemberCrossEntropy
from bitquorum.objective.peers import ADP, GAL, TRS, Orthogonality
from bitquorum.objective.robustness import Adversarial, InputGradient, LinearizedLoss, Trades
from bitquorum.objective.sum import Objective
from bitquorum.objective.term import Reduce, Step, Term

__all__ = [
    "ADP",
    "DVERGE",
    "GAL",
    "PARL",
    "TRS",
    "Adversarial",
    "ConditionalMI",
    "Distillation",
    "EnsembleCrossEntropy",
    "FeatureMI",
    "InputGradient",
    "IntervalBound",
    "LinearizedLoss",
    "MemberCrossEntropy",
    "Objective",
    "Orthogonality",
    "OutputMI",
    "Reduce",
    "Step",
    "Term",
    "Trades",
]
