"""Lay the rows of a detection out as tables: how well attacks are seen, and what rejection is worth."""

from collections.abc import Sequence
from typing import Any

from bitquorum.report.tables import Table, epsilon_label, percent

_HEADER = ("statistic", "threat", "epsilon", "positives", "AUROC")


def rate_columns(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return the columns of rates of true positives, such as `tpr5` for the one at 5 % false positives.

    Examples:
        >>> rate_columns([{"auroc": 0.9, "tpr5": 0.5, "tpr5_low": 0.4, "tpr5_high": 0.6, "tpr0.1": None}])
        ['tpr5', 'tpr0.1']
    """
    keys = dict.fromkeys(key for row in rows for key in row)
    return [key for key in keys if key.startswith("tpr") and not key.endswith(("_low", "_high"))]


def detection_table(rows: Sequence[dict[str, Any]], arm: str) -> Table:
    """Return a line for each statistic, attack and epsilon of an arm: area under the ROC curve, true positives."""
    mine = [row for row in rows if row["arm"] == arm and row["name"] == "detection"]
    first = mine[0]
    note = (
        f"{arm}: {first['members']}. Positives: attacked images that were right when clean and are wrong now; none is "
        f"stated for fewer than 10. Negatives: the clean test images. Thresholds from {first['calibration']} other "
        f"clean images; scores over {first['draws']} draws; 95 % intervals. TPR in %. Of window-mi both sides are "
        "windows of all images, fooled or not."
    )
    rates = rate_columns(mine)
    return Table(header=_header(rates), rows=tuple(_cells(row, rates) for row in mine), note=note)


def detectors(rows: Sequence[dict[str, Any]]) -> Table:
    """Return, for every arm, how the last plain attack and those that know the detector are seen at one epsilon."""
    found = [row for row in rows if row["name"] == "detection"]
    levels = {row["level"] for row in found if row["aware"]} or {row["level"] for row in found}
    plain = [row["threat"] for row in found if row["kind"] == "white-box" and not row["aware"]]
    shown = [row for row in found if row["level"] in levels and (row["aware"] or row["threat"] == plain[-1])]
    rates = rate_columns(shown)
    return Table(header=("arm", *_header(rates)), rows=tuple((row["arm"], *_cells(row, rates)) for row in shown))


def rejections(rows: Sequence[dict[str, Any]]) -> Table:
    """Return, for every arm and evaded statistic, robust accuracy with rejection at the epsilon of the evasions."""
    body = []
    for arm in dict.fromkeys(row["arm"] for row in rows):
        mine = [row for row in rows if row["arm"] == arm and row["name"] == "rejection"]
        evaded = {(row["statistic"], row["level"]) for row in mine if row["threat"] == "worst with aware"}
        chosen = [row for row in rows if row["name"] != "rejection" or (row["statistic"], row["level"]) in evaded]
        body += [(arm, *cells) for cells in rejection_table(chosen, arm).rows]
    return Table(header=("arm", *_REJECTION), rows=tuple(body))


def _header(rates: Sequence[str]) -> tuple[str, ...]:
    return (*_HEADER, *(f"TPR at {rate.removeprefix('tpr')} %" for rate in rates))


def _cells(row: dict[str, Any], rates: Sequence[str]) -> tuple[str, ...]:
    return (
        row["statistic"],
        row["threat"] + (" (knows the detector)" if row["aware"] else ""),
        epsilon_label(row["level"]),
        str(row["successes"]),
        _area(row),
        *(percent(_of(row, name)) for name in rates),
    )


_REJECTION = ("statistic", "epsilon", "attacks", "right or rejected", "right and accepted", "fooled", "clean")


def rejection_table(rows: Sequence[dict[str, Any]], arm: str) -> Table:
    """Return robust accuracy with rejection, both ways, under all plain attacks and under those that know.

    It is that at the first rate of false positives.
    """
    false_positives = next((row["false_positives"] for row in rows if row["name"] == "clean"), None)
    if false_positives is None:  # too few images for a window, and nothing else was measured
        return Table(header=_REJECTION, rows=(), note=f"{arm}: no statistic had clean images to set against")
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
                "all" if row["aware"] else "plain",
                *(percent(_of(row, name)) for name in ("right_or_rejected", "accepted_right", "fooled")),
                percent(_of(clean[row["statistic"]], "accepted_right")),
            )
        )
    note = (
        f"{arm}, thresholds at {100 * false_positives:g} % false positives. Worst over the attacks for each image; "
        "all: also those that know the detector, on the images that these attacked. Right or rejected: rejection "
        "counts as defence. Right and accepted: rejection counts as failure. Fooled: wrong and accepted. Clean: "
        "right and accepted without an attack. In %, with 95 % intervals over images."
    )
    return Table(header=_REJECTION, rows=tuple(body), note=note)


def _of(row: dict[str, Any], name: str) -> dict[str, Any] | None:
    """Return a quantity in the form that `percent` takes; `None` where it was not measured."""
    if row.get(name) is None:
        return None
    return {"value": row[name], "low": row[f"{name}_low"], "high": row[f"{name}_high"], "images": row["images"]}


def _area(row: dict[str, Any]) -> str:
    if row["auroc"] is None:
        return "-"
    return f"{row['auroc']:.2f} [{row['auroc_low']:.2f}, {row['auroc_high']:.2f}]"
