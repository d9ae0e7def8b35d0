"""Parse the command line, call the library, print. No logic lives here."""

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table as RichTable

if TYPE_CHECKING:
    from bitquorum.report import Table
    from bitquorum.store import Run

app = typer.Typer(
    name="bitquorum",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="""Train ensembles of low-bit networks with a stochastic quantizer (SQ), and attack them honestly.

    Begin with `bitquorum run digits`: it trains four ensembles on images that are already here, attacks them,
    and prints their robust accuracy side by side. Every command explains itself: `bitquorum COMMAND --help`.
    """,
)
data_app = typer.Typer(no_args_is_help=True, help="List data sets and put them on this machine.")
app.add_typer(data_app, name="data")

out = Console()
err = Console(stderr=True)

Source = Annotated[str, typer.Argument(help="Name of a preset (`bitquorum list --presets`) or path of a TOML file.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Changes, such as `trainer.epochs=3` or `arms.0.network.width=32`.")
]
Root = Annotated[Path, typer.Option("--runs", help="Folder of runs.", envvar="BITQUORUM_RUNS")]
DataRoot = Annotated[Path | None, typer.Option("--data", help="Folder of data sets.", envvar="BITQUORUM_DATA")]
Device = Annotated[str, typer.Option(help="`cpu`, `cuda`, `cuda:1`, or `auto`.")]
RUNS = Path("runs")


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

    chosen, place = read(source, overrides or []), _device(device)
    stored = experiment.create(chosen, runs)
    with _resumable(stored), _processes(place), _bars() as listener:
        experiment.run(chosen, runs, device=place, data_root=data, listener=listener)
    if _speaks():
        _show(stored)


@app.command()
def train(
    source: Source, overrides: Overrides = None, runs: Root = RUNS, data: DataRoot = None, device: Device = "auto"
) -> None:
    """Train every arm of an experiment without attacking it.

    On several devices or processes: `torchrun --nproc-per-node 2 -m bitquorum train PRESET`. Then attack with
    `bitquorum evaluate RUN`, or finish with `bitquorum run` and the same arguments.
    """
    from bitquorum import experiment
    from bitquorum.config import read

    chosen, place = read(source, overrides or []), _device(device)
    stored = experiment.create(chosen, runs)
    with _resumable(stored), _processes(place), _bars() as listener:
        experiment.train(chosen, runs, device=place, data_root=data, listener=listener)
    if _speaks():
        out.print(f"Trained; the run lies in [bold]{escape(str(stored.path))}[/bold]", soft_wrap=True)


@app.command()
def evaluate(
    query: Annotated[str, typer.Argument(metavar="RUN", help="Path, name or digest of a run; see `bitquorum list`.")],
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
        _climb(stored, ladder, overrides or [], epsilon or [], arm or [], also or [], data, _device(device))
        return
    if given := [name for name, value in (("--epsilon", epsilon), ("--arm", arm), ("--also", also)) if value]:
        raise ConfigError(
            f"expected --ladder beside {given[0]}, got none; without it write epsilons=[...], attacks=[...]"
        )
    table = encode(experiment.experiment_of(stored).evaluation)
    chosen = decode(Evaluation, apply_overrides(table, overrides or []))
    with _resumable(stored), _bars() as listener:
        rows = experiment.evaluate(stored, chosen, device=_device(device), data_root=data, listener=listener)
    _print_table(comparison(rows))


@app.command()
def show(
    query: Annotated[str, typer.Argument(metavar="RUN", help="Path, name or digest of a run; see `bitquorum list`.")],
    runs: Root = RUNS,
    config: Annotated[bool, typer.Option("--config", help="Print the config instead, as TOML.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the table as Markdown.")] = False,
) -> None:
    """Print the stored table of a run, without computing anything."""
    from bitquorum.experiment import ladder_rows, ladders, results
    from bitquorum.museum import is_museum, museum_rows
    from bitquorum.report import bracket, comparison, museum_table, peer_table
    from bitquorum.store import Run

    stored = Run.find(runs, query)
    if config:
        print((stored.path / "config.toml").read_text(encoding="utf-8"), end="")
        return
    if is_museum(stored):
        found = (museum_table(rows), peer_table(rows)) if (rows := museum_rows(stored)) else ()
        tables = [table for table in found if table]
    else:
        tables = [comparison(rows)] if (rows := results(stored)) else []
        tables += [bracket(rows) for ladder in ladders(stored) if (rows := ladder_rows(stored, ladder))]
    if markdown and tables:
        print("\n\n".join(table.markdown() for table in tables))
    elif is_museum(stored):
        for table in tables:
            _print_table(table)
        out.print(f"The run lies in [bold]{escape(str(stored.path))}[/bold]", soft_wrap=True)
    else:
        _show(stored)


@app.command("list")
def list_(
    runs: Root = RUNS,
    presets: Annotated[bool, typer.Option("--presets", help="List the presets instead of the runs.")] = False,
) -> None:
    """List the stored runs, or the presets."""
    if presets:
        from bitquorum.config import presets as known

        purposes = [(name, text.splitlines()[0].lstrip("# ")) for name, text in known().items()]
        _print_rows(("preset", "what it is"), purposes)
        return
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
        if is_museum(item):
            rows.append((item.path.name, "digits", str(item.config()["seed"]), "the museum"))
            continue
        try:
            experiment = experiment_of(item)
            state = progress_of(item)
        except BitquorumError:
            rows.append((item.path.name, "?", "?", "unreadable; `bitquorum show` says why"))
        else:
            rows.append((item.path.name, experiment.data.name, str(experiment.seed), state))
    _print_rows(("run", "data", "seed", "state"), rows)


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
    from bitquorum.report import museum_table, peer_table
    from bitquorum.store import Run

    chosen = Museum(exhibits=tuple(exhibits or NAMES), images=images, ladder=ladder, also=tuple(also or ()))
    with _resumable(Run.create(runs, "museum", encode(chosen))), _bars() as listener:
        stored, rows = visit(chosen, runs, listener=listener)
    table = museum_table(rows)
    for shown in (table, peer_table(rows)):
        if shown:
            _print_table(shown)
    out.print(f"The run lies in [bold]{escape(str(stored.path))}[/bold]", soft_wrap=True)
    if any("NOT reached" in row for row in table.rows):
        sys.exit(3)


@app.command()
def publish(
    query: Annotated[str, typer.Argument(metavar="RUN", help="Path, name or digest of a run; see `bitquorum list`.")],
    target: Annotated[Path, typer.Argument(help="Folder to write, such as results/digits.")],
    runs: Root = RUNS,
) -> None:
    """Copy a run's config, metrics and environment, without weights or per-image outcomes, to a folder."""
    from bitquorum.store import Run

    Run.find(runs, query).publish(target)
    out.print(f"Published to {escape(str(target))}")


@app.command()
def doctor(data: DataRoot = None) -> None:
    """Print versions, devices, low-precision support and the data sets found here."""
    import torch

    from bitquorum import kernels
    from bitquorum.data import available
    from bitquorum.environment import environment
    from bitquorum.train import bfloat16_pays

    facts = environment()
    cpu = facts["cpu"]
    rows = [(name, str(version)) for name, version in facts["versions"].items()]
    rows += [
        ("platform", facts["platform"]),
        ("CPU", f"{cpu['model']}, {cpu['usable_cores']} of {cpu['cores']} cores usable, {cpu['capability']}"),
        ("threads", str(facts["threads"]["intra_op"])),
        ("AMX", "yes" if cpu["amx_bf16"] else "no"),
        ("bfloat16 on CPU", "pays" if bfloat16_pays(torch.device("cpu")) else "does not pay; float32 is used"),
        ("compiled kernels", "yes" if kernels.compiler_available() else "no C++ compiler found; eager is used"),
        ("CUDA", ", ".join(device["name"] for device in facts["cuda"]["devices"]) or "none"),
    ]
    for name, listing in available(data).items():
        rows.append((f"data: {name}", listing.where or f"missing; bitquorum data get {name}"))
    _print_rows(("what", "found"), rows)


@data_app.command("list")
def data_list(data: DataRoot = None) -> None:
    """List the known data sets, their size and where they lie."""
    from bitquorum.data import available

    rows = []
    for name, listing in available(data).items():
        shape, count = " x ".join(map(str, listing.shape)), f"{listing.train:,} + {listing.test:,}"
        rows.append((name, shape, count, listing.where or f"missing; bitquorum data get {name}"))
    _print_rows(("name", "shape", "train + test", "where"), rows)
    out.print("Also: folder:PATH (class folders of images) and parquet:PATH (a Hugging Face data set).")


@data_app.command("get")
def data_get(
    name: Annotated[str, typer.Argument(help="Name of a data set, such as cifar10.")],
    source: Annotated[
        Path | None,
        typer.Option("--from", help="A local archive or folder with the published files, instead of a download."),
    ] = None,
    data: DataRoot = None,
) -> None:
    """Download a data set's published files, with resume and checksums, or take them from this machine."""
    from bitquorum.data import get

    with _bars() as bars:
        where = get(name, source=source, root=data, progress=bars.bytes if source is None else None)
    out.print(f"{escape(name)} lies in [bold]{escape(str(where))}[/bold]", soft_wrap=True)


def main() -> None:
    """Run the command line; a failure that the user can mend is one message and exit code 2."""
    warnings.showwarning = _print_warning
    try:
        app()
    except Exception as error:
        message = _advice(error)
        if message is None:
            raise
        err.print(f"[bold red]error:[/bold red] {escape(message)}", soft_wrap=True)
        sys.exit(2)


def _advice(error: Exception) -> str | None:
    """Return what to tell the user of a failure that they can mend; `None` for one that they cannot."""
    from bitquorum.interface import BitquorumError  # imports torch, which `--help` does without

    if isinstance(error, BitquorumError):
        return str(error)
    if isinstance(error, OSError) and error.filename:
        return f"expected {error.filename} to be readable or writable, got: {error.strerror}; choose another path"
    return None


class _Bars:
    """Draw the progress of an experiment or a download."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.task = progress.add_task("", visible=False, note="")

    def begin(self, task: str, total: int) -> None:
        """Show a new bar."""
        self.task = self.progress.add_task(task, total=total or None, note="")

    def advance(self, done: int, note: str = "") -> None:
        """Move the bar."""
        self.progress.update(self.task, completed=done, note=note)
        if not self.progress.console.is_terminal:
            name = self.progress.tasks[self.task].description
            total = self.progress.tasks[self.task].total
            of = f"/{int(total)}" if total else ""
            print(f"{name}: {done}{of} {note}", file=sys.stderr, flush=True)

    def end(self) -> None:
        """Fill the bar."""
        task = self.progress.tasks[self.task]
        self.progress.update(self.task, total=task.completed, completed=task.completed, note="done")

    def bytes(self, name: str, done: int, total: int | None) -> None:
        """Show a download."""
        if self.progress.tasks[self.task].description != name:
            self.begin(name, total or 0)
        self.progress.update(self.task, completed=done)


@contextmanager
def _bars() -> Iterator[Any]:
    from bitquorum.interface import Listener

    class Bars(_Bars, Listener): ...

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=err, disable=not (err.is_terminal and _speaks())) as progress:
        yield Bars(progress)


@contextmanager
def _resumable(stored: "Run") -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        err.print(f"interrupted; the same command resumes. The run lies in {escape(str(stored.path))}", soft_wrap=True)
        sys.exit(130)


@contextmanager
def _processes(device: str) -> Iterator[None]:
    """Join the process group when torchrun started this process."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        yield
        return
    import torch
    import torch.distributed as dist

    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def _speaks() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _device(name: str) -> str:
    import torch

    from bitquorum.interface import ConfigError

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        name = "cuda" if count else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ConfigError(f"expected a device such as cpu, cuda or cuda:1, got {name!r}; `bitquorum doctor` lists them")
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ConfigError(
            f"expected a device of this machine, got {name!r}, but torch sees {count} CUDA devices; use `--device cpu`"
        )
    if device.type == "cuda" and "LOCAL_RANK" in os.environ:
        return f"cuda:{os.environ['LOCAL_RANK']}"
    return str(device)


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
    from bitquorum.report import bracket, rungs

    chosen = ladder_named(name)
    table = encode(chosen) | {"epsilons": epsilons or experiment.usual_epsilons(stored)}
    chosen = decode(type(chosen), apply_overrides(table, overrides))
    with _resumable(stored), _bars() as listener:
        rows = experiment.climb_run(
            stored, chosen, arms=arms, also=also, device=device, data_root=data, listener=listener
        )
    for label, radius in dict.fromkeys((row["arm"], row["epsilon"]) for row in rows if row["name"] == "left"):
        _print_table(rungs(rows, label, radius))
    _print_table(bracket(rows))
    failed = _print_verdicts(experiment.verdicts(stored, chosen))
    out.print(f"The run lies in [bold]{escape(str(stored.path))}[/bold]", soft_wrap=True)
    if failed:
        sys.exit(3)


def _print_verdicts(rows: list[dict[str, Any]]) -> int:
    """Print the verdicts of the self-checks, failed ones in red, and return how many failed."""
    if not rows:
        return 0
    table = RichTable("arm", "self-check", "verdict", "reason")
    for row in rows:
        verdict = "[green]passed[/green]" if row["passed"] else "[bold red]FAILED[/bold red]"
        table.add_row(escape(row["arm"]), escape(row["name"]), verdict, escape(row["reason"]))
    out.print(table)
    failed = sum(not row["passed"] for row in rows)
    if failed:
        err.print(
            f"[bold red]{failed} self-checks failed:[/bold red] the attack may be weaker than it looks (masked "
            "gradients); do not quote these accuracies before the reason is found",
            soft_wrap=True,
        )
    return failed


def _show(stored: "Run") -> None:
    from bitquorum.experiment import ladder_rows, ladders, results, verdicts
    from bitquorum.report import bracket, comparison, environments

    if rows := results(stored):
        _print_table(comparison(rows))
    else:
        out.print("Not evaluated yet: the same `bitquorum run` command resumes it.")
    for ladder in ladders(stored):
        if rows := ladder_rows(stored, ladder):
            _print_table(bracket(rows))
            _print_verdicts(verdicts(stored, ladder))
    out.print(f"Computed in {escape(environments(stored.environments()))}.")
    out.print(f"The run lies in [bold]{escape(str(stored.path))}[/bold]", soft_wrap=True)


def _print_table(table: "Table") -> None:
    rows = [tuple(cell.replace(", ", ",\u00a0") for cell in row) for row in table.rows]  # an interval stays whole
    _print_rows(table.header, rows, group=0)
    out.print(escape(table.note), style="dim")


def _print_rows(header: tuple[str, ...], rows: Any, *, group: int | None = None) -> None:
    """Print a table; with `group`, a line parts rows that differ in that column."""
    table = RichTable()
    for name in header:
        table.add_column(escape(name), overflow="fold", no_wrap=name in ("attack", "exhibit"))
    previous = None
    for row in rows:
        if group is not None and previous is not None and row[group] != previous:
            table.add_section()
        previous = row[group] if group is not None else None
        table.add_row(*(escape(str(cell)) for cell in row))
    out.print(table)


def _print_warning(message: Any, category: type[Warning], *_: Any, **__: Any) -> None:
    err.print(f"[yellow]warning:[/yellow] {escape(str(message))} ({category.__name__})", soft_wrap=True)
