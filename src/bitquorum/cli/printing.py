"""Print tables, verdicts and warnings."""

import os
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable
from rich.text import Text

from bitquorum.cli.shared import err, out

if TYPE_CHECKING:
    from bitquorum.evaluate import Ladder
    from bitquorum.report import Table
    from bitquorum.store import Run

_WIDEST = 1000  # characters
_COLOURS = {"passed": "green", "FAILED": "bold red"}


def print_verdicts(rows: list[dict[str, Any]]) -> int:
    """Print the verdicts of the self-checks, failed ones in red, and return how many failed."""
    from bitquorum.report import verdicts

    if rows:
        print_table(verdicts(rows))
    return sum(row["passed"] is False for row in rows)


def ladder_tables(stored: "Run", ladder: "Ladder") -> list["Table"]:
    """Return the bracket of a stored ladder and, where peers were asked, what each took; none before it was climbed."""
    from bitquorum.experiment import ladder_rows, ladder_times
    from bitquorum.report import bracket, ladder_seconds

    rows = ladder_rows(stored, ladder)
    times = ladder_seconds(rows + ladder_times(stored, ladder))
    return [table for table in (bracket(rows), times) if table] if rows else []


def run_tables(stored: "Run") -> list["Table"]:
    """Return all that attacks and certificates have left of a run, without computing; nothing before an attack."""
    from bitquorum.experiment import ceilings, certificates, differences, ladders, results, verdicts
    from bitquorum.report import certificate_table, comparison, difference_table
    from bitquorum.report import verdicts as verdict_table

    tables = [comparison(rows)] if (rows := results(stored)) else []
    for ladder in ladders(stored):
        tables += ladder_tables(stored, ladder)
        tables += [verdict_table(rows)] if (rows := verdicts(stored, ladder)) else []
    tables += [difference_table(rows).narrow() for rows in differences(stored)]
    return tables + [certificate_table(rows, ceilings(stored)) for _, rows in certificates(stored)]


def show_run(stored: "Run") -> None:
    """Print the tables of a run, what it was computed on, and where it lies."""
    from bitquorum.experiment import results
    from bitquorum.report import environments

    if not results(stored):
        out.print("Not evaluated yet: the same `bitquorum run` command resumes it.")
    for table in run_tables(stored):
        print_table(table)
    out.print(f"Computed in {escape(environments(stored.environments()))}.")
    out.print(f"The run lies in [bold]{escape(str(stored.path))}[/bold]", soft_wrap=True)


def print_table(table: "Table") -> None:
    """Print a table with its note; a line parts rows that differ in the first column."""
    rows = [tuple(cell.replace(", ", ",\u00a0") for cell in row) for row in table.rows]  # an interval stays whole
    print_rows(table.header, rows, group=0)
    if table.note:
        failed = any("FAILED" in row for row in table.rows)
        out.print(escape(table.note), style="bold red" if failed else "dim")


def print_rows(header: tuple[str, ...], rows: Any, *, group: int | None = None) -> None:
    """Print a table; with `group`, a line parts rows that differ in that column."""
    table = RichTable()
    for name in header:
        table.add_column(
            escape(name), overflow="fold", no_wrap=name in ("attack", "exhibit", "threat", "arm", "defence")
        )
    previous = None
    for row in rows:
        if group is not None and previous is not None and row[group] != previous:
            table.add_section()
        previous = row[group] if group is not None else None
        table.add_row(*(Text(str(cell), style=_COLOURS.get(str(cell), "")) for cell in row))
    _print_whole(table)


def _print_whole(table: RichTable) -> None:
    """Print a table as wide as its terminal and, into a file or a pipe, which have no width, as wide as it is."""
    bounded = out.is_terminal or "COLUMNS" in os.environ
    (out if bounded else Console(width=_WIDEST)).print(table)


def print_warning(message: Any, category: type[Warning], *_: Any, **__: Any) -> None:
    """Print a warning on one line."""
    err.print(f"[yellow]warning:[/yellow] {escape(str(message))} ({category.__name__})", soft_wrap=True)
