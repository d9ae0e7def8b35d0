"""Lay the rows of a ladder out as tables: the bracket, and what each rung did."""

import math
from collections.abc import Sequence
from typing import Any

from bitquorum.report.tables import Table, epsilon_label, multiple, percent


def bracket(rows: Sequence[dict[str, Any]]) -> Table:
    """Return the bracket: clean, the claim as worded, and the worst case over the ladder, arms side by side."""
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    epsilons = sorted({row["epsilon"] for row in rows if row["epsilon"]})
    body: list[tuple[str, ...]] = [("", "members", *(_first(rows, arm=arm)["members"] for arm in arms))]
    body.append(("0", "clean", *(percent(_first(rows, arm=arm, attack="clean")) for arm in arms)))
    for epsilon in epsilons:
        here = [row for row in rows if row["epsilon"] == epsilon]
        claims = {row["arm"]: row for row in here if row["attack"].startswith("claim: ")}
        claim = ", ".join(dict.fromkeys(row["attack"].removeprefix("claim: ") for row in claims.values()))
        tries = next((row["name"] for row in here if row["name"].startswith("worst of ")), "")
        label = epsilon_label(epsilon, here[0].get("norm"))
        cells = (percent(claims.get(arm)) for arm in arms)
        body.append((label, f"claim as worded ({claim})", *cells))
        for text, wanted in (
            ("worst case over the ladder", {"attack": "worst", "name": "accuracy"}),
            (tries, {"name": tries}),
        ):
            found = [_first(here, arm=arm, **wanted) for arm in arms]
            body.append((label, text, *(percent(row) for row in found)))
        opinions = dict.fromkeys(row["attack"] for row in here if row["name"] == "second opinion")
        for attack in opinions:
            found = [_first(here, arm=arm, attack=attack, name="second opinion") for arm in arms]
            body.append((label, attack, *(percent(row) for row in found)))
    return Table(header=("epsilon", "accuracy", *arms), rows=tuple(body), note=_note(rows))


def rungs(rows: Sequence[dict[str, Any]], arm: str, epsilon: float) -> Table:
    """Return what each rung did: images met and broken, worst case after it, passes of each image."""
    steps = [row for row in rows if row["arm"] == arm and row["epsilon"] == epsilon and row["name"] == "left"]
    body = []
    for row in steps:
        alone = f"{100 * row['alone_value']:.1f}" if "alone_value" in row else "-"
        passes = f"{row['forward']:,} + {row['backward']:,}" if row["forward"] else "-"
        counts = (str(row["attacked"] or "-"), str(row["broke"]), str(row["worst_by"]))
        body.append((row["attack"], row["kind"], *counts, alone, percent(row), passes))
    radius = epsilon_label(epsilon, steps[0].get("norm") if steps else None)
    header = ("rung", "kind", "met", "broke", "worst by", "alone", "left", "forward + backward")
    note = (
        f"{arm} at {radius}. Met: images that still stood and were attacked. Broke: of these, no "
        "longer standing. Worst by: images whose worst version the rung made. Alone: accuracy in % where the rung met "
        "all images. Left: worst case so far, on all images. Passes of each image that was met."
    )
    return Table(header=header, rows=tuple(body), note=note)


def verdicts(rows: Sequence[dict[str, Any]]) -> Table:
    """Return the verdicts of self-checks and, in the note, what failed ones mean."""
    words = {True: "passed", False: "FAILED", None: "not posed"}
    body = tuple(
        (
            row["arm"],
            epsilon_label(row["epsilon"], row.get("norm")),
            row["name"],
            words[row["passed"]],
            row["reason"],
        )
        for row in rows
    )
    failed = sum(row["passed"] is False for row in rows)
    note = (
        f"{failed} self-checks failed: the attack may be weaker than it looks (masked gradients); do not quote these "
        "accuracies before the reason is found"
    )
    header = ("arm", "epsilon", "self-check", "verdict", "reason")
    return Table(header=header, rows=body, note=note if failed else "")


def ladder_seconds(rows: Sequence[dict[str, Any]]) -> Table | None:
    """Return what the ladder took with each arm and, in brackets as a multiple of it, each peer; `None` without peers.

    Beside each peer stands after how long the ladder had left as little as the peer did in the end, rung by rung, and
    what the peer took as a multiple of that; `-` where it never had.

    Args:
        rows: Of `seconds.jsonl` of each arm, a rung or a peer each, and of `metrics.jsonl` of the ladder.
    """
    times = [row for row in rows if "seconds" in row and ("rung" in row or "peer" in row)]
    peers = list(dict.fromkeys(row["peer"] for row in times if "peer" in row))
    if not peers:
        return None
    body = []
    for arm in dict.fromkeys(row["arm"] for row in times):
        here, timed = ([row for row in part if row.get("arm") == arm] for part in (rows, times))
        climbed = [row for row in timed if "rung" in row]
        ours = sum(row["seconds"] for row in climbed)
        asked = {(row["peer"], row["epsilon"]): row["seconds"] for row in timed if "peer" in row}
        cells = []
        for peer in peers:
            took = {epsilon: seconds for (name, epsilon), seconds in asked.items() if name == peer}
            theirs = sum(took.values())
            equal = sum(_as_low_after(here, climbed, peer, epsilon) for epsilon in took)
            cells.append(f"{theirs:.1f}{multiple(theirs, ours)}" if took else "-")
            cells.append("-" if equal == math.inf or not took else f"{equal:.1f}{multiple(theirs, equal)}")
        body.append((arm, f"{ours:.1f}", *cells))
    note = (
        "Seconds, one after the other in one run; in brackets what the peer took as a multiple of them, without "
        "self-checks. As low: until the ladder had left no more than the peer in the end."
    )
    return Table(
        header=("arm", "ladder", *(name for peer in peers for name in (peer, "ladder until as low"))),
        rows=tuple(body),
        note=note,
    )


def _as_low_after(
    rows: Sequence[dict[str, Any]], climbed: Sequence[dict[str, Any]], peer: str, epsilon: float
) -> float:
    """Return the seconds of the first rungs after which the ladder had left no more than a peer; infinity if never."""
    opinion = _first(rows, name="second opinion", attack=peer, epsilon=epsilon)
    left = {row["attack"]: row["value"] for row in rows if row.get("name") == "left" and row["epsilon"] == epsilon}
    passed = 0.0
    for row in climbed:
        if row["epsilon"] == epsilon:
            passed += row["seconds"]
            if opinion and left.get(row["rung"], 2.0) <= opinion["value"]:
                return passed
    return math.inf


def _first(rows: Sequence[dict[str, Any]], **wanted: Any) -> dict[str, Any]:
    return next((row for row in rows if all(row.get(key) == value for key, value in wanted.items())), {})


def _note(rows: Sequence[dict[str, Any]]) -> str:
    images = sorted({row["images"] for row in rows})
    draws = sorted({row["draws"] for row in rows})
    return (
        f"Expected accuracy in % on {' or '.join(map(str, images))} test images and {' or '.join(map(str, draws))} "
        "fresh draws that neither attacks nor their selection saw, with 95 % intervals over images and draws. "
        "Worst case: for each image the rung that leaves it least."
    )
