"""The training loss: a sum of named terms, each logged apart."""

from bitquorum.objective.diversity import ConditionalMI, FeatureMI, OutputMI
from bitquorum.objective.likelihood import EnsembleCrossEntropy, MemberCrossEntropy
from bitquorum.objective.robustness import Adversarial, InputGradient, Trades
from bitquorum.objective.sum import Objective
from bitquorum.objective.term import Reduce, Step, Term

__all__ = [
    "Adversarial",
    "ConditionalMI",
    "EnsembleCrossEntropy",
    "FeatureMI",
    "InputGradient",
    "MemberCrossEntropy",
    "Objective",
    "OutputMI",
    "Reduce",
    "Step",
    "Term",
    "Trades",
]
