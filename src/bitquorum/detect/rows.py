"""Put what a detector did into rows of tables: detection, clean images, rejection, curves."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bitquorum.detect.roc import Interval, auroc, roc_curve, share
from bitquorum.evaluate import WORST, Accuracy, interval

LEAST_POSITIVES: Final = 10
WORST_AWARE: Final = "worst with aware"
_BINS: Final = 40

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True, eq=False)
class Seen:
    """Hold what one statistic makes of images under one threat.

    Attributes:
        facts: Columns that tell threats apart: threat, kind, level, aware.
        rows: Position of each image among the clean test images.
        scores: Of the statistic.
        right: Whether the prediction is right.
    """

    facts: Row
    rows: Int[Tensor, "images"]
    scores: Float[Tensor, "images"]
    right: Bool[Tensor, "images"]


def detection_row(
    facts: Row,
    *,
    successes: int,
    images: int,
    rates: Iterable[float],
    scores: tuple[Float[Tensor, "negatives"], Float[Tensor, "positives"], Mapping[float, float]] | None,
    repeats: float = 1.0,
) -> Row:
    """Return how well scores tell a threat from clean images.

    Args:
        facts: Columns of the threat.
        successes: Number of images that were right when clean and are wrong now.
        images: Number of attacked images.
        rates: Of false positives; 0.05 names the column `tpr5`.
        scores: Of negatives and positives, and the threshold at each rate; `None` leaves the quantities empty.
        repeats: Number of scores for one independent observation.
    """
    row: Row = {"name": "detection", **facts, "successes": successes, "images": images}
    area = auroc(scores[0], scores[1], repeats=repeats) if scores else None
    row |= columns("auroc", area)
    for rate in rates:
        found = share(scores[1] > scores[2][rate], repeats=repeats) if scores else None
        row |= columns(f"tpr{100 * rate:g}", found)
    return row


def curve_row(facts: Row, negatives: Float[Tensor, "negatives"], positives: Float[Tensor, "positives"]) -> Row:
    """Return the ROC curve and both histograms over common bins."""
    curve = roc_curve(negatives, positives)
    both = torch.cat([negatives, positives]).double()
    both = both[both.isfinite()]  # infinite where an input has no answer: in the curve, in no bin
    low, high = (float(both.min()), float(both.max())) if len(both) else (0.0, 0.0)
    if low == high:
        low, high = low - 0.5, high + 0.5
    edges = torch.linspace(low, high, _BINS + 1, dtype=torch.float64)
    finite = [side[side.isfinite()].double().cpu() for side in (negatives, positives)]
    counts = [torch.histc(side, _BINS, low, high).long().tolist() for side in finite]
    return {
        "threat": facts["threat"],
        "level": facts["level"],
        "aware": facts["aware"],
        "fpr": list(curve.fpr),
        "tpr": list(curve.tpr),
        "edges": edges.tolist(),
        "clean_counts": counts[0],
        "attacked_counts": counts[1],
    }


def clean_row(clean: Seen, rate: float, threshold: float) -> Row:
    """Return what a threshold costs on clean test images."""
    accepted = clean.scores <= threshold
    row: Row = {"name": "clean", "images": len(clean.rows), "false_positives": rate, "threshold": threshold}
    return row | columns("rejected", _over(~accepted)) | columns("accepted_right", _over(accepted & clean.right))


def window_row(windows: Float[Tensor, "windows"], images: int, rate: float, threshold: float, *, repeats: float) -> Row:
    """Return what a threshold costs on windows of clean test images; a window has no prediction."""
    row: Row = {"name": "clean", "images": images, "false_positives": rate, "threshold": threshold}
    return row | columns("rejected", share(windows > threshold, repeats=repeats)) | columns("accepted_right", None)


def rejection_rows(clean: Seen, seen: Sequence[Seen], rate: float, threshold: float) -> list[Row]:
    """Return robust accuracy with rejection, counted both ways, for each threat and for the worst of each level.

    `right_or_rejected` counts rejection as defence, `accepted_right` as failure, `fooled` is accepted and wrong. The
    worst of a level takes each image's worst version, the clean one among them: `fooled` if any version is accepted and
    wrong, `accepted_right` only if every version is accepted and right. Each version has one prediction, so the worst
    of many is low rather than high, by what chance adds. Corruptions, whose levels are of another kind, are left out.
    With attacks that knew the detector only the images count that all of them met.
    """
    rows = [_rejection_row(now.facts, _outcomes([now], len(clean.rows), threshold), rate) for now in seen]
    attacks = [now for now in seen if now.facts["kind"] != "corruption"]
    for level in sorted({float(now.facts["level"]) for now in attacks}):
        here = [now for now in attacks if now.facts["level"] == level]
        plain = [now for now in here if not now.facts["aware"]]
        groups = [(WORST, plain, False)] if plain else []
        groups += [(WORST_AWARE, here, True)] if len(here) > len(plain) else []
        for name, group, aware in groups:
            facts = {"threat": name, "kind": WORST, "level": level, "aware": aware}
            rows.append(_rejection_row(facts, _outcomes([clean, *group], len(clean.rows), threshold), rate))
    return rows


def columns(name: str, quantity: Interval | Accuracy | None) -> Row:
    """Return a quantity as three columns, empty where it is unknown."""
    if quantity is None:
        return {name: None, f"{name}_low": None, f"{name}_high": None}
    return {name: quantity.value, f"{name}_low": quantity.low, f"{name}_high": quantity.high}


def _outcomes(group: Sequence[Seen], images: int, threshold: float) -> Bool[Tensor, "outcome met"]:
    """Return whether any version fools, and whether all are accepted and right, of the images that all threats met."""
    device = group[0].scores.device
    fooled, kept = (
        torch.zeros(images, dtype=torch.bool, device=device),
        torch.ones(images, dtype=torch.bool, device=device),
    )
    met = torch.zeros(images, dtype=torch.int64, device=device)
    for now in group:
        accepted = now.scores <= threshold
        fooled[now.rows] |= accepted & ~now.right
        kept[now.rows] &= accepted & now.right
        met[now.rows] += 1
    return torch.stack([fooled, kept])[:, met == len(group)]


def _rejection_row(facts: Row, outcomes: Bool[Tensor, "outcome met"], rate: float) -> Row:
    fooled, kept = outcomes
    row: Row = {"name": "rejection", **facts, "images": len(fooled), "false_positives": rate}
    quantities = {"right_or_rejected": ~fooled, "accepted_right": kept, "fooled": fooled}
    for name, flags in quantities.items():
        row |= columns(name, _over(flags))
    return row


def _over(flags: Bool[Tensor, "images"]) -> Accuracy:
    return interval(flags[None])
