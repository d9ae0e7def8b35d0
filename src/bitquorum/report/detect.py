"""Lay the rows of a detection out as tables: how well attacks are seen, and what rejection is worth."""

from collections.abc import Sequence
from typing import Any

from bitquorum.report.tables import Table, epsilon_label, percent


def detection_table(rows: Sequence[dict[str, Any]], arm: str) -> Table:
    """Return a line for each statistic, attack and epsilon of an arm: area under the ROC curve, true positives."""
    mine = [row for row in rows if row["arm"] == arm and row["name"] == "detection"]
    body = [
        (
            row["statistic"],
            row["threat"] + (" (knows the detector)" if row["aware"] else ""),
            epsilon_label(row["level"]),
            str(row["successes"]),
            _area(row),
            *(percent(_of(row, name)) for name in ("tpr5", "tpr1")),
        )
        for row in mine
    ]
    first = mine[0]
    note = (
        f"{arm}: {first['members']}. Positives: attacked images that were right when clean and are wrong now; none is "
        f"stated for fewer than 10. Negatives: {first['images']} clean test images. Thresholds from "
        f"{first['calibration']} other clean images; scores over {first['draws']} draws; 95 % intervals. TPR in %."
    )
    header = ("statistic", "threat", "epsilon", "positives", "AUROC", "TPR at 5 %", "TPR at 1 %")
    return Table(header=header, rows=tuple(body), note=note)


def rejection_table(rows: Sequence[dict[str, Any]], arm: str, *, false_positives: float = 0.05) -> Table:
    """Return robust accuracy with rejection, both ways, under all plain attacks and under those that know."""
    mine = [row for row in rows if row["arm"] == arm and row.get("false_positives") == false_positives]
    clean = {row["statistic"]: row for row in mine if row["name"] == "clean"}
    body = []
    for row in mine:
        if row["name"] != "rejection" or not row["threat"].startswith("worst"):
            continue
        body.append(
            (
                row["statistic"],
                epsilon_label(row["level"]),
                "all, and those that know the detector" if row["aware"] else "all plain attacks",
                *(percent(_of(row, name)) for name in ("right_or_rejected", "accepted_right", "fooled")),
                percent(_of(clean[row["statistic"]], "accepted_right")),
            )
        )
    note = (
        f"{arm}, thresholds at {100 * false_positives:g} % false positives. Worst over the attacks for each image. "
        "Right or rejected: rejection counts as defence. Right and accepted: rejection counts as failure. Fooled: wrong and "
        "accepted. Clean: right and accepted without an attack. In %, with 95 % intervals over images."
    )
    header = ("statistic", "epsilon", "attacks", "right or rejected", "right and accepted", "fooled", "clean")
    return Table(header=header, rows=tuple(body), note=note)


def _of(row: dict[str, Any], name: str) -> dict[str, Any] | None:
    """Return a quantity in the form that `percent` takes; `None` where it was not measured."""
    if row.get(name) is None:
        return None
    return {"value": row[name], "low": row[f"{name}_low"], "high": row[f"{name}_high"], "images": row["images"]}


def _area(row: dict[str, Any]) -> str:
    if row["auroc"] is None:
        return "-"
    return f"{row['auroc']:.2f} [{row['auroc_low']:.2f}, {row['auroc_high']:.2f}]"
