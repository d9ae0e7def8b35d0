"""Describe a plot as a list of rows and how they are drawn, so that page, paper and data cannot disagree.

| made of a `Figure` | by |
|---|---|
| the plot of the page | `payload`, drawn by `page.js` |
| PNG and SVG | `paper.draw` |
| CSV and Parquet | `sheets.csv_text` and `sheets.parquet_bytes` |
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from bitquorum.report.page.collect import Row, distinct

Kind = Literal["lines", "dots", "bars", "steps", "heat"]

# Okabe and Ito's colours for all kinds of colour vision, without yellow, which is too faint on white.
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f5539")
INK = -1  # in place of a colour: that of the text

_DATA = ("x", "x_low", "x_high", "y", "y_low", "y_high", "z", "marker", "label")
_DIGITS = 6  # significant ones that a plot keeps of a value


@dataclass(frozen=True, kw_only=True)
class Style:
    """Say how a series looks; colour, dash and marker count from zero and start again after the last.

    Attributes:
        color: Index into `PALETTE`, or `INK`.
        dash: 0 is solid.
        marker: 0 is a disc.
        hollow: Whether markers are outlines.
        width: Of the line, in pixels.
        mode: What is drawn.
        band: Whether intervals are a band; otherwise bars.
    """

    color: int = INK
    dash: int = 0
    marker: int = 0
    hollow: bool = False
    width: float = 2.0
    mode: Literal["lines", "markers", "lines+markers"] = "lines+markers"
    band: bool = False


@dataclass(frozen=True, kw_only=True)
class Key:
    """Describe an entry of the legend, which shows or hides every series that names it.

    Attributes:
        name: What it reads, and how series name it.
        style: Of its swatch.
        group: Heading that it stands under.
        hidden: Whether its series are hidden at first.
    """

    name: str
    style: Style
    group: str = ""
    hidden: bool = False


@dataclass(frozen=True, kw_only=True)
class Series:
    """Say how a series is drawn and which keys of the legend hide it."""

    style: Style
    keys: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Axis:
    """Describe an axis; `percent` is of fractions, `low` and `high` are its ends where they are fixed."""

    title: str
    percent: bool = False
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, kw_only=True)
class Selector:
    """Let the reader choose which rows are drawn: those with the chosen value in a column, and those with null.

    Attributes:
        column: Of the rows.
        title: Beside the choice.
        default: The first choice; the first one offered where it is `None`.
        every: What the choice of all rows is called, offered first; empty for no such choice.
    """

    column: str
    title: str
    default: str | None = None
    every: str = ""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """Hold a plot as rows.

    A row has the columns `series`, `x` and `y` and, as needed, `panel`, the selectors' columns, `x_low`, `x_high`,
    `y_low`, `y_high` (intervals; of `steps`, the edges of a bin), `z` (the colour of `heat`), `marker` (in place of the
    series' own), `label` (shown on hover), and others, which the data files keep. Rows of a series lie in the order in
    which they are joined.

    Attributes:
        name: File name and identifier.
        title: What is plotted.
        run: Whose data they are; empty for several runs.
        kind: `lines`: curves and points; `dots` and `bars`: categories down, values to the right; `steps`: histograms;
            `heat`: matrices with their values.
        rows: Values of six significant digits.
        x: Axis to the right.
        y: Axis upwards; for `dots`, `bars` and `heat` its categories run down.
        series: How each series is drawn; one that is not named is drawn in `INK`.
        keys: The legend.
        selectors: What the reader chooses.
        x_titles: In place of the title of `x`, by the choice of the first selector.
        ceiling: Highest value of the colour scale, which begins at 0, for `heat`.
    """

    name: str
    title: str
    kind: Kind
    rows: Sequence[Row]
    x: Axis
    y: Axis
    run: str = ""
    series: Mapping[str, Series] = field(default_factory=dict)
    keys: tuple[Key, ...] = ()
    selectors: tuple[Selector, ...] = ()
    x_titles: Mapping[str, str] = field(default_factory=dict)
    ceiling: float = 1.0

    def __post_init__(self) -> None:
        rounded = tuple({key: _round(value) for key, value in row.items()} for row in self.rows)
        object.__setattr__(self, "rows", rounded)

    def full_title(self) -> str:
        """Return the title with the run's name, for where the plot stands alone."""
        return ", ".join(part for part in (self.title, self.run) if part)

    def columns(self) -> list[str]:
        """Return the columns of the data files: those that some row fills, data last."""
        filled = dict.fromkeys(key for row in self.rows for key, value in row.items() if value is not None)
        data = [name for name in _DATA if name in filled and name != "marker"]
        return [*(name for name in filled if name not in _DATA), *data]

    def choices(self, selector: Selector) -> list[str]:
        """Return what a selector offers."""
        return [*([selector.every] if selector.every else []), *distinct(self.rows, selector.column)]

    def default(self) -> dict[str, str]:
        """Return the choice of each selector that the page opens with."""
        chosen = {}
        for selector in self.selectors:
            offered = self.choices(selector)
            chosen[selector.column] = selector.default if selector.default in offered else next(iter(offered), "")
        return chosen

    def chosen(self, choice: Mapping[str, str]) -> list[Row]:
        """Return the rows that a choice shows."""
        every = {selector.column: selector.every for selector in self.selectors}
        wanted = {key: value for key, value in choice.items() if not value or value != every.get(key)}
        return [row for row in self.rows if all(row.get(key) in (None, value) for key, value in wanted.items())]

    def panels(self) -> list[str]:
        """Return the titles of the panels; one without a title where there are none."""
        return distinct(self.rows, "panel") or [""]

    def look(self, series: str) -> Series:
        """Return how a series is drawn."""
        return self.series.get(series, Series(style=Style()))

    def traces(self) -> list[dict[str, Any]]:
        """Return the data of each series, panel and choice, column by column, as the page holds them."""
        chosen_by = [selector.column for selector in self.selectors]
        groups: dict[tuple[Any, ...], list[Row]] = {}
        for row in self.rows:
            key = (row.get("panel", ""), row["series"], *(row.get(column) for column in chosen_by))
            groups.setdefault(key, []).append(row)
        traces = []
        for (panel, series, *choice), rows in groups.items():
            columns = {name: [row.get(name) for row in rows] for name in _DATA}
            data = {name: values for name, values in columns.items() if any(value is not None for value in values)}
            traces.append({"panel": panel, "series": series, "choice": choice, **data})
        return traces

    def payload(self) -> dict[str, Any]:
        """Return all that the page needs to draw the plot, as JSON can hold it."""
        return {
            "name": self.name,
            "title": self.full_title(),
            "kind": self.kind,
            "x": vars(self.x),
            "y": vars(self.y),
            "xTitles": dict(self.x_titles),
            "scale": [0.0, self.ceiling],
            "panels": self.panels(),
            "series": {
                name: {"style": vars(self.look(name).style), "keys": list(self.look(name).keys)}
                for name in distinct(self.rows, "series")
            },
            "keys": [{**vars(key), "style": vars(key.style)} for key in self.keys],
            "selectors": [{**vars(selector), "options": self.choices(selector)} for selector in self.selectors],
            "chosen": list(self.default().values()),
            "traces": self.traces(),
        }


def slug(text: str) -> str:
    """Return text as part of a file name.

    Examples:
        >>> slug("PGD-20 at 5/255 </script>")
        'PGD-20-at-5-255-script'
    """
    return re.sub(r"[^A-Za-z0-9._]+", "-", text).strip("-.") or "unnamed"


def _round(value: Any) -> Any:
    return float(f"{value:.{_DIGITS}g}") if isinstance(value, float) else value
