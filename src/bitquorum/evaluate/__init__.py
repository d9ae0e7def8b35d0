"""Measure robust accuracy: over fresh draws, with intervals, by a grid of attacks or by the ladder."""

from bitquorum.evaluate.accuracy import Accuracy, interval, worst_of
from bitquorum.evaluate.anymodel import Report, evaluate_model
from bitquorum.evaluate.evaluation import CLEAN, WORST, Cell, Evaluation, judge, worst
from bitquorum.evaluate.ladder import Arena, Climb, Examples, Ladder, Step
from bitquorum.evaluate.observe import observe
from bitquorum.evaluate.presets import LADDERS, ladder_named
from bitquorum.evaluate.selfchecks import Verdict, run_checks
from bitquorum.evaluate.sequential import SequentialTest, Tally

__all__ = [
    "CLEAN",
    "LADDERS",
    "WORST",
    "Accuracy",
    "Arena",
    "Cell",
    "Climb",
    "Evaluation",
    "Examples",
    "Ladder",
    "Report",
    "SequentialTest",
    "Step",
    "Tally",
    "Verdict",
    "evaluate_model",
    "interval",
    "judge",
    "ladder_named",
    "observe",
    "run_checks",
    "worst",
    "worst_of",
]
