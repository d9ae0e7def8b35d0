"""Attack trained runs and broken defences."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from bitquorum.cli.printing import ladder_tables, print_table, print_verdicts
from bitquorum.cli.shared import RUNS, DataRoot, Device, Query, Root, app, bars, device_named, number, out, resumable

if TYPE_CHECKING:
    from bitquorum.store import Run


@app.command()
def evaluate(
    query: Query,
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Changes to the stored evaluation, such as `examples=500 draws=50`.")
    ] = None,
    ladder: Annotated[
        str | None, typer.Option("--ladder", help="Climb the evaluation ladder instead: quick, standard or full.")
    ] = None,
    epsilon: Annotated[
        list[str] | None,
        typer.Option("--epsilon", help="Radius for the ladder, such as 5/255; may be given more than once."),
    ] = None,
    arm: Annotated[
        list[str] | None, typer.Option("--arm", help="Climb with this arm only; may be given more than once.")
    ] = None,
    also: Annotated[
        list[str] | None,
        typer.Option("--also", help="Add the second opinion of an installed peer, such as autoattack-rand."),
    ] = None,
    runs: Root = RUNS,
    data: DataRoot = None,
    device: Device = "auto",
) -> None:
    """Attack a trained run, with its own evaluation, a changed one, or the ladder; each is stored apart.

    Examples: `bitquorum evaluate digits 'attacks=[{type="pgd", steps=100, restarts=5, eot=20}]' examples=100`,
    `bitquorum evaluate digits --ladder standard --epsilon 32/255 examples=200`. With the ladder the exit code is 3
    where a self-check fails.
    """
    from bitquorum import experiment
    from bitquorum.evaluate import Evaluation
    from bitquorum.interface import ConfigError
    from bitquorum.registry import apply_overrides, decode, encode
    from bitquorum.report import comparison
    from bitquorum.store import Run

    stored = Run.find(runs, query)
    if ladder is not None:
        _climb(stored, ladder, overrides or [], epsilon or [], arm or [], also or [], data, device_named(device))
        return
    if given := [name for name, value in (("--epsilon", epsilon), ("--arm", arm), ("--also", also)) if value]:
        raise ConfigError(
            f"expected --ladder beside {given[0]}, got none; without it write 'epsilons=[\"8/255\"]' or attacks=[...]"
        )
    table = encode(experiment.experiment_of(stored).evaluation)
    chosen = decode(Evaluation, apply_overrides(table, overrides or []))
    with resumable(stored), bars() as listener:
        rows = experiment.evaluate(stored, chosen, device=device_named(device), data_root=data, listener=listener)
    print_table(comparison(rows))


@app.command()
def museum(
    exhibits: Annotated[list[str] | None, typer.Argument(help="Names of exhibits; all of them by default.")] = None,
    images: Annotated[int, typer.Option(help="Number of test images, balanced over classes.")] = 200,
    ladder: Annotated[str, typer.Option(help="quick, standard or full.")] = "standard",
    also: Annotated[
        list[str] | None,
        typer.Option("--also", help="Let an installed peer, such as autoattack-rand, judge the same exhibits."),
    ] = None,
    runs: Root = RUNS,
) -> None:
    """Climb the ladder with broken defences whose undefended twins are known: a benchmark of evaluations.

    The exit code is 3 where the ladder leaves an exhibit more than two points above its twin.

    Example: `bitquorum museum crossmax thermometer-code --also autoattack-standard`.
    """
    from bitquorum.museum import NAMES, Museum, visit
    from bitquorum.registry import encode
    from bitquorum.report import museum_table, peer_seconds, peer_table
    from bitquorum.store import Run

    chosen = Museum(exhibits=tuple(exhibits or NAMES), images=images, ladder=ladder, also=tuple(also or ()))
    with resumable(Run.create(runs, "museum", encode(chosen))), bars() as listener:
        stored, rows = visit(chosen, runs, listener=listener)
    table = museum_table(rows)
    for shown in (table, peer_table(rows), peer_seconds(rows)):
        if shown:
            print_table(shown)
    out.print(f"The run lies in [bold]{escape(str(stored.path))}[/bold]", soft_wrap=True)
    if any("NOT reached" in row for row in table.rows):
        sys.exit(3)


def _climb(
    stored: "Run",
    name: str,
    overrides: list[str],
    epsilons: list[str],
    arms: list[str],
    also: list[str],
    data: Path | None,
    device: str,
) -> None:
    """Climb the ladder, print rungs, bracket and verdicts, and end with code 3 if a self-check fails."""
    from bitquorum import experiment
    from bitquorum.evaluate import ladder_named
    from bitquorum.registry import apply_overrides, decode, encode
    from bitquorum.report import rungs

    chosen = ladder_named(name)
    given = [number(epsilon) for epsilon in epsilons]
    table = encode(chosen) | {"epsilons": given or experiment.usual_epsilons(stored)}
    chosen = decode(type(chosen), apply_overrides(table, overrides)).on(device)
    with resumable(stored), bars() as listener:
        rows = experiment.climb_run(
            stored, chosen, arms=arms, also=also, device=device, data_root=data, listener=listener
        )
    for label, radius in dict.fromkeys((row["arm"], row["epsilon"]) for row in rows if row["name"] == "left"):
        print_table(rungs(rows, label, radius))
    for result in ladder_tables(stored, chosen):
        print_table(result)
    failed = print_verdicts(experiment.verdicts(stored, chosen))
    out.print(f"The run lies in [bold]{escape(str(stored.path))}[/bold]", soft_wrap=True)
    if failed:
        sys.exit(3)
