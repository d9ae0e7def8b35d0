"""Draw a plot for a paper, with matplotlib: equal input gives equal bytes."""

import io
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from textwrap import fill
from typing import TYPE_CHECKING, Any

from bitquorum.interface import InputError
from bitquorum.report.page.collect import Row, distinct, select
from bitquorum.report.page.figures import INK, PALETTE, Axis, Figure, Style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

_DASHES = ("-", "--", ":", "-.", (0, (6, 1, 1, 1, 1, 1)), (0, (9, 2)))
_MARKERS = ("o", "s", "D", "^", "P", "X", "*")
_SETTINGS: Mapping[str, Any] = {
    "svg.hashsalt": "bitquorum",
    "svg.fonttype": "path",
    "text.parse_math": False,  # a dollar in a name is a dollar
    "font.family": "DejaVu Sans",
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.5,
    "axes.axisbelow": True,
    "legend.frameon": False,
}
_COLUMNS = 3
_LINE = 105  # letters across
_DODGE = 0.7  # share of a category's height over which its series are spread


def draw(figure: Figure, formats: Sequence[str]) -> dict[str, bytes]:
    """Return the plot, as the page opens with it, as image files by format.

    Args:
        figure: What is plotted.
        formats: `png` and `svg`.

    Raises:
        InputError: if matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure as Canvas
    except ImportError as error:
        raise InputError("expected matplotlib for PNG and SVG, got none; pip install 'bitquorum[report]'") from error
    files = {}
    settings: dict[Any, Any] = dict(_SETTINGS)
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # a name may hold letters that the font lacks
        canvas = Canvas(layout="constrained")
        _fill(canvas, figure, figure.default())
        for name in formats:
            file = io.BytesIO()
            metadata = {"Date": None} if name == "svg" else {"Software": None}
            canvas.savefig(file, format=name, dpi=200, metadata=metadata)
            files[name] = file.getvalue()
    return files


def _fill(canvas: "Canvas", figure: Figure, choice: Mapping[str, str]) -> None:
    """Lay out the panels, draw them, and set the legend below."""
    hidden = {key.name for key in figure.keys if key.hidden}
    rows = [row for row in figure.chosen(choice) if not hidden.intersection(figure.look(row["series"]).keys)]
    panels = [panel for panel in figure.panels() if not panel or select(rows, panel=panel)] or [""]
    down = -(-len(panels) // _COLUMNS)
    across = -(-len(panels) // down)
    listed = figure.kind in ("dots", "bars")
    height = 0.9 + 0.2 * len(distinct(rows, "y")) if listed else 2.2 if len(panels) > 1 else 3.6
    canvas.set_size_inches(6.6, 1.0 + down * height)
    categories = distinct(rows, "y") if listed else []
    axes = canvas.subplots(down, across, squeeze=False)
    for number, place in enumerate(axes.flat):
        if number >= len(panels):
            place.set_axis_off()
            continue
        panel = panels[number]
        here = [row for row in rows if row.get("panel") in (None, panel)] if panel else rows
        _DRAW[figure.kind](place, figure, here, categories)
        if listed:
            _categories(place, categories, named=number % across == 0)
        place.set_title(panel, fontsize=8)
        title = figure.x_titles.get(next(iter(choice.values()), ""), figure.x.title)
        _label(place, figure.x, title, number // across == down - 1 or number + across >= len(panels), "x")
        _label(place, figure.y, figure.y.title, number % across == 0, "y")
    title = "; ".join([figure.full_title(), *(value for value in choice.values() if value)])
    canvas.suptitle(fill(title, _LINE), fontsize=9)
    _legend(canvas, figure, rows)


def _legend(canvas: "Canvas", figure: Figure, rows: Sequence[Row]) -> None:
    from matplotlib.lines import Line2D

    used = {key for name in distinct(rows, "series") for key in figure.look(name).keys}
    shown = [key for key in figure.keys if key.name in used]
    if figure.kind == "bars":
        shown = [replace(key, style=replace(key.style, marker=1, mode="markers")) for key in shown]
    handles = [Line2D([], [], **_line(key.style), label=key.name) for key in shown]
    if handles:
        columns = _LINE // (10 + max(len(key.name) for key in shown))
        canvas.legend(handles=handles, loc="outside lower center", ncols=max(1, min(5, columns)), fontsize=7)


def _label(place: "Axes", axis: Axis, title: str, shown: bool, side: str) -> None:
    from matplotlib.ticker import PercentFormatter

    if shown:
        place.set(**{f"{side}label": title})
    if axis.percent:
        (place.xaxis if side == "x" else place.yaxis).set_major_formatter(PercentFormatter(1.0, decimals=0))
    if axis.low is not None or axis.high is not None:
        place.set(**{f"{side}lim": (axis.low, axis.high)})


def _lines(place: "Axes", figure: Figure, rows: Sequence[Row], _: Sequence[str]) -> None:
    for name in distinct(rows, "series"):
        style = figure.look(name).style
        here = select(rows, series=name)
        x, y = [float(row["x"]) for row in here], [float(row["y"]) for row in here]
        line = _line(style)
        if distinct(here, "marker"):
            line["marker"] = "none"
        place.plot(x, y, **line)
        for number in distinct(here, "marker"):
            own = select(here, marker=number)
            marks = _line(replace(style, marker=number, mode="markers"))
            place.plot([row["x"] for row in own], [row["y"] for row in own], **marks)
        if style.band and all(row.get("y_low") is not None for row in here):
            low, high = [row["y_low"] for row in here], [row["y_high"] for row in here]
            place.fill_between(x, low, high, color=_color(style), alpha=0.15, linewidth=0)
        else:
            _bars_of_error(place, here, x, y, style)


def _dots(place: "Axes", figure: Figure, rows: Sequence[Row], categories: Sequence[str]) -> None:
    names = distinct(figure.rows, "series")
    for number, name in enumerate(names):
        here = select(rows, series=name)
        offset = _DODGE * ((number + 0.5) / len(names) - 0.5)
        x, y = [float(row["x"]) for row in here], [categories.index(row["y"]) + offset for row in here]
        style = figure.look(name).style
        place.plot(x, y, **_line(style))
        _bars_of_error(place, here, x, y, style)


def _bars(place: "Axes", figure: Figure, rows: Sequence[Row], categories: Sequence[str]) -> None:
    names = distinct(figure.rows, "series")
    height = 0.8 / max(1, len(names))
    for number, name in enumerate(names):
        here = select(rows, series=name)
        y = [categories.index(row["y"]) + height * (number + 0.5) - 0.4 for row in here]
        place.barh(y, [row["x"] for row in here], height=height, color=_color(figure.look(name).style))


def _steps(place: "Axes", figure: Figure, rows: Sequence[Row], _: Sequence[str]) -> None:
    for name in distinct(rows, "series"):
        here, style = select(rows, series=name), figure.look(name).style
        edges = [*(row["x"] for row in here), here[-1]["x_high"]]
        values = [row["y"] for row in here]
        place.stairs(values, edges, fill=True, color=_color(style), alpha=0.15)
        place.stairs(values, edges, color=_color(style), linewidth=1.2, linestyle=_DASHES[style.dash % len(_DASHES)])


def _heat(place: "Axes", figure: Figure, rows: Sequence[Row], _: Sequence[str]) -> None:
    across, down = distinct(rows, "x"), distinct(rows, "y")
    found = {(row["y"], row["x"]): row["z"] for row in rows}
    values = [[found.get((y, x), float("nan")) for x in across] for y in down]
    place.imshow(values, cmap="cividis", vmin=0.0, vmax=figure.ceiling)
    place.grid(visible=False)
    place.set_xticks(range(len(across)), across, rotation=30, ha="right")
    place.set_yticks(range(len(down)), down)
    for i, line in enumerate(values):
        for j, value in enumerate(line):
            bright = value > figure.ceiling / 2
            place.text(j, i, f"{value:.2f}", ha="center", va="center", color="black" if bright else "white")


def _categories(place: "Axes", categories: Sequence[str], *, named: bool) -> None:
    place.set_yticks(range(len(categories)), categories if named else [""] * len(categories))
    place.set_ylim(len(categories) - 0.5, -0.5)
    place.grid(visible=False, axis="y")


def _bars_of_error(place: "Axes", rows: Sequence[Row], x: Sequence[float], y: Sequence[float], style: Style) -> None:
    errors = {side: _reach(rows, side) for side in ("x", "y")}
    if style.mode != "lines" and any(errors.values()):
        place.errorbar(x, y, xerr=errors["x"], yerr=errors["y"], fmt="none", ecolor=_color(style), elinewidth=0.8)


def _reach(rows: Sequence[Row], side: str) -> list[list[float]] | None:
    """Return how far the intervals reach below and above; `None` where no row has one."""
    low, high = f"{side}_low", f"{side}_high"
    if all(row.get(low) is None for row in rows):
        return None
    given = [row if row.get(low) is not None else {low: row[side], high: row[side], side: row[side]} for row in rows]
    return [
        [max(0.0, float(row[side] - row[low])) for row in given],
        [max(0.0, float(row[high] - row[side])) for row in given],
    ]


def _line(style: Style) -> dict[str, Any]:
    return {
        "color": _color(style),
        "linewidth": 0.65 * style.width,
        "linestyle": _DASHES[style.dash % len(_DASHES)] if style.mode != "markers" else "none",
        "marker": _MARKERS[style.marker % len(_MARKERS)] if style.mode != "lines" else "none",
        "markerfacecolor": "none" if style.hollow else _color(style),
        "markersize": 4,
    }


def _color(style: Style) -> str:
    return "#1a1a1a" if style.color == INK else PALETTE[style.color % len(PALETTE)]


_DRAW = {"lines": _lines, "dots": _dots, "bars": _bars, "steps": _steps, "heat": _heat}
