"""Look into stored runs: the information plane, detectors, the page."""

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from bitquorum.cli.printing import print_table
from bitquorum.cli.shared import RUNS, DataRoot, Device, Queries, Root, app, bars, device_named, out, resumable

EVERYDAY = ("transfer", "noise", "corruption")  # stored, and printed when asked for
Changes = Annotated[
    list[str] | None, typer.Option("--set", help="Change, such as that of the example; may be given more than once.")
]


@app.command()
def plane(
    queries: Queries,
    changes: Changes = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Print transfer, noise and corruptions too, and every correlation.")
    ] = False,
    runs: Root = RUNS,
    data: DataRoot = None,
    device: Device = "auto",
) -> None:
    """Lay evaluated runs into the adversarial information plane: MI between members against accuracy.

    Every attack of the stored evaluation, the worst versions of stored ladders, images made for other arms, random
    corners of the ball and corruptions; no attack runs again. `bitquorum report RUN...` draws the profiles of several
    runs over each other.

    Example: `bitquorum plane digits --set draws=20`.
    """
    from bitquorum import experiment
    from bitquorum.plane import Plane
    from bitquorum.registry import apply_overrides, decode, encode
    from bitquorum.report import correlation_table, plane_table
    from bitquorum.store import Run

    chosen = decode(Plane, apply_overrides(encode(Plane()), changes or []))
    for stored in [Run.find(runs, query) for query in queries]:
        with resumable(stored), bars() as listener:
            complete, rows = experiment.plane_run(
                stored, chosen, device=device_named(device), data_root=data, listener=listener
            )
        found = experiment.correlations_of(stored, complete)
        shown = [row for row in rows if everything or row["kind"] not in EVERYDAY]
        for arm in dict.fromkeys(row["arm"] for row in shown):
            print_table(plane_table(shown, arm))
        print_table(correlation_table([row for row in found if everything or row["threat"] == "pooled"]))
        out.print(f"The run lies in [bold]{escape(str(stored.path))}[/bold]", soft_wrap=True)


@app.command()
def detect(
    queries: Queries,
    changes: Changes = None,
    everything: Annotated[bool, typer.Option("--all", help="Print every attack and epsilon.")] = False,
    runs: Root = RUNS,
    data: DataRoot = None,
    device: Device = "auto",
) -> None:
    """Measure attack detectors on evaluated runs, also against attacks that know them.

    Scores by mutual information and the usual ones are calibrated on clean test images that the evaluation left out.
    Printed: how well the worst attacks are seen, and robust accuracy with rejection, counted both ways.

    Example: `bitquorum detect digits --set aware.steps=50`.
    """
    from bitquorum import experiment
    from bitquorum.detect import Detection
    from bitquorum.registry import apply_overrides, decode, encode
    from bitquorum.report import detection_table, rejection_table
    from bitquorum.store import Run

    chosen = decode(Detection, apply_overrides(encode(Detection()), changes or []))
    for stored in [Run.find(runs, query) for query in queries]:
        with resumable(stored), bars() as listener:
            complete, rows = experiment.detect_run(
                stored, chosen, device=device_named(device), data_root=data, listener=listener
            )
        shown = rows if everything else experiment.last_attack(stored, complete, rows)
        for arm in dict.fromkeys(row["arm"] for row in rows):
            print_table(detection_table(shown, arm))
            print_table(rejection_table(shown, arm))
        out.print(f"The run lies in [bold]{escape(str(stored.path))}[/bold]", soft_wrap=True)


@app.command()
def report(
    queries: Queries,
    target: Annotated[
        Path | None,
        typer.Option("--to", help="File to write; by default report.html in the run, or here for several runs."),
    ] = None,
    figures: Annotated[
        Path | None, typer.Option("--figures", help="Folder for every plot as PNG and SVG, and its data.")
    ] = None,
    runs: Root = RUNS,
) -> None:
    """Write one page about stored runs, side by side: it opens offline and computes nothing.

    Examples: `bitquorum report digits`, `bitquorum report digits cifar10-small --to both.html --figures plots`.
    """
    from bitquorum.report.page import write_figures, write_page
    from bitquorum.store import Run

    stored = [Run.find(runs, query) for query in queries]
    place = target or (stored[0].path / "report.html" if len(stored) == 1 else Path("report.html"))
    written = write_page(stored, place)
    out.print(f"The page lies in [bold]{escape(str(written))}[/bold]", soft_wrap=True)
    if figures:
        files = write_figures(stored, figures)
        out.print(f"{len(files)} files of figures lie in [bold]{escape(str(figures))}[/bold]", soft_wrap=True)
