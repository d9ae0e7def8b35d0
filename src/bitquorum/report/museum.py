"""Lay the rows of the museum out: what each evaluation leaves of defences that are known to be broken."""

from collections.abc import Sequence
from typing import Any

from bitquorum.report.tables import Table, epsilon_label, multiple, percent

GRANTED = 0.02  # what an evaluation may leave above the twin


def museum_table(rows: Sequence[dict[str, Any]]) -> Table:
    """Return one line for each exhibit: its twin, what the ladder leaves, and whether that is near enough."""
    body = []
    for name in _names(rows):
        twin, ours = _twin(rows, name), _ours(rows, name)
        verdict = "reached" if ours["value"] <= twin["value"] + GRANTED + 1e-9 else "NOT reached"
        checks = ", ".join(ours["failed_checks"]) or "none"
        clean, claim = f"{100 * ours['clean']:.1f}", f"{100 * ours['claim']:.1f}"
        body.append((name, clean, claim, percent(twin), percent(ours), verdict, checks))
    first = rows[0]
    header = ("exhibit", "clean", "claim", "twin", _ours(rows, first["exhibit"])["by"], "twin", "failed self-checks")
    note = (
        f"Accuracy in % on {first['images']} digits at {epsilon_label(first['epsilon'])}, with 95 % intervals. Twin: "
        f"the same networks without the defence; it is reached within {100 * GRANTED:.0f} points. Claim: PGD alone."
    )
    return Table(header=header, rows=tuple(body), note=note)


def peer_table(rows: Sequence[dict[str, Any]]) -> Table | None:
    """Return what the images of each peer leave beside what ours leave; `None` where no peer was asked."""
    versions = {row["by"]: row["version"] for row in rows if "version" in row}
    if not versions:
        return None
    body = []
    for name in _names(rows):
        found = {row["by"]: row for row in rows if row["exhibit"] == name and "version" in row}
        ours = f"{100 * _ours(rows, name)['value']:.1f}"
        body.append((name, ours, *(_opinion(found.get(peer)) for peer in versions)))
    header = ("exhibit", _ours(rows, rows[0]["exhibit"])["by"], *versions)
    tools = ", ".join(f"{name} {version}" for name, version in versions.items())
    note = (
        "Accuracy in % that adversarial images leave, all judged on the same fresh draws; in brackets what a peer "
        f"states itself, where it states anything. Versions: {tools}."
    )
    return Table(header=header, rows=tuple(body), note=note)


def peer_seconds(rows: Sequence[dict[str, Any]]) -> Table | None:
    """Return what our ladder took and, in brackets as a multiple of it, each peer; `None` where no peer was asked."""
    versions = list(dict.fromkeys(row["by"] for row in rows if "version" in row))
    if not versions:
        return None
    body = []
    for name in _names(rows):
        found = {row["by"]: row for row in rows if row["exhibit"] == name and "version" in row}
        ours = _ours(rows, name)["seconds"]
        body.append((name, f"{ours:.1f}", *(_time(found.get(peer), ours) for peer in versions)))
    header = ("exhibit", _ours(rows, rows[0]["exhibit"])["by"], *versions)
    note = "Seconds, one after the other in one run; in brackets as a multiple of the ladder's, without self-checks."
    return Table(header=header, rows=tuple(body), note=note)


def _names(rows: Sequence[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(row["exhibit"] for row in rows))


def _twin(rows: Sequence[dict[str, Any]], name: str) -> dict[str, Any]:
    return next(row for row in rows if row["exhibit"] == name and row["who"] == "twin")


def _ours(rows: Sequence[dict[str, Any]], name: str) -> dict[str, Any]:
    return next(
        row for row in rows if row["exhibit"] == name and row["who"] == "defended" and row["by"].startswith("ladder ")
    )


def _opinion(row: dict[str, Any] | None) -> str:
    if row is None:
        return "-"
    if row["value"] is None:
        return "fails"
    claimed = "" if row["claimed"] is None else f" (says {100 * row['claimed']:.1f})"
    return f"{100 * row['value']:.1f}{claimed}"


def _time(row: dict[str, Any] | None, ours: float) -> str:
    if row is None or row["value"] is None:
        return "-" if row is None else "fails"
    return f"{row['seconds']:.1f}{multiple(row['seconds'], ours)}"
