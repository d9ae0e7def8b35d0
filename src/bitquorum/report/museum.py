"""Lay the rows of the museum out: what each evaluation leaves of defences that are known to be broken."""

from collections.abc import Sequence
from typing import Any

from bitquorum.report.tables import Table, epsilon_label, percent

GRANTED = 0.02  # what an evaluation may leave above the twin


def museum_table(rows: Sequence[dict[str, Any]]) -> Table:
    """Return one line for each exhibit: its twin, what the ladder leaves, what each peer's images leave."""
    names = list(dict.fromkeys(row["exhibit"] for row in rows))
    peers = list(dict.fromkeys(row["by"] for row in rows if "version" in row))
    versions = {row["by"]: row["version"] for row in rows if "version" in row}
    body = []
    for name in names:
        here = [row for row in rows if row["exhibit"] == name]
        (twin,) = (row for row in here if row["who"] == "twin")
        (ours,) = (row for row in here if row["who"] == "defended" and "version" not in row)
        verdict = "reached" if ours["value"] <= twin["value"] + GRANTED + 1e-9 else "NOT reached"
        masked = ", ".join(ours["failed_checks"]) or "none"
        cells = [_opinion(row) for peer in peers for row in here if row["by"] == peer]
        clean = f"{100 * ours['clean']:.1f}"
        body.append((name, clean, f"{100 * ours['claim']:.1f}", percent(twin), percent(ours), verdict, *cells, masked))
    first = rows[0]
    ladder = next(row["by"] for row in rows if "version" not in row)
    header = ("exhibit", "clean", "claim", "twin", ladder, "2 points", *peers, "failed self-checks")
    tools = ", ".join(f"{name} {version}" for name, version in versions.items())
    note = (
        f"Accuracy in % on {first['images']} digits at {epsilon_label(first['epsilon'])}. Twin: the same networks "
        "without the defence. Claim: PGD alone. A peer's images are judged on the same fresh draws as ours; in "
        "brackets what it states itself, where it states anything."
    )
    return Table(header=header, rows=tuple(body), note=note + (f" Peers: {tools}." if tools else ""))


def _opinion(row: dict[str, Any]) -> str:
    if row["value"] is None:
        return "fails"
    claimed = "" if row["claimed"] is None else f" (says {100 * row['claimed']:.1f})"
    return f"{100 * row['value']:.1f}{claimed}"
