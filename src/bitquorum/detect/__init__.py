"""Detect attacked inputs by what the members of an ensemble say, and attack what detects them.

| file | holds |
|---|---|
| `reference` | how the members' votes go together on clean images |
| `statistics` | scores of one input: `PredictionMI` (D1), `PointwiseMI` (D2) and the usual ones |
| `window` | a score of a window of inputs: `WindowMI` (D3) |
| `calibration` | thresholds at a rate of false positives, conformal p-values, `Detector` |
| `roc` | ROC curve, its area and shares, with intervals |
| `guard` | `Guard`: an ensemble with a detector in front |
| `aware` | `Evasive`: the attack that knows the detector |
| `detection` | `Detection` and `detect`: all of it measured, as rows of tables, which `rows` makes |
"""

from bitquorum.detect.aware import Evasive
from bitquorum.detect.calibration import Detector, held_out_scores, p_values, threshold_at
from bitquorum.detect.detection import Detection, Observed, detect
from bitquorum.detect.guard import Guard, Guarded
from bitquorum.detect.reference import CleanReference
from bitquorum.detect.roc import Curve, Interval, auroc, roc_curve, share
from bitquorum.detect.statistics import (
    Disagreement,
    Energy,
    Entropy,
    InputStatistic,
    MaxSoftmax,
    PointwiseMI,
    PredictionMI,
    Statistic,
)
from bitquorum.detect.window import WindowMI

__all__ = [
    "CleanReference",
    "Curve",
    "Detection",
    "Detector",
    "Disagreement",
    "Energy",
    "Entropy",
    "Evasive",
    "Guard",
    "Guarded",
    "InputStatistic",
    "Interval",
    "MaxSoftmax",
    "Observed",
    "PointwiseMI",
    "PredictionMI",
    "Statistic",
    "WindowMI",
    "auroc",
    "detect",
    "held_out_scores",
    "p_values",
    "roc_curve",
    "share",
    "threshold_at",
]
