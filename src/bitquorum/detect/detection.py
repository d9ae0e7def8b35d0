"""Measure how well statistics tell attacked inputs from clean ones, and what rejection is worth."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bitquorum import rng
from bitquorum.detect.aware import Evasive
from bitquorum.detect.calibration import has_pairs, held_out_scores, threshold_at
from bitquorum.detect.reference import CleanReference
from bitquorum.detect.rows import (
    LEAST_POSITIVES,
    Row,
    Seen,
    clean_row,
    curve_row,
    detection_row,
    rejection_rows,
    window_row,
)
from bitquorum.detect.statistics import (
    Disagreement,
    Energy,
    Entropy,
    InputStatistic,
    MaxSoftmax,
    PointwiseMI,
    PredictionMI,
    Statistic,
    scores_of,
)
from bitquorum.detect.window import WindowMI, resampled
from bitquorum.ensemble import Aggregation, answered, unanswered
from bitquorum.evaluate import CLEAN
from bitquorum.interface import InputError, Method

LEAST_CALIBRATION: Final = 100
_STAND_INS: Final = {WindowMI.name: PointwiseMI.name}  # whose evasions count for a statistic that none evades


@final
@dataclass(frozen=True, kw_only=True)
class Detection(Method):
    """Choose what is measured: `detect` does it.

    Attributes:
        statistics: Each is calibrated and measured by itself; `WindowMI` holds the size of its windows.
        passes: Number of draws that one score, and the prediction beside it, averages over.
        calibration: Number of held-out clean images, fewer where there are not so many, at least 100.
        false_positives: Rates at which thresholds are set.
        aware: Attack that knows the detector; `None` for none.
        evaded: Statistics that it evades, one after the other, as far as they are measured.
        aware_images: Number of images that it attacks.
        aware_epsilons: Its radii; the middle one of the evaluation where there are none.
        evaluation: Digest of the stored evaluation whose attacks are scored; empty for the run's own.
        ladders: Digests of stored ladders whose worst versions are scored; `None` for all of them.
        windows: Number of windows, drawn with overlap, behind each figure of a statistic of windows.
        seed: Of draws, of the aware attack and of windows.
    """

    statistics: tuple[Statistic, ...] = field(
        default_factory=lambda: (
            PredictionMI(),
            PointwiseMI(),
            WindowMI(),
            MaxSoftmax(),
            Disagreement(),
            Energy(),
            Entropy(),
        )
    )
    passes: int = 10
    calibration: int = 1000
    false_positives: tuple[float, ...] = (0.05, 0.01)
    aware: Evasive | None = field(default_factory=lambda: Evasive(steps=15, rounds=3, targets=1))
    evaded: tuple[InputStatistic, ...] = field(default_factory=lambda: (PredictionMI(), PointwiseMI(), MaxSoftmax()))
    aware_images: int = 100
    aware_epsilons: tuple[float, ...] = ()
    evaluation: str = ""
    ladders: tuple[str, ...] | None = None
    windows: int = 200
    seed: int = 0

    @property
    def evasions(self) -> tuple[InputStatistic, ...]:
        """The statistics to evade: those that are measured, or that stand in for one that is."""
        known = {_STAND_INS.get(statistic.name, statistic.name) for statistic in self.statistics}
        return tuple(statistic for statistic in self.evaded if statistic.name in known)

    def __post_init__(self) -> None:
        names = [statistic.name for statistic in self.statistics]
        if not names or len(set(names)) != len(names):
            raise InputError(f"expected statistics of different names, at least one, got {names}")
        if min(self.passes, self.aware_images, self.windows) < 1 or self.calibration < LEAST_CALIBRATION:
            raise InputError(
                f"expected at least one pass, image under the aware attack and window, and {LEAST_CALIBRATION} images "
                f"for calibration, got {self.passes}, {self.aware_images}, {self.windows} and {self.calibration}"
            )
        if not all(0 < epsilon <= 1 for epsilon in self.aware_epsilons):
            raise InputError(f"expected aware_epsilons in (0, 1], in units of the image, got {self.aware_epsilons}")
        rates = self.false_positives
        if not rates or len(set(rates)) != len(rates) or not all(0 < rate < 1 for rate in rates):
            raise InputError(f"expected different rates of false positives in (0, 1), got {rates}")
        windows = [statistic.window for statistic in self.statistics if isinstance(statistic, WindowMI)]
        scores = min(self.calibration, self.windows) if windows else self.calibration
        if (scores + 1) * min(rates) < 1 - 1e-9 or max(windows, default=0) > self.calibration:
            raise InputError(
                f"expected at least {math.ceil(1 / min(rates) - 1 - 1e-9)} images for calibration and, with window-mi, "
                f"windows for {100 * min(rates):g} % false positives, and no window larger than the calibration, got "
                f"{self.calibration} images and {self.windows} windows; raise them or the rate"
            )


@dataclass(frozen=True, kw_only=True, eq=False)
class Observed:
    """Hold what an ensemble said about images under one threat.

    Attributes:
        logits: As many draws as a score averages over.
        labels: True classes.
        threat: Label, for tables.
        kind: Of the threat, for tables.
        level: Epsilon, or another strength.
        against: Name of the statistic that the attack knew and evaded; `None` for an attack that knew of none.
        rows: Position of each image among the clean test images; `None` where they are all there, in order.
    """

    logits: Float[Tensor, "draw member images classes"]
    labels: Int[Tensor, "images"]
    threat: str = CLEAN
    kind: str = CLEAN
    level: float = 0.0
    against: str | None = None
    rows: Int[Tensor, "images"] | None = None


def detect(
    detection: Detection,
    aggregation: Aggregation,
    calibration: Observed,
    clean: Observed,
    attacked: Sequence[Observed],
) -> tuple[list[Row], list[Row]]:
    """Measure every statistic against every threat.

    A prediction is the aggregation's over all draws of the logits; where they give no probabilities it is wrong, and
    the score infinite. Thresholds come from the calibration images, of
    which each is scored by the clean joint of the others. Positives are attacked images that were right when clean and
    are wrong now; negatives are the clean test images. A threat `against` a statistic counts for this statistic alone.
    `WindowMI` has no attack of its own: those against `PointwiseMI`, which knows the same joint of votes, stand in.
    What compares views is left out where there is a single one.

    Args:
        detection: Statistics, rates and windows.
        aggregation: Of the ensemble.
        calibration: Clean images that neither training nor testing used.
        clean: Clean test images.
        attacked: The test images, or some of them, under threat.

    Returns:
        Rows of metrics (`name` is `detection`, `clean` or `rejection`) and rows of curves, without the columns of an
        arm.

    Raises:
        InputError: if there are fewer than 100 calibration images or too few for a rate, or numbers of draws or images
            that do not fit.

    Examples:
        >>> from bitquorum.ensemble import MeanProbability
        >>> def observed(seed, images, scale):
        ...     generator = torch.Generator().manual_seed(seed)
        ...     noise = scale * torch.randn(3, 2, images, 2, generator=generator)
        ...     return Observed(logits=noise + torch.tensor([4.0, 0.0]), labels=torch.zeros(images).long())
        >>> detection = Detection(statistics=(Entropy(),), false_positives=(0.05,))
        >>> rows, _ = detect(detection, MeanProbability(), observed(0, 100, 1.0), observed(1, 50, 1.0), [])
        >>> [(row["name"], round(row["rejected"], 2)) for row in rows]
        [('clean', 0.04)]
    """
    _check(calibration, clean, attacked)
    metrics: list[Row] = []
    curves: list[Row] = []
    for statistic in detection.statistics:
        if not has_pairs(statistic, calibration.logits):
            continue
        threats = [
            threat for threat in attacked if threat.against in (None, _STAND_INS.get(statistic.name, statistic.name))
        ]
        if isinstance(statistic, WindowMI):
            rows, drawn = _measure_windows(detection, statistic, aggregation, calibration, clean, threats)
        elif isinstance(statistic, InputStatistic):
            rows, drawn = _measure_inputs(detection, statistic, aggregation, calibration, clean, threats)
        else:
            raise InputError(f"expected a statistic of inputs or of windows, got {statistic.name}")
        named: Row = {"statistic": statistic.name, "calibration": len(calibration.labels), "draws": len(clean.logits)}
        metrics += [{"name": row.pop("name"), **named, **row} for row in rows]
        curves += [{"statistic": statistic.name, **row} for row in drawn]
    return metrics, curves


def _measure_inputs(
    detection: Detection,
    statistic: InputStatistic,
    aggregation: Aggregation,
    calibration: Observed,
    clean: Observed,
    threats: Sequence[Observed],
) -> tuple[list[Row], list[Row]]:
    reference = CleanReference.fit(calibration.logits)
    held_out = held_out_scores(statistic, calibration.logits)
    thresholds = {rate: threshold_at(held_out, rate) for rate in detection.false_positives}

    def see(observed: Observed) -> Seen:
        return _see(observed, len(clean.labels), aggregation, scores_of(statistic, observed.logits, reference))

    before, seen = see(clean), [see(threat) for threat in threats]
    metrics, curves = [], []
    for now in seen:
        fooled = before.right[now.rows] & ~now.right
        successes, positives = int(fooled.sum()), now.scores[fooled]
        scores = (before.scores, positives, thresholds) if successes >= LEAST_POSITIVES else None
        metrics.append(
            detection_row(now.facts, successes=successes, images=len(now.rows), rates=thresholds, scores=scores)
        )
        if scores:
            curves.append(curve_row(now.facts, before.scores, positives))
    for rate, threshold in thresholds.items():
        metrics.append(clean_row(before, rate, threshold))
        metrics += rejection_rows(before, seen, rate, threshold)
    return metrics, curves


def _measure_windows(
    detection: Detection,
    statistic: WindowMI,
    aggregation: Aggregation,
    calibration: Observed,
    clean: Observed,
    threats: Sequence[Observed],
) -> tuple[list[Row], list[Row]]:
    """Compare windows of attacked images, fooled or not, with clean ones; windows overlap, and intervals know it.

    Thresholds promise no rate: calibration windows overlap, and their images make the reference too, so that they vary
    less than windows of other images. What is rejected of clean test windows has a row of its own.
    """
    reference = CleanReference.fit(calibration.logits)

    def of_windows(observed: Observed, purpose: str) -> Tensor:
        seed = rng.derive(detection.seed, "windows", purpose)
        rows = resampled(observed.logits.shape[2], statistic.window, detection.windows, seed=seed)
        logits = observed.logits.masked_fill(unanswered(observed.logits)[:, None], 0.0)
        return statistic(logits[:, :, rows.to(logits.device)], reference)

    held_out = of_windows(calibration, "calibration")
    thresholds = {rate: threshold_at(held_out, rate) for rate in detection.false_positives}
    before = _see(clean, len(clean.labels), aggregation)
    negatives = of_windows(clean, "clean") if len(clean.labels) >= statistic.window else None
    metrics, curves = [], []
    for threat in threats:
        now, images = _see(threat, len(clean.labels), aggregation), len(threat.labels)
        successes, apart = int((before.right[now.rows] & ~now.right).sum()), images / statistic.window
        scores = None
        if negatives is not None and successes >= LEAST_POSITIVES and apart >= 1:
            scores = (negatives, of_windows(threat, "attacked"), thresholds)
            curves.append(curve_row(now.facts, *scores[:2]))
        repeats = max(1.0, detection.windows / apart)
        metrics.append(
            detection_row(
                now.facts, successes=successes, images=images, rates=thresholds, scores=scores, repeats=repeats
            )
        )
    if negatives is not None:
        repeats = max(1.0, detection.windows * statistic.window / len(clean.labels))
        metrics += [
            window_row(negatives, len(clean.labels), rate, threshold, repeats=repeats)
            for rate, threshold in thresholds.items()
        ]
    return metrics, curves


def _see(observed: Observed, images: int, aggregation: Aggregation, scores: Tensor | None = None) -> Seen:
    labels = observed.labels
    return Seen(
        facts={
            "threat": observed.threat,
            "kind": observed.kind,
            "level": observed.level,
            "aware": observed.against is not None,
        },
        rows=torch.arange(images, device=labels.device) if observed.rows is None else observed.rows,
        scores=torch.zeros(len(labels)) if scores is None else scores,
        right=answered(aggregation, observed.logits) == labels,
    )


def _check(calibration: Observed, clean: Observed, attacked: Sequence[Observed]) -> None:
    if len(calibration.labels) < LEAST_CALIBRATION:
        raise InputError(
            f"expected at least {LEAST_CALIBRATION} held-out clean images, got {len(calibration.labels)}; "
            "hold out more images"
        )
    draws = {len(observed.logits) for observed in (calibration, clean, *attacked)}
    if len(draws) > 1:
        raise InputError(f"expected equally many draws of all images, got {sorted(draws)}")
    for observed in attacked:
        rows = torch.arange(len(observed.labels)) if observed.rows is None else observed.rows.cpu()
        there = observed.rows is not None or len(observed.labels) == len(clean.labels)
        there = there and len(rows) == len(observed.labels) and (not len(rows) or int(rows.max()) < len(clean.labels))
        if not there or not torch.equal(clean.labels.cpu()[rows], observed.labels.cpu()):
            raise InputError(
                f"expected {observed.threat} on the clean test images, with `rows` where some are missing, got "
                f"{len(observed.labels)} images whose labels or rows do not fit {len(clean.labels)}"
            )
