"""Show the training, example images, and the record of the run: costs, environment, config and what is ours."""

from collections.abc import Sequence
from typing import Any

from bitquorum.interface import DataError
from bitquorum.registry import to_toml
from bitquorum.report.page import curves
from bitquorum.report.page.collect import Row, RunView, distinct, select
from bitquorum.report.page.examples import Example, ExampleSet, Votes, example_sets
from bitquorum.report.page.markup import Html, element, grid, join
from bitquorum.report.page.sections.frame import Page, Section, folded, missing, note
from bitquorum.report.tables import environments

_MOST = 3  # classes that a member's votes list


def training(page: Page) -> Section:
    """Return the training curves."""
    return Section(
        name="training",
        short="Training",
        title="Training",
        lead="The loss, each term of the objective before its weight, and the learning rate, against the step, as "
        "logged on training batches; MI terms are in bits. Terms that an ensemble does not have are missing there.",
        body=page.per_run(lambda view: _training(page, view)),
    )


def examples(page: Page) -> Section:
    """Return example images with what a threat did to them."""
    return Section(
        name="examples",
        short="Examples",
        title="Example images",
        lead="The first images of the test set's order, chosen by nothing: clean, under threat, and their difference, "
        "magnified around grey. Below them how often each member votes for which class over fresh draws; ✓ marks the "
        "right class.",
        body=page.per_run(_examples),
    )


def costs(page: Page) -> Section:
    """Return what was spent where, on what, and the config that repeats it."""
    return Section(
        name="costs",
        short="Costs",
        title="Costs and environment",
        lead="Every session of work on a run as the store noted it, the passes of each attack, and the config that "
        "repeats it. The same config gives the same bits on the same machine, versions and number of threads.",
        body=page.per_run(_costs),
    )


def about(page: Page) -> Section:
    """Return what is known of the method and what is ours."""
    return Section(
        name="about",
        short="What is ours",
        title="What is known and what is ours",
        lead="The method follows Farkya, Raghavan and Ziskind, 2023, arXiv 2312.00105, of which only the abstract and "
        "the opening of the patent application are public to us.",
        body=element(
            "p",
            "Our reconstruction or extension are: the noise law, the bits, the variables and estimators of mutual "
            "information, the input-gradient term, the ladder, the detectors' statistics and the plane with its "
            "reference. No number on this page is one of the publication, and none reproduces one. This page is made "
            "of stored rows alone; it computed no attack.",
        ),
    )


def _training(page: Page, view: RunView) -> Html:
    plot = page.plot(curves.training(view, page.look), "Click a name below to hide it.")
    return plot or missing(view, "training")


def _examples(view: RunView) -> Html:
    if view.published and view.planes:
        text = "This is a published run: its tensors, and with them the images, were left out."
        return element("p", text, class_="missing")
    if not view.planes:
        return missing(view, "plane, which keeps images,", "bitquorum plane")
    sets = example_sets(view, view.planes[0])
    if not sets:
        return missing(view, "image of the plane", "bitquorum plane")
    return join(_example_set(found, opened=found is sets[-1]) for found in sets)


def _example_set(found: ExampleSet, opened: bool) -> Html:
    text = (
        f"Largest change {found.largest:.3f} of the range [0, 1], that is {255 * found.largest:.1f}/255; differences "
        f"× {found.factor}; votes over {found.draws} draws."
    )
    cards = (_card(example, found.factor) for example in found.examples)
    return folded(
        f"{found.arm} under {found.threat}", note(text), element("div", *cards, class_="cards"), opened=opened
    )


def _card(example: Example, factor: int) -> Html:
    shown = (
        (example.clean, "clean"),
        (example.attacked, "under threat"),
        (example.difference, f"diff. × {factor}"),
    )
    images = (
        element(
            "figure",
            element("img", src=source, alt=f"{what} image of class {example.label}", loading="lazy"),
            element("figcaption", what),
        )
        for source, what in shown
    )
    body = (
        element("tr", element("th", str(number), scope="row"), _votes(clean, example), _votes(attacked, example))
        for number, (clean, attacked) in enumerate(zip(example.votes, example.attacked_votes, strict=True), start=1)
    )
    head = (element("th", name, scope="col", class_="text") for name in ("no.", "votes, clean", "votes, under threat"))
    table = element(
        "table",
        element("caption", f"Right class: {example.label}"),
        element("thead", element("tr", *head)),
        element("tbody", *body),
    )
    return element("div", element("div", *images, class_="strip"), table, class_="card")


def _votes(votes: Votes, example: Example) -> Html:
    """Return the classes that a member votes for, with bars as long as their shares."""
    bars = (
        element(
            "span",
            f"{name}{' ✓' if name == example.label else ''}: {100 * part:.0f} %",
            class_="vote right" if name == example.label else "vote",
            style=f"--share:{100 * part:.1f}%",
        )
        for name, part in votes[:_MOST]
    )
    rest = len(votes) - _MOST
    return element("td", *bars, element("span", f"and {rest} more", class_="rest") if rest > 0 else None, class_="text")


def _costs(view: RunView) -> Html:
    try:
        config = to_toml(view.config)
    except (DataError, ValueError, TypeError):
        config = "the stored config cannot be written again"
    return join(
        [
            _sessions(view),
            _passes(view),
            folded("config.toml", element("pre", config, tabindex="0")),
        ]
    )


def _sessions(view: RunView) -> Html:
    if not view.environments:
        return missing(view, "session of work")
    header = ("work", "ended", "seconds", "threads", "hardware", "python", "torch", "bitquorum", "revision")
    body = [_session(row) for row in view.environments]
    table = grid(header, body, f"Sessions of work, {view.name}", texts=(0, 1, 4, 5, 6, 7, 8))
    total = environments([dict(row) for row in view.environments if _complete(row)])
    words = (
        f"In all {total}. Seconds of the wall clock. Revision: of the folder where the work was begun; that of the "
        "program's own folder, where git tracks it, stands beside its version. One with * had uncommitted changes."
    )
    return join([table, note(words)])


def _session(row: Row) -> tuple[str, ...]:
    versions, program = _inner(row, "versions"), _revision(_inner(row, "program"))
    seconds = f"{row['seconds']:,.1f}" if "seconds" in row else "–"
    threads = str(_inner(row, "threads").get("intra_op", "–"))
    python, torch, version = (str(versions.get(name, "–")) for name in ("python", "torch", "bitquorum"))
    return (
        str(row.get("work", "–")),
        str(row.get("ended", "killed")),
        seconds,
        threads,
        _hardware(row),
        python,
        torch,
        f"{version} at {program}" if program else version,
        _revision(_inner(row, "git")) or "–",
    )


def _revision(git: Row) -> str:
    return str(git.get("revision") or "")[:12] + ("*" if git.get("dirty") else "")


def _hardware(row: Row) -> str:
    devices = _inner(row, "cuda").get("devices") or []
    processor = _inner(row, "cpu")
    names = [str(device.get("name")) for device in devices if isinstance(device, dict)]
    return ", ".join([*names, f"{processor.get('model', 'unknown')}, {processor.get('cores', '?')} cores"])


def _passes(view: RunView) -> Html | None:
    """Return the passes of each attack of the first evaluation, and the seconds of each ladder."""
    parts: list[Html | None] = []
    for part in view.evaluations[:1]:
        names = [name for name in distinct(part.rows, "attack") if name not in ("clean", "worst")]
        body = []
        for name in names:
            rows = select(part.rows, attack=name)
            spent = [f"{_most(rows, column):,}" for column in ("forward", "backward")]
            body.append((name, *spent, f"{255 * _most(rows, 'largest_perturbation'):.2f}/255"))
        header = ("attack", "forward passes", "backward passes", "largest perturbation found")
        parts.append(grid(header, body, "Passes of each image and attack, the most over ensembles and radii"))
    for part in view.ladders:
        spent = {
            arm: sum(row["seconds"] for row in select(part.sheet("seconds"), arm=arm) if "rung" in row)
            for arm in distinct(part.sheet("seconds"), "arm")
        }
        body = [(arm, f"{seconds:,.1f}") for arm, seconds in spent.items()]
        parts.append(grid(("ensemble", "seconds"), body, f"Time on the rungs of ladder {part.label}") if body else None)
    return join(parts)


def _most(rows: Sequence[Row], column: str) -> Any:
    return max((row.get(column) or 0 for row in rows), default=0)


def _inner(row: Row, name: str) -> dict[str, Any]:
    """Return a table inside a row; empty where it is missing."""
    value = row.get(name)
    return value if isinstance(value, dict) else {}


def _complete(row: Row) -> bool:
    """Return whether a session has all that a line on it needs."""
    return all(isinstance(row.get(name), dict) for name in ("versions", "cpu", "cuda", "threads"))
