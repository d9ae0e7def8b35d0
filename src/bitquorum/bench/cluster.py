"""Do tasks on the machines of a Ray cluster, which need not share a file system.

A task works in a folder of its own on whatever machine takes it. What it needs travels there as bytes, and what it made
travels back. The folder is kept until the result is stored here: a task that is killed, or whose caller is, goes on
from its checkpoint when that machine takes it again.
"""

import logging
import os
import shutil
import socket
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from pathlib import Path, PurePosixPath
from textwrap import shorten
from typing import Any, Final, TypeAlias
from urllib.parse import urlsplit

import torch

from bitquorum.bench.entry import entry_folder, training_folder
from bitquorum.bench.pools import Outcome, Place, Task, do, title
from bitquorum.bench.suite import Entry
from bitquorum.config import Experiment
from bitquorum.files import atomic_write
from bitquorum.interface import BitquorumError, DataError, InputError
from bitquorum.registry import digest

Files: TypeAlias = dict[str, bytes]  # content by path below a folder of runs

RETRIES: Final = 3  # of a task whose process or machine dies
_CHECKPOINT: Final = "checkpoint.safetensors"
_LAST: Final = ("weights.safetensors", "row.json")  # say that a training or an entry is done
_TRAINING: Final = ("config.toml", "environment.json", "arms/*/*")
_SOURCE: Final = ("config.toml", "arms/*/weights.safetensors")
_KNOCK: Final = 10.0  # seconds to wait for an answer from a cluster
_GOODBYE: Final = 10.0  # seconds to wait for machines to remove what is stored here


def machines(address: str, *, cpus: int = 1) -> Callable[[Sequence[Task], Place], Iterator[Outcome]]:
    """Return what does tasks on a Ray cluster.

    Every machine needs this version of bitquorum, and the data sets where `Place.data_root` or `BITQUORUM_DATA` says. A
    Ray session that this process already has is used as it is, whatever the address.

    Args:
        address: Of the cluster, such as `host:6379`, `ray://host:10001` or `auto`; `local` starts one on this machine.
        cpus: Cores, and so threads, of each task. On a CUDA device each task gets a GPU of its own too.

    Raises:
        InputError: if Ray is not installed, or when work begins, if there is no cluster at the address.
    """
    if cpus < 1:
        raise InputError(f"expected at least one core for a task, got {cpus}")
    ray = _ray()

    def run(tasks: Sequence[Task], place: Place) -> Iterator[Outcome]:
        waiting = [task for task in tasks if not is_stored(task, place.root)]
        for number, task in enumerate((task for task in tasks if task not in waiting), start=1):
            place.listener.advance(number, title(task))
            yield task, None
        if waiting:
            with _joined(ray, address):
                for number, outcome in enumerate(
                    _spread(ray, waiting, place, cpus), start=len(tasks) - len(waiting) + 1
                ):
                    place.listener.advance(number, title(outcome[0]))
                    yield outcome

    return run


def is_stored(task: Task, root: Path) -> bool:
    """Return whether nothing is left to do of a task."""
    if isinstance(task, Entry):
        return (entry_folder(task, root) / "row.json").exists()
    folder = training_folder(task, root)
    return all((folder / "arms" / arm.name / "weights.safetensors").exists() for arm in task.arms)


def pack(root: Path, folder: Path, patterns: Sequence[str] = ("**/*",)) -> Files:
    """Return the files of a folder below `root` that fit one of the patterns, without locks and half-written files."""
    found = {path for pattern in patterns for path in folder.glob(pattern)}
    kept = sorted(path for path in found if path.is_file() and not path.name.startswith("."))
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in kept}


def unpack(files: Mapping[str, bytes], root: Path) -> None:
    """Write files below `root`, those last that say that something is done: a kill leaves nothing that looks finished.

    Weights take the place of the checkpoint of their training.
    """
    for name in sorted(files, key=_rank):
        atomic_write(root / name, files[name])
        if PurePosixPath(name).name == "weights.safetensors":
            (root / name).with_name(_CHECKPOINT).unlink(missing_ok=True)


def own_files(task: Task, root: Path) -> Files:
    """Return what is stored of a task itself: of its training, also a checkpoint, and of its climb."""
    experiment = task.experiment if isinstance(task, Entry) else task
    files = pack(root, training_folder(experiment, root), _TRAINING)
    return files | (pack(root, entry_folder(task, root)) if isinstance(task, Entry) else {})


def perform(task: Task, place: Place, sent: Mapping[str, bytes]) -> tuple[Files, BitquorumError | None]:
    """Do a task in a folder that lacks what it needs, and return the files that it made and the error that ended it.

    Args:
        task: What to do.
        place: Where; what an earlier call left there goes before what is sent.
        sent: Files that the task may need.
    """
    error = None
    try:
        unpack({name: content for name, content in sent.items() if not (place.root / name).exists()}, place.root)
        do(task, place)
    except BitquorumError as caught:
        error = caught
    made = pack(place.root, place.root)
    fresh = {name: content for name, content in made.items() if sent.get(name) != content}
    return {name: content for name, content in fresh.items() if PurePosixPath(name).name != _CHECKPOINT}, error


def _rank(name: str) -> tuple[int, str]:
    last = PurePosixPath(name).name
    return (_LAST.index(last) + 1 if last in _LAST else 0), name


def _ray() -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return import_module("ray")
    except ImportError as error:
        raise InputError("expected Ray for a cluster, got none; pip install 'bitquorum[cluster]'") from error


@contextmanager
def _joined(ray: Any, address: str) -> Iterator[None]:
    """Hold a connection to a cluster inside the block, unless this process already has one."""
    if ray.is_initialized():
        yield
        return
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # read by the processes that a local cluster starts
    options = {"include_dashboard": False} if address == "local" else {}
    try:
        _knock(address)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ray.init(address, log_to_driver=False, logging_level=logging.ERROR, **options)
    except (OSError, RuntimeError, ValueError, ImportError) as error:
        raise InputError(
            f"expected a Ray cluster at {address!r}, got: {shorten(str(error), 200)}; `ray start --head` starts one, "
            "`local` needs none, and one that asks for a token needs RAY_AUTH_MODE=token here"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def _knock(address: str) -> None:
    """Raise `OSError` where nobody listens: Ray would try for minutes and then end this process."""
    parts = urlsplit(address if "://" in address else f"//{address}")
    if parts.hostname and parts.port:
        socket.create_connection((parts.hostname, parts.port), timeout=_KNOCK).close()


def _spread(ray: Any, tasks: Sequence[Task], place: Place, cpus: int) -> Iterator[Outcome]:
    """Hand out tasks, and yield each once its files are stored here."""
    gpus = int(place.device.startswith("cuda"))
    device = "cuda" if gpus else place.device  # of its number on this machine a task knows nothing
    data_root = place.data_root and place.data_root.absolute()
    call = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=RETRIES)(_work)

    @cache
    def shared(source: Experiment) -> Any:
        return ray.put(pack(place.root, training_folder(source, place.root), _SOURCE))

    pending = {}
    for task in tasks:
        sources = task.sources if isinstance(task, Entry) else ()
        files = (own_files(task, place.root), *map(shared, sources))
        pending[call.remote(task, digest(task), cpus, device, data_root, *files)] = task
    removed = []
    try:
        while pending:
            (ready,), _ = ray.wait(list(pending))
            task = pending.pop(ready)
            try:
                node, files, error = ray.get(ready)
            except ray.exceptions.RayError as lost:  # its process was ended, once more than it is tried again
                if isinstance(lost, ray.exceptions.RayTaskError):
                    raise  # an error of ours
                yield task, DataError(f"expected {title(task)} to be computed, got {type(lost).__name__}: {lost}")
                continue
            unpack(files, place.root)
            if error is None:
                removed.append(_remove(ray, node, digest(task)))
            yield task, error
        if removed:
            ray.wait(removed, num_returns=len(removed), timeout=_GOODBYE)
    except BaseException:
        for reference in pending:
            ray.cancel(reference)
        raise


def _work(
    task: Task, key: str, cpus: int, device: str, data_root: Path | None, *packs: Files
) -> tuple[str, Files, BitquorumError | None]:
    """Do a task on the machine of this process; return the machine, the files and the error."""
    node: str = _ray().get_runtime_context().get_node_id()
    if digest(task) != key:
        message = "expected this version of bitquorum on every machine, got another one; install the same everywhere"
        return node, {}, InputError(message)
    torch.set_num_threads(cpus)
    place = Place(root=_folder(key), device=device, data_root=data_root)
    return node, *perform(task, place, {name: content for files in packs for name, content in files.items()})


def _remove(ray: Any, node: str, key: str) -> Any:
    """Let a machine remove the folder of a task whose result is stored."""
    only = import_module("ray.util.scheduling_strategies").NodeAffinitySchedulingStrategy(node, soft=False)
    return ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=only)(_forget).remote(key)


def _forget(key: str) -> None:
    shutil.rmtree(_folder(key), ignore_errors=True)


def _folder(key: str) -> Path:
    """Return the folder of a task on this machine; users keep apart."""
    return Path(tempfile.gettempdir()) / f"bitquorum-bench-{os.getuid()}" / key
