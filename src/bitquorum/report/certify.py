"""Lay certificates out as a table: the floor, beside the ceiling that attacks leave."""

from collections.abc import Sequence
from typing import Any, Final

from bitquorum.report.tables import Table, epsilon_label, percent

_TEXTS: Final = {
    "all": "certified, every draw",
    "fresh": "certified, fresh draws",
    "nearest": "certified, rounding to nearest instead",
}


def certificate_table(rows: Sequence[dict[str, Any]], ceilings: Sequence[dict[str, Any]] = ()) -> Table:
    """Return clean, certified and attacked accuracy, epsilons down and arms side by side.

    Args:
        rows: Of `certify_run`.
        ceilings: Of ladders and evaluations, with their name as `ceiling`; the worst cases in the maximum norm at the
            same epsilons are shown. Of several of one name on one number of images it is the lowest.
    """
    ceilings = [row for row in ceilings if row["attack"] == "worst" and row["name"] == "accuracy" and "norm" not in row]
    arms = list(dict.fromkeys(row["arm"] for row in rows))

    def line(label: str, text: str, found: Sequence[dict[str, Any]]) -> tuple[str, ...]:
        by_arm = {row["arm"]: row for row in sorted(found, key=lambda row: -row["value"])}
        return (label, text, *(percent(by_arm.get(arm)) for arm in arms))

    members = {row["arm"]: row["members"] for row in rows}
    body: list[tuple[str, ...]] = [("", "members", *(members[arm] for arm in arms))]
    body.append(line("0", "clean", [row for row in rows if row["statement"] == "clean"]))
    for epsilon in sorted({row["epsilon"] for row in rows if row["epsilon"]}):
        label = epsilon_label(epsilon)
        here = [row for row in rows if row["epsilon"] == epsilon]
        for statement, text in _TEXTS.items():
            if found := [row for row in here if row["statement"] == statement]:
                body.append(line(label, text, found))
        attacked = [row for row in ceilings if row["epsilon"] == epsilon]
        for name, images in dict.fromkeys((row["ceiling"], row["images"]) for row in attacked):
            found = [row for row in attacked if (row["ceiling"], row["images"]) == (name, images)]
            body.append(line(label, f"attacked, worst of the {name} ({images} images)", found))
    return Table(header=("epsilon", "accuracy", *arms), rows=tuple(body), note=_note(rows))


def _note(rows: Sequence[dict[str, Any]]) -> str:
    images = " or ".join(str(count) for count in sorted({row["images"] for row in rows}))
    draws = max(row["draws"] for row in rows)
    bound = next((row["bound"] for row in rows if row["bound"]), "")
    return (
        f"Accuracy in % with 95 % intervals, certified on {images} test images by {bound}. Every draw: no image within "
        f"epsilon and no draw gives another class. Fresh draws: none does under the {draws} draws that were looked at, "
        "a floor of the expected accuracy. An arm without noise has one line for both. Attacked: expected accuracy "
        "under the strongest stored attacks, a ceiling; on other images where their number differs."
    )
