"""Test that a cluster does what `serial` does, and that a kill midway leaves nothing wrong and loses nothing."""

import json
import os
import pickle
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import pytest
from safetensors import SafetensorError, safe_open

from bitquorum.baselines import FloatEnsemble, Setting, Vanilla
from bitquorum.bench import Place, Suite, bench, cluster
from bitquorum.bench.cluster import is_stored, machines, own_files, pack, perform, unpack
from bitquorum.bench.entry import training_folder
from bitquorum.config import DataChoice, Experiment
from bitquorum.files import atomic_write, read_jsonl
from bitquorum.interface import DataError, InputError, Listener
from bitquorum.registry import digest
from bitquorum.store import Run
from bitquorum.train import DivergedError, Trainer
from bitquorum.zoo import DigitsNet

TRAINER = Trainer(epochs=1, batch_size=20, lr=0.05, calibration=20, checkpoint_seconds=0.0)
SUITE = Suite(
    name="tiny",
    setting=Setting(network=DigitsNet(width=4), trainer=TRAINER, epsilon=16 / 255, members=2),
    baselines=(Vanilla(), FloatEnsemble()),
    sources=(Vanilla(name="source"),),
    ladder="quick",
    examples=20,
    draws=5,
    calibration=100,
)
SMALL = replace(SUITE, data=DataChoice(train=60))
MEASURED = ("train_seconds", "milliseconds", "seconds")  # of a row; they differ from call to call


def experiment(lr: float = 0.05) -> Experiment:
    chosen = SMALL.entries()[0].experiment
    return replace(chosen, arms=(replace(chosen.arms[0], trainer=replace(TRAINER, lr=lr)),))


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


class StopError(Exception):
    """End the work in the middle."""


class Heard(Listener):
    """Keep the counts."""

    def __init__(self) -> None:
        self.counts: list[int] = []

    def advance(self, done: int, note: str = "") -> None:
        self.counts.append(done)


class RayError(Exception): ...


class RayTaskError(RayError): ...


@dataclass
class FakeRay:
    """Do a task when its result is asked for, in this process, with all that travels pickled as Ray does."""

    running: bool = False
    cancelled: list[int] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)
    calls: list[Callable[[], Any]] = field(default_factory=list)
    started: int = 0

    exceptions: ClassVar[Any] = SimpleNamespace(RayError=RayError, RayTaskError=RayTaskError)

    def is_initialized(self) -> bool:
        return self.running

    def init(self, address: str, **options: Any) -> None:
        self.running, self.options, self.started = True, options, self.started + 1

    def shutdown(self) -> None:
        self.running = False

    def put(self, value: Any) -> Any:
        return value

    def remote(self, **options: Any) -> Callable[[Callable[..., Any]], Any]:
        def wrap(function: Callable[..., Any]) -> Any:
            def call(*arguments: Any) -> int:
                sent = pickle.dumps(arguments)
                self.calls.append(lambda: pickle.loads(pickle.dumps(function(*pickle.loads(sent)))))
                return len(self.calls) - 1

            return SimpleNamespace(remote=call)

        return wrap

    def wait(self, references: list[int], num_returns: int = 1, timeout: float = 0.0) -> tuple[list[int], list[int]]:
        if num_returns > 1 or timeout:
            for reference in references:
                self.get(reference)
        return references[-1:], references[:-1]

    def get(self, reference: int) -> Any:
        return self.calls[reference]()

    def cancel(self, reference: int) -> None:
        self.cancelled.append(reference)

    def get_runtime_context(self) -> Any:
        return SimpleNamespace(get_node_id=lambda: "here")


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeRay:
    ray, strategies = FakeRay(), ModuleType("ray.util.scheduling_strategies")
    strategies.NodeAffinitySchedulingStrategy = lambda node, soft: node  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "ray", ray)  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "ray.util.scheduling_strategies", strategies)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "machine"))
    return ray


def test_without_ray_the_advice_is_to_install_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=r"expected Ray .* got none; pip install 'bitquorum\[cluster\]'"):
        machines("local")
    with pytest.raises(InputError, match="at least one core"):
        machines("local", cpus=0)


def test_a_silent_address_is_refused_at_once(fake: FakeRay, tmp_path: Path):
    with pytest.raises(InputError, match=r"expected a Ray cluster at '127.0.0.1:1', got: .* `local` needs none"):
        list(machines("127.0.0.1:1")([experiment()], Place(root=tmp_path)))
    assert not fake.started


def test_files_travel_without_locks_and_parts(tmp_path: Path):
    root, target = tmp_path / "here", tmp_path / "there"
    for name in ("cells/a/config.toml", "cells/a/arms/a/weights.safetensors", "cells/a/.lock", "cells/a/.x.part"):
        atomic_write(root / name, name)
    files = pack(root, root / "cells" / "a")
    assert files == {name: name.encode() for name in ("cells/a/arms/a/weights.safetensors", "cells/a/config.toml")}
    assert list(pack(root, root / "cells" / "a", ("*.toml", "none/*"))) == ["cells/a/config.toml"]
    unpack(files, target)
    assert pack(target, target) == files


def test_what_says_that_work_is_done_is_written_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    files = {name: b"" for name in ("a/row.json", "a/weights.safetensors", "a/x", "b/row.json", "z/climb", "z/config")}
    written: list[Path] = []

    def write(path: Path, content: bytes) -> None:
        if len(written) == 4:
            raise StopError
        written.append(path)
        atomic_write(path, content)

    monkeypatch.setattr(cluster, "atomic_write", write)
    with pytest.raises(StopError):
        unpack(files, tmp_path)
    assert names(tmp_path) == {"a/x", "z/climb", "z/config", "a/weights.safetensors"}
    assert written[-1].name == "weights.safetensors"


def test_weights_replace_the_checkpoint_of_their_training_alone(tmp_path: Path):
    for arm in "ab":
        atomic_write(tmp_path / "arms" / arm / "checkpoint.safetensors", b"")
    unpack({"arms/a/weights.safetensors": b""}, tmp_path)
    assert names(tmp_path) == {"arms/a/weights.safetensors", "arms/b/checkpoint.safetensors"}


def test_a_task_returns_what_it_made_and_nothing_that_it_was_sent(tmp_path: Path):
    task = experiment()
    made, error = perform(task, Place(root=tmp_path / "one"), {})
    folder = training_folder(task, Path()).as_posix()
    files = ("config.toml", "environment.json", "arms/vanilla/train.jsonl", "arms/vanilla/weights.safetensors")
    assert error is None
    assert set(made) == {f"{folder}/{file}" for file in files}
    again, error = perform(task, Place(root=tmp_path / "two"), made)
    assert (again, error) == ({}, None)
    assert not is_stored(task, tmp_path / "three")
    unpack(made, tmp_path / "three")
    assert is_stored(task, tmp_path / "three")
    assert own_files(task, tmp_path / "three") == made


def test_what_an_earlier_try_left_goes_before_what_is_sent(tmp_path: Path):
    task = experiment()
    perform(task, Place(root=tmp_path), {})
    weights = training_folder(task, tmp_path) / "arms" / "vanilla" / "weights.safetensors"
    kept = weights.read_bytes()
    perform(task, Place(root=tmp_path), {weights.relative_to(tmp_path).as_posix(): b"spoilt"})
    assert weights.read_bytes() == kept


def test_an_error_comes_back_with_the_files(tmp_path: Path):
    made, error = perform(experiment(lr=1e30), Place(root=tmp_path), {})
    assert isinstance(error, DivergedError)
    assert {Path(name).name for name in made} == {"config.toml", "environment.json"}


def test_every_task_comes_back_with_its_error_or_its_files(fake: FakeRay, tmp_path: Path):
    good, bad, heard = experiment(), experiment(lr=1e30), Heard()
    place = Place(root=tmp_path / "runs", listener=heard)
    outcomes = dict(machines("local")([good, bad], place))
    assert outcomes[good] is None
    assert isinstance(outcomes[bad], DivergedError)
    assert is_stored(good, place.root)
    assert heard.counts == [1, 2]
    assert not fake.running
    assert fake.options["include_dashboard"] is False
    (left,) = (tmp_path / "machine").glob("*/*")
    assert left.name == digest(bad), "a stored task leaves nothing on the machine, one that failed its state"


def test_what_is_stored_starts_no_cluster(fake: FakeRay, tmp_path: Path):
    place = Place(root=tmp_path / "runs")
    first, second = experiment(), experiment(lr=0.04)
    assert list(machines("local")([first], place)) == [(first, None)]
    assert list(machines("local")([first], place)) == [(first, None)]
    assert fake.started == 1
    place = replace(place, listener=Heard())
    assert list(machines("local")([second, first], place)) == [(first, None), (second, None)]
    assert place.listener.counts == [1, 2]


def test_other_errors_raise_and_end_the_rest(fake: FakeRay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(task: Any, place: Place) -> None:
        raise StopError

    monkeypatch.setattr(cluster, "do", fail)
    with pytest.raises(StopError):
        list(machines("local")([experiment(), experiment(lr=0.04)], Place(root=tmp_path)))
    assert fake.cancelled
    assert not fake.running


def test_a_task_whose_process_dies_leaves_the_others(fake: FakeRay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    lost, good = experiment(lr=0.04), experiment()

    def work(task: Any, place: Place) -> None:
        if task == lost:
            raise RayError("the worker was ended")
        do(task, place)

    do = cluster.do
    monkeypatch.setattr(cluster, "do", work)
    outcomes = dict(machines("local")([good, lost], Place(root=tmp_path / "runs")))
    assert outcomes[good] is None
    assert isinstance(outcomes[lost], DataError)
    assert "to be computed, got RayError: the worker was ended" in str(outcomes[lost])

    def fail(task: Any, place: Place) -> None:
        raise RayTaskError

    monkeypatch.setattr(cluster, "do", fail)
    with pytest.raises(RayTaskError):
        list(machines("local")([lost], Place(root=tmp_path / "runs")))


def test_a_caller_who_stops_ends_the_rest(fake: FakeRay, tmp_path: Path):
    outcomes = machines("local")([experiment(), experiment(lr=0.04)], Place(root=tmp_path))
    next(outcomes)
    outcomes.close()  # type: ignore[attr-defined]
    assert len(fake.cancelled) == 1
    assert not fake.running


def test_a_session_of_the_caller_is_used_and_kept(fake: FakeRay, tmp_path: Path):
    fake.running = True
    list(machines("local")([experiment()], Place(root=tmp_path)))
    assert fake.running
    assert not fake.started


def test_a_machine_with_another_version_refuses_the_task(fake: FakeRay):
    node, files, error = cluster._work(experiment(), "another", 1, "cpu", None)
    assert (node, files) == ("here", {})
    assert isinstance(error, InputError)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    pytest.importorskip("ray", reason="Ray is not installed; it is the extra [cluster]")
    root = tmp_path_factory.mktemp("serial")
    stored, _ = bench(SUITE, Place(root=root))
    return rows(stored)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Yield the temporary folder of the tasks; that of Ray has a short name, for it holds sockets."""
    short = tempfile.mkdtemp(prefix="bq-", dir="/tmp")
    (tmp_path / "machine").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "machine"))
    monkeypatch.setenv("RAY_TMPDIR", short)
    yield tmp_path / "machine"
    shutil.rmtree(short, ignore_errors=True)


def rows(stored: Run) -> dict[str, dict[str, Any]]:
    found = {path.stem: read_jsonl(path)[0] for path in sorted((stored.path / "entries").iterdir())}
    return {title: {k: v for k, v in row.items() if k not in MEASURED} for title, row in found.items()}


@pytest.mark.slow
def test_a_local_cluster_gives_the_rows_of_one_process(expected: dict[str, Any], machine: Path, tmp_path: Path):
    stored, _ = bench(SUITE, Place(root=tmp_path / "runs"), cluster="local")
    assert rows(stored) == expected
    assert list(machine.glob("bitquorum-bench-*/*")) == []


@pytest.mark.slow
def test_a_killed_worker_loses_nothing(expected: dict[str, Any], machine: Path, tmp_path: Path):
    killer = Killer(machine)
    killer.start()
    stored, _ = bench(SUITE, Place(root=tmp_path / "runs"), only=["vanilla"], cluster="local")
    killer.join()
    assert rows(stored) == {"vanilla@0": expected["vanilla@0"]}
    training = Run.open(training_folder(SUITE.entries()[0].experiment, tmp_path / "runs"))
    assert [row["ended"] for row in training.environments() if row["work"] == "train"] == ["killed", "done"]
    assert killer.after, "the watcher saw no checkpoint after the kill"
    assert min(killer.after) >= killer.killed >= Killer.LEAST, "the training began anew"


class Killer(threading.Thread):
    """Kill the process that trains `vanilla` once it has made some steps, and watch the checkpoints of the next one."""

    LEAST = 15

    def __init__(self, folder: Path) -> None:
        super().__init__(daemon=True)
        self.folder, self.killed, self.after = folder, 0, []

    def run(self) -> None:
        end = time.monotonic() + 200
        while time.monotonic() < end:
            time.sleep(0.002)
            found = list(self.folder.glob("bitquorum-bench-*/*/cells/vanilla-*/arms/*/*.safetensors"))
            if any(path.name == "weights.safetensors" for path in found):
                return
            step = max((_step(path) for path in found), default=0)
            if self.killed and step:
                self.after.append(step)
            elif step >= self.LEAST:
                os.kill(_holder(found[0].parents[2] / ".lock"), signal.SIGKILL)
                self.killed = _step(found[0])


def _step(checkpoint: Path) -> int:
    try:
        with safe_open(str(checkpoint), framework="pt") as file:
            return int(json.loads(file.metadata()["state"])["step"])
    except (OSError, SafetensorError):
        return 0


def _holder(lock: Path) -> int:
    """Return the process that has a file open."""
    for handle in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if os.readlink(handle) == str(lock):
                return int(handle.parts[2])
        except OSError:
            continue
    raise DataError(f"expected a process that holds {lock}, got none")
