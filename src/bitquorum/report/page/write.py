"""Write the page of runs, and its plots and their data as files."""

import base64
import gzip
import hashlib
import json
import warnings
from collections.abc import Iterator, Sequence
from functools import cache
from importlib import resources
from importlib.util import find_spec
from pathlib import Path

from bitquorum.files import atomic_write
from bitquorum.interface import InputError, NoEffectWarning
from bitquorum.report.page.collect import RunView, collect
from bitquorum.report.page.figures import Figure, slug
from bitquorum.report.page.look import Look
from bitquorum.report.page.markup import Html, element
from bitquorum.report.page.paper import draw
from bitquorum.report.page.sections import PLOTTED, SECTIONS, Page, Section, failures
from bitquorum.report.page.sheets import csv_text, parquet_bytes
from bitquorum.store import Run

FORMATS = ("png", "svg", "csv", "parquet")

_ASSETS = resources.files("bitquorum.report.page")


def write_page(runs: Sequence[Run], target: Path | str) -> Path:
    """Write one HTML file that shows all that is stored of the runs; it opens without a network.

    Equal stores give equal bytes. The page may load nothing and runs only its own scripts, by its content policy.

    Args:
        runs: Run folders or published runs.
        target: The file.

    Returns:
        The file's path.

    Raises:
        InputError: if there is no run, one is given twice, the target is a folder, or plotly is not installed.
        DataError: if a stored file is corrupt.
    """
    if Path(target).is_dir():
        raise InputError(f"expected a file for the page, got the folder {target}; add a name, such as report.html")
    page = _page(collect(runs))
    sections = [section(page) for section in SECTIONS]
    atomic_write(target, _document(page, sections))
    return Path(target)


def write_figures(runs: Sequence[Run], folder: Path | str, *, formats: Sequence[str] = FORMATS) -> list[Path]:
    """Write every plot of the page as images, with the choices that the page opens with, and all its data.

    Args:
        runs: Run folders or published runs.
        folder: Where the files go; a file is named by its plot.
        formats: Of `png`, `svg`, `csv` and `parquet`. Without `pyarrow`, `parquet` is left out with a warning.

    Returns:
        The files.

    Raises:
        InputError: if a format is unknown, there is no run, one is given twice, or matplotlib is not installed.
        DataError: if a stored file is corrupt.
    """
    unknown = [name for name in formats if name not in FORMATS]
    if unknown:
        raise InputError(f"expected formats among {', '.join(FORMATS)}, got {', '.join(unknown)}")
    wanted = list(dict.fromkeys(formats))
    if "parquet" in wanted and find_spec("pyarrow") is None:
        warnings.warn(
            "no Parquet is written without pyarrow: pip install 'bitquorum[hub]'", NoEffectWarning, stacklevel=2
        )
        wanted.remove("parquet")
    page = _page(collect(runs))
    for section in PLOTTED:
        section(page)
    written = []
    for name, figure in _named(page.figures):
        for ending, content in _files(figure, wanted):
            path = Path(folder) / f"{name}.{ending}"
            atomic_write(path, content)
            written.append(path)
    return written


def _page(views: Sequence[RunView]) -> Page:
    return Page(views=tuple(views), look=Look.of(views))


def _named(figures: Sequence[Figure]) -> Iterator[tuple[str, Figure]]:
    """Yield plots with file names of their own."""
    taken: dict[str, int] = {}
    for figure in figures:
        name = slug(figure.name)
        taken[name] = taken.get(name, 0) + 1
        yield (name if taken[name] == 1 else f"{name}-{taken[name]}"), figure


def _files(figure: Figure, formats: Sequence[str]) -> Iterator[tuple[str, bytes | str]]:
    """Yield the contents of a plot's files by ending."""
    yield from draw(figure, [name for name in formats if name in ("png", "svg")]).items()
    if "csv" in formats:
        yield "csv", csv_text(figure)
    if "parquet" in formats:
        yield "parquet", parquet_bytes(figure)


@cache
def _plotly() -> tuple[str, str]:
    """Return plotly.js, packed, and the hash by which the content policy knows it.

    Raises:
        InputError: if plotly is not installed.
    """
    try:
        source = resources.files("plotly").joinpath("package_data/plotly.min.js").read_text(encoding="utf-8")
    except (ModuleNotFoundError, FileNotFoundError) as error:
        raise InputError("expected plotly for the page, got none; pip install 'bitquorum[report]'") from error
    return _packed(source), _fingerprint(source)


def _document(page: Page, sections: Sequence[Section]) -> str:
    library, known = _plotly()
    script = _ASSETS.joinpath("page.js").read_text(encoding="utf-8")
    style = _ASSETS.joinpath("page.css").read_text(encoding="utf-8")
    data = json.dumps([figure.payload() for figure in page.figures], separators=(",", ":"), allow_nan=False)
    policy = (
        "default-src 'none'; img-src data: blob:; style-src 'unsafe-inline'; "
        f"script-src {_fingerprint(script)} {known}; base-uri 'none'; form-action 'none'"
    )
    names = ", ".join(view.name for view in page.views)
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=policy),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("title", f"bitquorum report: {names}"),
        element("style", Html(style)),
    )
    body = element(
        "body",
        element("a", "To the content", class_="skip", href="#main"),
        element("div", _navigation(page, sections), _main(page, sections), class_="layout"),
        element("script", Html(_packed(data)), type="text/plain", id="figures"),
        element("script", Html(library), type="text/plain", id="plotly"),
        element("script", Html(script)),
    )
    return f"<!doctype html>\n{element('html', head, body, lang='en')}\n"


def _navigation(page: Page, sections: Sequence[Section]) -> Html:
    links = (element("li", element("a", section.short, href=f"#{section.name}")) for section in sections)
    chooser = None
    if len(page.views) > 1:
        options = (element("option", view.name, value=str(number)) for number, view in enumerate(page.views))
        select = element("select", element("option", "all runs", value=""), *options, id="filter")
        chooser = element("label", "Show", select, hidden=True)
    theme = element("button", "Dark theme", type="button", id="theme", hidden=True)
    return element(
        "nav", element("strong", "bitquorum report"), element("ol", *links), chooser, theme, aria_label="Sections"
    )


def _main(page: Page, sections: Sequence[Section]) -> Html:
    runs = (element("li", element("strong", view.name), f": {_contents(view)}") for view in page.views)
    one = len(page.views) == 1
    head = element(
        "header",
        element("h1", page.views[0].name if one else f"Report of {len(page.views)} runs"),
        element(
            "p",
            "Made of stored rows alone. In a plot, drag to zoom, double-click to return, point at a mark for its "
            "numbers, and click a name in the legend to hide it; SVG, PNG and CSV save what is drawn and its data.",
        ),
        element("ul", *runs),
        failures(page.views),
    )
    return element("main", head, *(section.html() for section in sections), id="main")


def _contents(view: RunView) -> str:
    """Return what the store holds of a run, in short."""
    parts = {
        "evaluation": view.evaluations,
        "ladder": view.ladders,
        "plane": view.planes,
        "detection": view.detections,
        "certification": view.certificates,
    }
    found = [f"{len(held)} {name}{'s' if len(held) > 1 else ''}" for name, held in parts.items() if held]
    arms = f"{len(view.arms)} ensemble{'s' if len(view.arms) != 1 else ''}"
    return ", ".join([arms, *found, *(["published, without tensors"] if view.published else [])])


def _packed(text: str) -> str:
    return base64.b64encode(gzip.compress(text.encode(), 9, mtime=0)).decode("ascii")


def _fingerprint(script: str) -> str:
    """Return the hash by which the content policy knows a script."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode('ascii')}'"
