"""Frame a section of the page: a heading, what it shows, and a block for each run."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bitquorum.report.page.collect import Row, RunView, distinct
from bitquorum.report.page.figures import Figure
from bitquorum.report.page.look import Look
from bitquorum.report.page.markup import Html, element, join

_HEIGHTS = {"lines": 400, "steps": 400, "dots": 300, "bars": 420, "heat": 320}


@dataclass(frozen=True, kw_only=True)
class Section:
    """Hold a section: identifier, name in the navigation, title, some sentences on how to read it, and what follows."""

    name: str
    short: str
    title: str
    lead: str
    body: Html

    def html(self) -> Html:
        """Return the section as HTML."""
        head = element("h2", self.title, id=f"{self.name}-title")
        lead = element("p", self.lead, class_="lead")
        return element("section", head, lead, self.body, id=self.name, aria_labelledby=f"{self.name}-title")


@dataclass(frozen=True, kw_only=True)
class Page:
    """Hold the runs of a page and gather the plots that its sections show."""

    views: tuple[RunView, ...]
    look: Look
    figures: list[Figure] = field(default_factory=list)

    def plot(self, figure: Figure | None, note: str | None = None) -> Html | None:
        """Keep a plot for the page's data and return the place where it is drawn; `None` for no plot."""
        if figure is None:
            return None
        self.figures.append(figure)
        return element(
            "figure",
            element("figcaption", element("strong", figure.title), element("span", note) if note else None),
            element("div", class_="files"),
            element("div", class_="controls"),
            element(
                "div",
                element("p", "The plot is drawn by a script; the tables hold the main numbers.", class_="fallback"),
                class_="canvas",
                role="img",
                aria_label=figure.full_title(),
                style=f"min-height:{_HEIGHTS[figure.kind]}px",
            ),
            element("div", class_="legend"),
            class_="plot",
            data_figure=str(len(self.figures) - 1),
        )

    def per_run(self, build: Callable[[RunView], Html]) -> Html:
        """Return a block for each run, headed by its name."""
        blocks = (
            element("div", element("h3", view.name), build(view), class_="run", data_run=str(number))
            for number, view in enumerate(self.views)
        )
        return join(blocks)


def missing(view: RunView, what: str, command: str = "") -> Html:
    """Return what stands in place of a part that the store does not hold, with the command that makes it."""
    advice = ["; ", element("code", f"{command} {view.command}"), " makes it"] if command else []
    return element("p", f"No {what} is stored for this run", *advice, ".", class_="missing")


def note(text: str) -> Html:
    """Return a remark below a table or plot."""
    return element("p", text, class_="note")


def folded(title: str, *children: str | None, opened: bool = False) -> Html:
    """Return content that a click unfolds."""
    return element("details", element("summary", title), *children, open=opened)


def pair(*children: Html | None) -> Html | None:
    """Return blocks side by side where there is room for two."""
    given = [child for child in children if child is not None]
    return element("div", *given, class_="pair") if given else None


def counts(rows: Iterable[Row]) -> str:
    """Return on how many images and draws rows rest.

    Examples:
        >>> counts([{"images": 500, "draws": 50}, {"images": 200, "draws": 50}])
        '200 or 500 test images and 50 fresh draws'
    """
    rows = list(rows)
    images, draws = sorted(distinct(rows, "images")), sorted(distinct(rows, "draws"))
    return f"{' or '.join(map(str, images))} test images and {' or '.join(map(str, draws))} fresh draws"


def share(row: Mapping[str, Any], name: str) -> str:
    """Return a share in percent with its interval; a dash for null.

    Examples:
        >>> share({"tpr5": 0.5, "tpr5_low": 0.456, "tpr5_high": 0.544}, "tpr5")
        '50.0 [46, 54]'
    """
    value, low, high = (row.get(f"{name}{end}") for end in ("", "_low", "_high"))
    if value is None:
        return "–"
    interval = f" [{100 * low:.0f}, {100 * high:.0f}]" if low is not None and high is not None else ""
    return f"{100 * value:.1f}{interval}"


def number(row: Mapping[str, Any], name: str, digits: int = 2) -> str:
    """Return a number with its interval; a dash for null.

    Examples:
        >>> number({"pair_mi": 1.256, "pair_mi_low": 1.2, "pair_mi_high": 1.3}, "pair_mi"), number({}, "auroc")
        ('1.26 [1.20, 1.30]', '–')
    """
    value, low, high = (row.get(f"{name}{end}") for end in ("", "_low", "_high"))
    if value is None:
        return "–"
    interval = f" [{low:.{digits}f}, {high:.{digits}f}]" if low is not None and high is not None else ""
    return f"{value:.{digits}f}{interval}"


def verdict(passed: bool | None) -> Html:
    """Return a verdict as sign, word and colour; without one for a check that could not be posed."""
    if passed is None:
        return element("span", "not posed")
    sign = "✓ passed" if passed else "✗ FAILED"
    return element("span", sign, class_="passed" if passed else "failed")


def listing(items: Sequence[str]) -> str:
    """Return items as a phrase.

    Examples:
        >>> listing(["a", "b", "c"])
        'a, b and c'
    """
    return " and ".join(part for part in (", ".join(items[:-1]), *items[-1:]) if part)
