"""Lay stored rows out as tables."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Table:
    """Hold a table of text.

    Attributes:
        header: Column names.
        rows: Cells; as many in each row as there are columns.
        note: What a reader must know: n, draws, intervals.
    """

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""

    def markdown(self) -> str:
        """Return the table in Markdown, without its note.

        Examples:
            >>> print(Table(header=("a", "b"), rows=(("1", "2"),)).markdown())
            | a | b |
            |---|---|
            | 1 | 2 |
        """
        lines = [self.header, ("---",) * len(self.header), *self.rows]
        text = ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]
        text[1] = text[1].replace(" ", "")
        return "\n".join(text)

    def narrow(self) -> "Table":
        """Return the table with its columns as rows, where that makes it narrower: a terminal has room for few columns.

        Examples:
            >>> Table(header=("arm", "clean", "worst"), rows=(("a", "1", "2"),)).narrow()
            Table(header=('arm', 'a'), rows=(('clean', '1'), ('worst', '2')), note='')
        """
        if len(self.header) <= len(self.rows) + 1:
            return self
        header, *rows = zip(self.header, *self.rows, strict=True)
        return Table(header=header, rows=tuple(rows), note=self.note)


def epsilon_label(epsilon: float, norm: str | None = None) -> str:
    """Return epsilon in the field's notation, with its norm where that is not the maximum norm.

    Examples:
        >>> epsilon_label(5 / 255), epsilon_label(0.5, "l2")
        ('5/255', 'L2 0.5')
    """
    if norm == "l2":
        return f"L2 {epsilon:g}"
    levels = epsilon * 255
    return f"{round(levels)}/255" if abs(levels - round(levels)) < 1e-6 else f"{epsilon:g}"


def attacks_of(rows: Sequence[Mapping[str, Any]]) -> list[tuple[float, str]]:
    """Return each (epsilon, attack) once, by epsilon; the worst case after the attacks that it is over."""
    found = dict.fromkeys((row["epsilon"], row["attack"]) for row in rows)
    return sorted(found, key=lambda key: (key[0], key[1] == "worst"))


def comparison(rows: Sequence[dict[str, Any]]) -> Table:
    """Return accuracies in percent with intervals: attacks and epsilons down, arms side by side."""
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    keys = attacks_of(rows)
    found = {(row["arm"], row["epsilon"], row["attack"]): row for row in rows}
    members = {row["arm"]: row["members"] for row in rows}
    body = []
    for epsilon, attack in keys:
        cells = [percent(found.get((arm, epsilon, attack))) for arm in arms]
        body.append((epsilon_label(epsilon) if epsilon else "0", attack, *cells))
    images = sorted({row["images"] for row in rows})
    draws = sorted({row["draws"] for row in rows})
    note = (
        f"Expected accuracy in % on {' or '.join(map(str, images))} test images and {' or '.join(map(str, draws))} "
        "fresh draws that no attack saw, with 95 % intervals over images and draws. "
        "Epsilon: radius in the maximum norm. Worst: least accuracy per image over the attacks of the same epsilon."
    )
    precisions = ("", "members", *(members[arm] for arm in arms))
    return Table(header=("epsilon", "attack", *arms), rows=(precisions, *body), note=note)


def environments(rows: Sequence[dict[str, Any]]) -> str:
    """Return one line on the hardware, versions and time of a run's sessions of work."""
    if not rows:
        return "no work recorded"
    seconds = sum(float(row.get("seconds", 0)) for row in rows)
    killed = sum("seconds" not in row for row in rows)
    hardware = dict.fromkeys(next((d["name"] for d in row["cuda"]["devices"]), row["cpu"]["model"]) for row in rows)
    time = f"{seconds / 60:.1f} minutes" + (f" and {killed} killed sessions" if killed else "")
    threads = " or ".join(dict.fromkeys(str(row["threads"]["intra_op"]) for row in rows))
    versions = [
        f"{name} {' and '.join(dict.fromkeys(row['versions'][name] for row in rows))}"
        for name in ("torch", "bitquorum")
    ]
    return f"{time} on {' and '.join(hardware)}, {threads} threads, {', '.join(versions)}"


def multiple(theirs: float, ours: float) -> str:
    """Return the ratio in brackets; nothing where a tiny network took no tenth of a second."""
    return f" ({theirs / ours:.1f})" if ours else ""


def percent(row: Mapping[str, Any] | None) -> str:
    """Return a row's accuracy in percent with its interval, where it has one; a dash for no row."""
    if not row or row["value"] is None:
        return "-"
    if "low" not in row:
        return f"{100 * row['value']:.1f}"
    digits = 0 if row["images"] < 1000 else 1  # of the bounds: no more than the interval's width warrants
    return f"{100 * row['value']:.1f} [{100 * row['low']:.{digits}f}, {100 * row['high']:.{digits}f}]"


def points(found: Mapping[str, Any] | None) -> str:
    """Return a difference in points with its interval; a star where it is told from nothing, a dash for none.

    Examples:
        >>> points({"value": 0.05, "low": 0.03, "high": 0.07, "adjusted_p": 0.03})
        '+5.0 [+3.0, +7.0]*'
    """
    if found is None:
        return "-"
    star = "*" if found["adjusted_p"] < 0.05 else ""
    digits = 0 if found["high"] - found["low"] >= 0.05 else 1  # of the bounds: no more than the width warrants
    return f"{100 * found['value']:+.1f} [{100 * found['low']:+.{digits}f}, {100 * found['high']:+.{digits}f}]{star}"
