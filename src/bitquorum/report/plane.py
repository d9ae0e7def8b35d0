"""Lay the rows of the information plane out as tables."""

from collections.abc import Sequence
from typing import Any

from bitquorum.report.tables import Table, epsilon_label, percent

_BITS = ("pair_mi", "residual", "excess", "conditional_mi", "label_mi")
_HEADER = ("threat", "level", "accuracy", "I(fi;fj)", "residual", "excess", "I(fi;fj|Y)", "I(fi;Y)")


def plane_table(rows: Sequence[dict[str, Any]], arm: str) -> Table:
    """Return a line for each threat and level of an arm: accuracy, and information in bits with its interval."""
    mine = [row for row in rows if row["arm"] == arm]
    draws = sorted({row["draws"] for row in mine})
    note = (
        f"{arm}: {mine[0]['members']}. Votes of members on {mine[0]['images']} test images, "
        f"{' or '.join(map(str, draws))} draws. Accuracy in %, information in bits, bias-corrected, with half-widths "
        "of 95 % intervals over images. Residual: above members of the same accuracies that err uniformly and "
        "independently. Excess: above members with the same confusions that are independent given the label. Level: "
        "epsilon, or severity of a corruption."
    )
    return Table(header=_HEADER, rows=tuple(_cells(row) for row in mine), note=note)


def profiles(rows: Sequence[dict[str, Any]]) -> Table:
    """Return the lines of clean images, of the last attack, of ladders and of random corners, for every arm."""
    last = next((row["threat"] for row in reversed(rows) if row["kind"] == "white-box"), "")
    shown = [row for row in rows if row["kind"] in ("clean", "ladder", "noise") or row["threat"] == last]
    return Table(header=("arm", *_HEADER), rows=tuple((row["arm"], *_cells(row)) for row in shown))


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    accuracy = {key: row[f"accuracy{end}"] for key, end in (("value", ""), ("low", "_low"), ("high", "_high"))}
    shown = percent({**accuracy, "images": row["images"]})
    return row["threat"], level_label(row), shown, *(_bits(row, name) for name in _BITS)


def correlation_table(rows: Sequence[dict[str, Any]]) -> Table:
    """Return the correlations of accuracy with MI along each threat."""
    body = [
        (
            row["arm"],
            row["threat"],
            row["quantity"],
            str(row["points"]),
            *("-" if row[key] is None else f"{row[key]:.2f}" for key in ("pearson", "spearman")),
            "-" if row["p_value"] is None else f"{row['p_value']:.2g}" + ("" if row["exact"] else " *"),
        )
        for row in rows
    ]
    note = (
        "Correlation with accuracy over the levels of a threat, the clean images among them. p: share of orders with "
        "as large a linear correlation (* sampled). Votes of independent members share less the less accurate they "
        "are, so a correlation of I(fi;fj) is no sign that MI makes robust; that of the residual need not be there."
    )
    return Table(
        header=("arm", "threat", "quantity", "points", "Pearson", "Spearman", "p"), rows=tuple(body), note=note
    )


def level_label(row: dict[str, Any]) -> str:
    """Return the strength of a threat: epsilon in the field's notation, or the severity of a corruption."""
    if row.get("axis") == "severity":
        return f"severity {row['level']:g}"
    return epsilon_label(row["level"]) if row["level"] else "0"


def _bits(row: dict[str, Any], name: str) -> str:
    """Return a value with the half-width of its interval; a dash where it is not defined."""
    if row[name] is None:
        return "-"
    return f"{row[name]:.2f}\u00a0±{(row[f'{name}_high'] - row[f'{name}_low']) / 2:.2f}"
