"""Do many tasks: one after the other, or on several processes of this machine. `cluster` does them on many machines."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Any, TypeAlias

from bitquorum.allocator import keep_freed_memory
from bitquorum.bench.entry import CELLS, work
from bitquorum.bench.suite import Entry
from bitquorum.config import Experiment
from bitquorum.environment import usable_cores
from bitquorum.experiment import train
from bitquorum.interface import BitquorumError, Listener

Task: TypeAlias = Experiment | Entry
Outcome: TypeAlias = tuple[Task, BitquorumError | None]


@dataclass(frozen=True, kw_only=True, eq=False)
class Place:
    """Say where work is done.

    Attributes:
        root: Folder of runs.
        device: Where to compute.
        data_root: Folder of data sets.
        listener: Hears of progress.
    """

    root: Path
    device: str = "cpu"
    data_root: Path | None = None
    listener: Listener = field(default_factory=Listener)


def title(task: Task) -> str:
    """Return what a task is called in messages."""
    if isinstance(task, Entry):
        return f"{task.title}, seed {task.experiment.seed}"
    return f"{task.name}, seed {task.seed}, to attack with"


def do(task: Task, place: Place) -> None:
    """Train an experiment, or do the work of an entry; what is stored is not repeated.

    Raises:
        BitquorumError: whatever fails, such as memory that runs out in one task: the others go on.
    """
    common: dict[str, Any] = {"device": place.device, "data_root": place.data_root, "listener": place.listener}
    try:
        if isinstance(task, Entry):
            work(task, place.root, **common)
        else:
            train(task, place.root / CELLS, **common)
    except BitquorumError:
        raise
    except Exception as error:
        raise BitquorumError(f"expected {title(task)} to be computed, got {type(error).__name__}: {error}") from error


def serial(tasks: Sequence[Task], place: Place) -> Iterator[Outcome]:
    """Do tasks one after the other, and yield each with its error or `None`."""
    for task in tasks:
        try:
            do(task, place)
        except BitquorumError as error:
            yield task, error
        else:
            yield task, None


def processes(jobs: int) -> Callable[[Sequence[Task], Place], Iterator[Outcome]]:
    """Return what does tasks on `jobs` processes of this machine, each with its share of the cores.

    It raises `BitquorumError` if the system ends one of them.
    """

    def run(tasks: Sequence[Task], place: Place) -> Iterator[Outcome]:
        threads = max(1, usable_cores() // jobs)
        context = get_context("spawn")
        with ProcessPoolExecutor(jobs, context, initializer=_begin, initargs=(threads,)) as pool:
            futures = {}
            for task in tasks:
                futures[pool.submit(_do, task, place.root, place.device, place.data_root)] = task
            try:
                for number, future in enumerate(as_completed(futures), start=1):
                    error = future.exception()
                    if error is not None and not isinstance(error, BitquorumError):
                        raise error
                    place.listener.advance(number, title(futures[future]))
                    yield futures[future], error
            except BrokenProcessPool as error:
                raise BitquorumError(
                    f"expected {jobs} processes that live to the end, got one that was killed, perhaps for want of "
                    "memory; the same command goes on, with fewer jobs"
                ) from error
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                for child in active_children():  # an interrupt may have reached this process alone
                    child.terminate()
                raise

    return run


def _begin(threads: int) -> None:
    import torch

    keep_freed_memory()
    torch.set_num_threads(threads)


def _do(task: Task, root: Path, device: str, data_root: Path | None) -> None:
    do(task, Place(root=root, device=device, data_root=data_root))
