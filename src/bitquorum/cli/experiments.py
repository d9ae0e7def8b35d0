"""Run, train, compare, show, list and publish experiments."""

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from bitquorum.cli.printing import print_rows, print_table, run_tables, show_run
from bitquorum.cli.shared import (
    RUNS,
    DataRoot,
    Device,
    Overrides,
    Query,
    Root,
    Source,
    app,
    bars,
    device_named,
    out,
    processes,
    resumable,
    speaks,
)


@app.command()
def run(
    source: Source, overrides: Overrides = None, runs: Root = RUNS, data: DataRoot = None, device: Device = "auto"
) -> None:
    """Train and attack every arm of an experiment, store all of it, and print the table.

    The run is a folder named by the digest of its config. The same command again resumes it where it was
    interrupted, or just prints the table when it is complete.

    Examples: `bitquorum run digits`, `bitquorum run cifar10-small evaluation.examples=200`.
    """
    from bitquorum import experiment
    from bitquorum.config import read

    chosen, place = read(source, overrides or []), device_named(device)
    stored = experiment.create(chosen, runs)
    with resumable(stored), processes(place), bars() as listener:
        experiment.run(chosen, runs, device=place, data_root=data, listener=listener)
    if speaks():
        show_run(stored)


@app.command()
def train(
    source: Source,
    overrides: Overrides = None,
    arm: Annotated[list[str] | None, typer.Option("--arm", help="Train this arm only; may be given again.")] = None,
    runs: Root = RUNS,
    data: DataRoot = None,
    device: Device = "auto",
) -> None:
    """Train every arm of an experiment without attacking it.

    On several devices or processes: `torchrun --nproc-per-node 2 -m bitquorum train PRESET`. On several machines: an
    arm each by `--arm`, then the folders of the arms together. Then attack with `bitquorum evaluate RUN`, or finish
    with `bitquorum run` and the same arguments.
    """
    from bitquorum import experiment
    from bitquorum.config import read

    chosen, place = read(source, overrides or []), device_named(device)
    stored = experiment.create(chosen, runs)
    with resumable(stored), processes(place), bars() as listener:
        experiment.train(chosen, runs, arms=arm or (), device=place, data_root=data, listener=listener)
    if speaks():
        out.print(f"Trained; the run lies in [bold]{escape(str(stored.path))}[/bold]", soft_wrap=True)


@app.command()
def compare(
    query: Query,
    reference: Annotated[
        str | None, typer.Option("--to", help="Arm that the others are compared to; the first one by default.")
    ] = None,
    other: Annotated[
        str | None,
        typer.Option(
            "--of", help="Run that this arm is of, or the folder that it was published to; the same run by default."
        ),
    ] = None,
    runs: Root = RUNS,
) -> None:
    """Compare the arms of an attacked run image by image: differences of accuracies, with intervals.

    Arms of one run meet the same images, and so do those of two runs that were attacked with the same settings: paired
    differences tell far smaller gains from nothing than the intervals of the arms do. They are stored beside each
    evaluation and each ladder.

    Examples: `bitquorum compare digits --to low-bit`, `bitquorum compare mine --to low-bit --of digits`.
    """
    from bitquorum.experiment import compare_run
    from bitquorum.report import difference_table
    from bitquorum.store import Run

    stored = Run.find(runs, query)
    beside = Run.find(runs, other) if other else None
    for rows in compare_run(stored, reference=reference, other=beside):
        print_table(difference_table(rows).narrow())
    out.print(f"The run lies in [bold]{escape(str(stored.path))}[/bold]", soft_wrap=True)


@app.command()
def show(
    query: Query,
    runs: Root = RUNS,
    config: Annotated[bool, typer.Option("--config", help="Print the config instead, as TOML.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the tables and their notes as Markdown.")] = False,
) -> None:
    """Print the stored table of a run, without computing anything."""
    from bitquorum.bench import is_bench, summary
    from bitquorum.museum import is_museum, museum_rows
    from bitquorum.report import bench_table, bench_tables, museum_table, peer_seconds, peer_table
    from bitquorum.store import Run

    stored = Run.find(runs, query)
    if config:
        stored.config()  # refuses what is no TOML
        print((stored.path / "config.toml").read_text(encoding="utf-8"), end="")
        return
    if is_museum(stored):
        rows = museum_rows(stored)
        found = (museum_table(rows), peer_table(rows), peer_seconds(rows)) if rows else ()
        tables = [table for table in found if table]
    elif is_bench(stored):
        tables = [bench_table(summary(stored))] if markdown else list(bench_tables(summary(stored)))
    else:
        tables = run_tables(stored) if markdown else []
    if markdown and tables:
        print("\n\n".join(part for table in tables for part in (table.markdown(), table.note) if part))
    elif is_museum(stored) or is_bench(stored):
        for table in tables:
            print_table(table)
        out.print(f"The run lies in [bold]{escape(str(stored.path))}[/bold]", soft_wrap=True)
    else:
        show_run(stored)


@app.command("list")
def list_(
    runs: Root = RUNS,
    presets: Annotated[bool, typer.Option("--presets", help="List the presets instead of the runs.")] = False,
    suites: Annotated[bool, typer.Option("--suites", help="List the suites of `bitquorum bench` instead.")] = False,
) -> None:
    """List the stored runs, the presets or the suites."""
    if presets or suites:
        from bitquorum.config import presets as known

        kind = "suite" if suites else "preset"
        purposes = [(name, text.splitlines()[0].lstrip("# ")) for name, text in known(kind).items()]
        print_rows((kind, "what it is"), purposes)
        return
    from bitquorum.bench import is_bench, stored_suite, summary
    from bitquorum.experiment import experiment_of, progress_of
    from bitquorum.interface import BitquorumError
    from bitquorum.museum import is_museum
    from bitquorum.store import Run

    stored = Run.listing(runs)
    if not stored:
        out.print(f"No runs in {escape(str(runs))}. Begin with: bitquorum run digits")
        return
    rows = []
    for item in stored:
        try:
            if is_museum(item):
                facts = ("digits", str(item.config().get("seed", "?")), "the museum")
            elif is_bench(item):
                suite = stored_suite(item)
                state = f"a suite, {len(summary(item))} of {len(suite.baselines)} rows"
                facts = (suite.data.name, " ".join(map(str, suite.seeds)), state)
            else:
                experiment = experiment_of(item)
                facts = (experiment.data.name, str(experiment.seed), progress_of(item))
        except (BitquorumError, OSError, KeyError, TypeError, ValueError):  # whatever a file in its place may hold
            facts = ("?", "?", "unreadable; `bitquorum show` says why")
        rows.append((item.path.name, *facts))
    print_rows(("run", "data", "seed", "state"), rows)


@app.command()
def publish(
    query: Query,
    target: Annotated[Path, typer.Argument(help="Folder to write, such as results/digits.")],
    runs: Root = RUNS,
) -> None:
    """Copy a run's config, metrics and environment, without weights or images, to a folder.

    With them goes, for each test image, how many draws were right, so that other runs can be compared to this one.
    """
    from bitquorum.experiment import publish_run
    from bitquorum.store import Run

    publish_run(Run.find(runs, query), target)
    out.print(f"Published to {escape(str(target))}")
