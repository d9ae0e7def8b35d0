"""Certify trained runs."""

from typing import Annotated

import typer
from rich.markup import escape

from bitquorum.cli.insight import Changes
from bitquorum.cli.printing import print_table
from bitquorum.cli.shared import (
    RUNS,
    DataRoot,
    Device,
    Queries,
    Root,
    app,
    bars,
    device_named,
    number,
    out,
    resumable,
)


@app.command()
def certify(
    queries: Queries,
    changes: Changes = None,
    epsilons: Annotated[
        list[str] | None,
        typer.Option("--epsilon", help="Radius such as `2/255`; by default those at which the run was attacked."),
    ] = None,
    runs: Root = RUNS,
    data: DataRoot = None,
    device: Device = "auto",
) -> None:
    """Certify trained runs: a floor of their accuracy that no attack can break, beside what attacks left.

    Bounds are propagated through every quantizer, for every draw and for fresh draws; see docs/certify.md.

    Example: `bitquorum certify digits --epsilon 1/255 --set draws=3`.
    """
    from bitquorum import experiment
    from bitquorum.certify import Certify
    from bitquorum.registry import apply_overrides, decode, encode
    from bitquorum.report import certificate_table
    from bitquorum.store import Run

    for stored in [Run.find(runs, query) for query in queries]:
        given = [number(epsilon) for epsilon in epsilons or []]
        table = encode(Certify()) | {"epsilons": given or experiment.attacked_epsilons(stored)}
        chosen = decode(Certify, apply_overrides(table, changes or []))
        with resumable(stored), bars() as listener:
            rows = experiment.certify_run(
                stored, chosen, device=device_named(device), data_root=data, listener=listener
            )
        print_table(certificate_table(rows, experiment.ceilings(stored)))
        out.print(f"The run lies in [bold]{escape(str(stored.path))}[/bold]", soft_wrap=True)
