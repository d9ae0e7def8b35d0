"""Lay timings out as a table."""

from collections.abc import Sequence
from typing import Any

from bitquorum.report.tables import Table


def benchmark_table(rows: Sequence[dict[str, Any]]) -> Table:
    """Return a line for each contender: milliseconds, the ratio to the first of its workload, bytes kept.

    Args:
        rows: Of `benchmark.measure`.
    """
    counts = sorted({row["repeats"] for row in rows})
    sizes = {
        "kept": [None if row["kept"] is None else f"{row['kept']:.2f}" for row in rows],
        "peak GiB": [f"{row['peak_bytes'] / 2**30:.2f}" if "peak_bytes" in row else None for row in rows],
    }
    sizes = {name: column for name, column in sizes.items() if any(column)}
    body = [
        (
            row["workload"],
            row["contender"],
            _spread(row["milliseconds"], 1),
            _spread(row["ratio"], 2),
            *(column[index] or "-" for column in sizes.values()),
        )
        for index, row in enumerate(rows)
    ]
    notes = [
        f"Median and quartiles of {' or '.join(map(str, counts))} repetitions, in which all contenders of a workload "
        "are timed in turn. Ratio: to the first of the workload, within a repetition."
    ]
    if "kept" in sizes:
        notes.append("Kept: bytes held for the backward pass, as a multiple of the first's.")
    if "peak GiB" in sizes:
        notes.append("Peak: resident memory of a process of its own.")
    header = ("workload", "contender", "milliseconds", "ratio", *sizes)
    return Table(header=header, rows=tuple(body), note=" ".join(notes))


def _spread(value: dict[str, float], digits: int) -> str:
    return f"{value['median']:.{digits}f} [{value['quartile_1']:.{digits}f}, {value['quartile_3']:.{digits}f}]"
