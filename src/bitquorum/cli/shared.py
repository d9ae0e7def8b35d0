"""Share what every command needs: the application, its consoles and options, progress and devices."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

if TYPE_CHECKING:
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
Query = Annotated[str, typer.Argument(metavar="RUN", help="Path, name or digest of a run; see `bitquorum list`.")]
Queries = Annotated[
    list[str], typer.Argument(metavar="RUN...", help="Paths, names or digests of runs; see `bitquorum list`.")
]
Root = Annotated[Path, typer.Option("--runs", help="Folder of runs.", envvar="BITQUORUM_RUNS")]
DataRoot = Annotated[Path | None, typer.Option("--data", help="Folder of data sets.", envvar="BITQUORUM_DATA")]
Device = Annotated[str, typer.Option(help="`cpu`, `cuda`, `cuda:1`, or `auto`.")]
RUNS = Path("runs")


class Bars:
    """Draw the progress of an experiment or a download."""

    def __init__(self, progress: Progress) -> None:
        from bitquorum.interface import Printed

        self.progress = progress
        self.task = progress.add_task("", visible=False, note="")
        self.lines = Printed()

    def begin(self, task: str, total: int) -> None:
        """Show a new bar."""
        self.lines.begin(task, total)
        self.task = self.progress.add_task(task, total=total or None, note="")

    def advance(self, done: int, note: str = "") -> None:
        """Move the bar."""
        self.progress.update(self.task, completed=done, note=note)
        if not self.progress.console.is_terminal:
            self.lines.advance(done, note)

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
def bars() -> Iterator[Any]:
    """Yield a listener that draws bars on a terminal, and prints lines elsewhere."""
    from bitquorum.interface import Listener

    class Heard(Bars, Listener): ...

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=err, disable=not (err.is_terminal and speaks())) as progress:
        yield Heard(progress)


@contextmanager
def resumable(stored: "Run") -> Iterator[None]:
    """Say after an interrupt where the run lies, and end with code 130."""
    try:
        yield
    except KeyboardInterrupt:
        err.print(f"interrupted; the same command resumes. The run lies in {escape(str(stored.path))}", soft_wrap=True)
        sys.exit(130)


@contextmanager
def processes(device: str) -> Iterator[None]:
    """Join the process group when torchrun started this process.

    Raises:
        ConfigError: if the variables that torchrun sets are there in part, or are no numbers.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        yield
        return
    import torch
    import torch.distributed as dist

    from bitquorum.interface import ConfigError

    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    try:
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    except ValueError as error:
        raise ConfigError(
            f"expected the environment of torchrun, since WORLD_SIZE is {os.environ['WORLD_SIZE']!r}, got: {error}; "
            "start by torchrun, or unset it"
        ) from error
    try:
        yield
    finally:
        dist.destroy_process_group()


def speaks() -> bool:
    """Return whether this process is the one that prints."""
    return os.environ.get("RANK", "0") == "0"


def device_named(name: str) -> str:
    """Return a device of this machine.

    Raises:
        ConfigError: if there is none of this name.
    """
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


def number(text: str) -> float | str:
    """Return a decimal number; the registry reads fractions, and refuses what is neither."""
    try:
        return float(text)
    except ValueError:
        return text
