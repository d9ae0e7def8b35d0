"""State how well scores tell attacked inputs from clean ones, with intervals."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from bitquorum.evaluate.accuracy import NORMAL, unseen, wilson
from bitquorum.interface import InputError


@dataclass(frozen=True, kw_only=True)
class Interval:
    """State a share or an area with its 95 % interval, all in [0, 1]."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Hold a ROC curve: rates of false and true positives, both rising from 0 to 1."""

    fpr: tuple[float, ...]
    tpr: tuple[float, ...]


def roc_curve(
    negatives: Float[Tensor, "negatives"], positives: Float[Tensor, "positives"], *, points: int = 101
) -> Curve:
    """Return the rates at every threshold, or at `points` of them that lie evenly along the curve.

    Args:
        negatives: Scores of clean inputs.
        positives: Scores of attacked inputs.
        points: Largest number of points, at least two.

    Raises:
        InputError: if there is no score on either side, one is NaN, or less than two points are asked for.

    Examples:
        >>> roc_curve(torch.tensor([0.0, 1.0]), torch.tensor([1.0, 2.0]))
        Curve(fpr=(0.0, 0.0, 0.5, 1.0), tpr=(0.0, 0.5, 1.0, 1.0))
    """
    _check(negatives, positives)
    if points < 2:
        raise InputError(f"expected at least two points of a curve, got {points}")
    thresholds = torch.cat([negatives, positives]).unique().flip(0)
    rates = torch.stack([_share_from(side, thresholds) for side in (negatives, positives)])
    rates = torch.cat([rates.new_zeros(2, 1), rates], 1)
    if rates.shape[1] > points:
        along = rates.sum(0)
        wanted = torch.linspace(0, 2, points, dtype=along.dtype, device=along.device)
        rates = rates[:, torch.searchsorted(along, wanted).clamp(max=len(along) - 1).unique()]
    fpr, tpr = rates.tolist()
    return Curve(fpr=tuple(fpr), tpr=tuple(tpr))


def auroc(
    negatives: Float[Tensor, "negatives"], positives: Float[Tensor, "positives"], *, repeats: float = 1.0
) -> Interval:
    r"""Return the area under the ROC curve, P(positive > negative) + P(equal) / 2, with DeLong's interval.

    $$\mathrm{var}(A) = \frac{s^2_{10}}{m} + \frac{s^2_{01}}{n}$$

    with the sample variances $s^2$ of the share of the other side that each of m positives and n negatives beats. The
    interval is symmetric in $\log(A / (1 - A))$, with the standard error $\sqrt{\mathrm{var}(A)} / (A (1 - A))$, so
    that it stays in [0, 1]; it always reaches as far as Wilson's does that sees min(m, n) successes, or failures, in as
    many trials, so that a perfect separation of few scores is no certainty, and no farther than Wilson's of that area
    in as many trials, since A (1 - A) / min(m, n) is the largest variance that A can have (Birnbaum and Klose, 1957).
    Positives and negatives count as independent of each other.

    Reference: DeLong, DeLong, Clarke-Pearson, 1988, Biometrics 44, 837-845. Deviations: the logit scale and its least
    width.

    Args:
        negatives: Scores of clean inputs.
        positives: Scores of attacked inputs.
        repeats: Number of scores for one independent observation, for scores of overlapping windows.

    Raises:
        InputError: if there is no score on either side, or one is NaN.

    Examples:
        >>> area = auroc(torch.tensor([0.0, 1.0, 2.0]), torch.tensor([1.0, 3.0, 4.0]))
        >>> round(area.value, 3), round(area.low, 3), round(area.high, 3)
        (0.833, 0.31, 0.982)
    """
    _check(negatives, positives)
    wins, losses = _beaten(positives, negatives), _beaten(negatives, positives)
    area = float(wins.mean())
    variance = repeats * sum(_variance(side) / len(side) for side in (wins, losses))
    trials = max(1.0, min(len(wins), len(losses)) / repeats)
    edge = unseen(trials)
    low = high = area
    if 0 < area < 1:
        half, centre = NORMAL * math.sqrt(variance) / (area * (1 - area)), math.log(area / (1 - area))
        low, high = (1 / (1 + math.exp(-min(max(x, -700.0), 700.0))) for x in (centre - half, centre + half))
        widest = wilson(area, trials)  # var(A) is at most A (1 - A) / min(m, n)
        low, high = max(low, widest[0]), min(high, widest[1])
    return Interval(value=area, low=min(low, 1 - edge), high=max(high, edge))


def share(flags: Bool[Tensor, "trials"], *, repeats: float = 1.0) -> Interval:
    """Return the share of true flags with Wilson's score interval (Wilson, 1927).

    Args:
        flags: Outcomes, at least one.
        repeats: Number of outcomes for one independent observation, for those of overlapping windows.

    Raises:
        InputError: if there is no outcome.

    Examples:
        >>> part = share(torch.tensor([True, True, False, True]))
        >>> part.value, round(part.low, 2), round(part.high, 2)
        (0.75, 0.3, 0.95)
    """
    if not len(flags):
        raise InputError("expected at least one outcome, got none")
    p = float(flags.double().mean())
    low, high = wilson(p, max(1.0, len(flags) / repeats))
    return Interval(value=p, low=low, high=high)


def _check(negatives: Tensor, positives: Tensor) -> None:
    for name, scores in (("clean", negatives), ("attacked", positives)):
        if not len(scores) or bool(scores.isnan().any()):
            raise InputError(
                f"expected {name} scores that are numbers, at least one, got {len(scores)} with NaN or none"
            )


def _share_from(scores: Tensor, thresholds: Tensor) -> Float[Tensor, "thresholds"]:
    """Return the share of the scores that lie at each threshold or above."""
    below = torch.searchsorted(scores.sort().values, thresholds)
    return (len(scores) - below).double() / len(scores)


def _beaten(scores: Tensor, others: Tensor) -> Float[Tensor, "scores"]:
    """Return the share of `others` that each score exceeds; equals count half."""
    ordered = others.sort().values
    below, up_to = (torch.searchsorted(ordered, scores.contiguous(), right=right) for right in (False, True))
    return (below + up_to).double() / (2 * len(others))


def _variance(values: Float[Tensor, "values"]) -> float:
    return float(values.var()) if len(values) > 1 else 0.25  # of one value nothing is known but its range
