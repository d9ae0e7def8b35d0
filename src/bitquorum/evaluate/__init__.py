"""Measure robust accuracy: over fresh draws, with intervals, by a grid of attacks or by the ladder."""

from bitquorum.evaluate.accuracy import Accuracy, interval, worst_of
from bitquorum.evaluate.evaluation import CLEAN, WORST, Cell, Evaluation, judge, worst

__all__ = ["CLEAN", "WORST", "Accuracy", "Cell", "Evaluation", "interval", "judge", "worst", "worst_of"]
