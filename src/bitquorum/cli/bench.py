"""Compare defences."""

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from bitquorum.cli.printing import print_table
from bitquorum.cli.shared import RUNS, DataRoot, Device, Overrides, Root, app, bars, device_named, out, resumable


@app.command()
def bench(
    suite: Annotated[str, typer.Argument(help="Name of a suite (`bitquorum list --suites`) or path of a TOML file.")],
    overrides: Overrides = None,
    only: Annotated[
        list[str] | None, typer.Option("--only", help="Compute this row only; may be given more than once.")
    ] = None,
    known: Annotated[
        list[Path] | None,
        typer.Option("--known", help="Take rows of a published suite, such as results/bench-digits, where they fit."),
    ] = None,
    jobs: Annotated[int, typer.Option(help="Number of processes on this machine.")] = 1,
    cluster: Annotated[
        str | None,
        typer.Option(help="Address of a Ray cluster, or `local` to start one here; needs the extra [cluster]."),
    ] = None,
    runs: Root = RUNS,
    data: DataRoot = None,
    device: Device = "auto",
) -> None:
    """Train and attack a suite of defences under one ladder, and print one table.

    Every defence gets the same network, data, augmentation, epochs and seeds. What is computed is cached by the hash of
    its config: the same command again computes what is missing and prints the table, which lies beside the run as
    Markdown, CSV and HTML too.

    Examples: `bitquorum bench digits`, `bitquorum bench cifar10-small --only empir --only sq-mi --jobs 2`.
    """
    from bitquorum.bench import Place, read_suite
    from bitquorum.bench import bench as compare
    from bitquorum.registry import encode
    from bitquorum.report import bench_tables
    from bitquorum.store import Run

    chosen = read_suite(suite, overrides or [])
    stored = Run.create(runs, f"bench-{chosen.name}", encode(chosen))
    with resumable(stored), bars() as listener:
        place = Place(root=runs, device=device_named(device), data_root=data, listener=listener)
        stored, rows = compare(chosen, place, only=only or (), known=known or (), jobs=jobs, cluster=cluster)
    for table in bench_tables(rows):
        print_table(table)
    out.print(f"The run lies in [bold]{escape(str(stored.path))}[/bold]", soft_wrap=True)
