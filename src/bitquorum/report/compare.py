"""Lay out the paired differences between the arms of a run."""

from collections.abc import Mapping, Sequence
from typing import Any

from bitquorum.report.tables import Table, attacks_of, epsilon_label, points


def difference_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Return one line for each arm and the arm that it is compared to, in points, with a column for each number."""
    keys = attacks_of(rows)
    pairs = dict.fromkeys((row["arm"], row["reference"]) for row in rows)
    found = {(row["arm"], row["reference"], row["epsilon"], row["attack"]): row for row in rows}
    images, norm = sorted({row["images"] for row in rows}), rows[0].get("norm") if rows else None
    return Table(
        header=(
            "arm",
            "minus",
            *(f"{attack} {epsilon_label(epsilon, norm)}" if epsilon else attack for epsilon, attack in keys),
        ),
        rows=tuple((*pair, *(points(found.get((*pair, *key))) for key in keys)) for pair in pairs),
        note=(
            f"Accuracy of an arm minus that of another, in points, on the same {' or '.join(map(str, images))} test "
            "images, paired by image, with 95 % intervals over images; * where p < 0.05 after Holm's correction for "
            "the number of arms. One seed of training says nothing of others; what a draw of the weights gives to all "
            "images alike is not in the intervals."
        ),
    )
