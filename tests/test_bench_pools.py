"""Test that several processes do what one does, and that a task that fails stops no other."""

import os
import time
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import pytest

from bitquorum.baselines import FloatEnsemble, Setting, Vanilla
from bitquorum.bench import Place, Suite, bench, pools
from bitquorum.bench.cluster import is_stored
from bitquorum.bench.entry import training_folder
from bitquorum.bench.pools import Task, processes, serial, title
from bitquorum.config import DataChoice, Experiment
from bitquorum.files import read_jsonl
from bitquorum.interface import BitquorumError, DataError, Listener
from bitquorum.store import Run
from bitquorum.train import DivergedError, Trainer
from bitquorum.zoo import DigitsNet

TRAINER = Trainer(epochs=1, batch_size=20, lr=0.05, calibration=20)
SUITE = Suite(
    name="tiny",
    data=DataChoice(train=100),
    setting=Setting(network=DigitsNet(width=4), trainer=TRAINER, epsilon=16 / 255, members=2),
    baselines=(Vanilla(), FloatEnsemble()),
    sources=(Vanilla(name="source"),),
    ladder="quick",
    examples=20,
    draws=5,
    calibration=100,
)
LINGER = 100  # seconds
MEASURED = ("train_seconds", "milliseconds", "seconds")  # of a row; they differ from call to call


class Heard(Listener):
    """Keep the notes."""

    def __init__(self) -> None:
        self.notes: dict[int, str] = {}

    def advance(self, done: int, note: str = "") -> None:
        self.notes[done] = note


def experiment(name: str, lr: float = 0.05) -> Experiment:
    chosen = SUITE.entries()[0].experiment
    arm = replace(chosen.arms[0], name=name, trainer=replace(TRAINER, lr=lr))
    return replace(chosen, name=name, arms=(arm,))


TASKS = [experiment("bad", lr=1e30), experiment("good"), experiment("better", lr=0.1)]


def linger(threads: int) -> None:
    time.sleep(LINGER * threads)


def interrupted(futures: Any) -> Iterator[Any]:
    """Raise what an interrupt raises that reaches one process alone, while the others work."""
    time.sleep(1)
    raise KeyboardInterrupt
    yield from futures


def rows(stored: Run) -> dict[str, dict[str, Any]]:
    found = {path.stem: read_jsonl(path)[0] for path in sorted((stored.path / "entries").iterdir())}
    return {title: {k: v for k, v in row.items() if k not in MEASURED} for title, row in found.items()}


def weights(task: Experiment, root: Path) -> bytes:
    return (training_folder(task, root) / "arms" / task.name / "weights.safetensors").read_bytes()


def check_outcomes(outcomes: dict[Task, Any], root: Path) -> None:
    bad, *others = TASKS
    assert isinstance(outcomes.pop(bad), DivergedError)
    assert outcomes == dict.fromkeys(others)
    assert [is_stored(task, root) for task in TASKS] == [False, True, True]


def test_a_task_has_a_title():
    (entry, *_) = SUITE.entries()
    assert [title(entry), title(TASKS[1])] == ["vanilla, seed 0", "good, seed 0, to attack with"]


def test_one_process_reports_what_fails_and_does_the_others(tmp_path: Path):
    check_outcomes(dict(serial(TASKS, Place(root=tmp_path))), tmp_path)


@pytest.fixture
def _two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each process then has one thread, as this one, so that sums round alike."""
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1}, raising=False)


@pytest.mark.long
def test_a_process_that_the_system_kills_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pools, "_begin", os._exit)
    with pytest.raises(BitquorumError, match=r"expected 2 processes that live to the end, got one that was killed"):
        list(processes(2)(TASKS[1:], Place(root=tmp_path)))


@pytest.mark.long
def test_an_interrupt_ends_the_processes_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pools, "as_completed", interrupted)
    monkeypatch.setattr(pools, "_begin", linger)
    with pytest.raises(KeyboardInterrupt):
        list(processes(2)(TASKS[1:], Place(root=tmp_path)))
    begun = time.monotonic()
    for child in active_children():
        child.join(LINGER / 2)
    assert time.monotonic() - begun < LINGER / 2


@pytest.mark.slow
@pytest.mark.usefixtures("_two_cores")
def test_processes_report_what_fails_and_do_the_others(tmp_path: Path):
    heard = Heard()
    place = Place(root=tmp_path / "two", listener=heard)
    check_outcomes(dict(processes(2)(TASKS, place)), place.root)
    assert list(heard.notes) == [1, 2, 3]
    assert sorted(heard.notes.values()) == sorted(title(task) for task in TASKS)
    list(serial(TASKS[1:], Place(root=tmp_path / "one")))
    for task in TASKS[1:]:
        assert weights(task, tmp_path / "one") == weights(task, tmp_path / "two")


@pytest.mark.slow
@pytest.mark.usefixtures("_two_cores")
def test_processes_give_the_rows_of_one_and_report_an_entry_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    first, second = SUITE.entries()
    bad = replace(first, title="bad", experiment=TASKS[0])
    monkeypatch.setattr(Suite, "entries", lambda self, only=(): [bad, first, second])
    found = []
    for jobs in (1, 2):
        root = tmp_path / str(jobs)
        with pytest.raises(DataError, match=r"got 1 that failed, first bad, seed 0: expected a finite loss"):
            bench(SUITE, Place(root=root), jobs=jobs)
        (stored,) = root.glob("bench-tiny-*")
        found.append(rows(Run.open(stored)))
    assert found[0] == found[1]
    assert list(found[0]) == ["float-ensemble@0", "vanilla@0"]
