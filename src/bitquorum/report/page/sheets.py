"""Write the rows of a plot as CSV and Parquet."""

import csv
import io
from typing import Any

from bitquorum.interface import InputError
from bitquorum.report.page.figures import Figure


def csv_text(figure: Figure) -> str:
    """Return the rows of a plot as CSV, an empty cell for null."""
    file = io.StringIO()
    columns = figure.columns()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([row.get(column) for column in columns] for row in figure.rows)
    return file.getvalue()


def parquet_bytes(figure: Figure) -> bytes:
    """Return the rows of a plot as Parquet.

    Raises:
        InputError: if `pyarrow` is not installed.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise InputError("expected pyarrow for Parquet, got none; pip install 'bitquorum[hub]'") from error
    columns = {name: _uniform([row.get(name) for row in figure.rows]) for name in figure.columns()}
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue().to_pybytes()


def _uniform(values: list[Any]) -> list[Any]:
    """Return values of one type: numbers as they are where all are numbers, else text."""
    given = [value for value in values if value is not None]
    if all(isinstance(value, bool) for value in given) or all(isinstance(value, str) for value in given):
        return values
    if all(isinstance(value, int | float) for value in given):
        whole = all(isinstance(value, int) for value in given)
        return values if whole else [None if value is None else float(value) for value in values]
    return [None if value is None else str(value) for value in values]
