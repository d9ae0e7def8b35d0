"""Do the work of one entry: train it and what it is attacked with, climb the ladder, measure cost and detector."""

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import torch
from jaxtyping import Bool
from torch import Tensor

from bitquorum import kernels
from bitquorum.bench.measure import measure_detector, measure_time
from bitquorum.bench.suite import Entry
from bitquorum.config import Experiment
from bitquorum.data import load
from bitquorum.detect.detection import LEAST_CALIBRATION
from bitquorum.ensemble import Ensemble
from bitquorum.evaluate import Arena
from bitquorum.evaluate.complexity import complexity
from bitquorum.experiment import create, restore_ensemble, train
from bitquorum.experiment.ladder import climb_arm, examples_of, read_climb
from bitquorum.experiment.runs import judged
from bitquorum.files import atomic_write, json_row, read_jsonl
from bitquorum.interface import InputError, Listener
from bitquorum.registry import digest, encode, to_toml
from bitquorum.store import Run

CELLS: Final = "cells"  # folder of the trainings, below that of the runs


def work(
    entry: Entry,
    root: Path,
    *,
    device: str = "cpu",
    data_root: Path | None = None,
    listener: Listener | None = None,
) -> dict[str, Any]:
    """Return the row of an entry; what is stored below `root` is not computed again, and a kill loses little.

    Args:
        entry: What to train and attack.
        root: Folder of runs.
        device: Where to compute.
        data_root: Folder of data sets.
        listener: Hears of progress.

    Raises:
        BitquorumError: if data are missing or too few, another process works on the same entry, or a stored file is
            corrupt.
    """
    stored = create(entry.experiment, root / CELLS)
    path = entry_folder(entry, root) / "row.json"
    if not path.exists():
        listener = listener or Listener()
        test = load(entry.experiment.data.name, "test", root=data_root)
        left = len(test) - len(entry.ladder.choose(test))
        if left < LEAST_CALIBRATION:  # better known before the training
            raise InputError(
                f"expected at least {LEAST_CALIBRATION} test images beside those of the ladder, to set the detector's "
                f"threshold on, got {left} of {len(test)}; lower `examples`"
            )
        for experiment in (*entry.sources, entry.experiment):
            train(experiment, root / CELLS, device=device, data_root=data_root, listener=listener)
        with stored.lock(), kernels.use(entry.experiment.kernels):
            row = _measure(entry, stored, root, device, data_root, listener)
            stored.write_environment({"work": f"bench {entry.ladder.name}", "seconds": row["seconds"]})
            atomic_write(path, json_row(row))
    return read_jsonl(path)[0]


def entry_folder(entry: Entry, root: Path) -> Path:
    """Return where the row and the attacks of an entry lie: inside its training, by the entry's digest."""
    return training_folder(entry.experiment, root) / "bench" / digest(entry)


def training_folder(experiment: Experiment, root: Path) -> Path:
    """Return where a training lies."""
    return Run.place(root / CELLS, experiment.name, encode(experiment))


def _measure(
    entry: Entry,
    stored: Run,
    root: Path,
    device: str,
    data_root: Path | None,
    listener: Listener,
) -> dict[str, Any]:
    """Climb the ladder with the trained networks and return the row."""
    started = time.monotonic()
    folder, arm = entry_folder(entry, root), entry.experiment.arms[0]
    atomic_write(folder / "entry.toml", to_toml(encode(entry)))

    def restored(chosen: Experiment) -> Ensemble:
        found = restore_ensemble(chosen, chosen.arms[0], create(chosen, root / CELLS), data_root=data_root)
        return judged(found, chosen, chosen.arms[0], device)

    test = load(entry.experiment.data.name, "test", root=data_root)
    chosen = entry.ladder.choose(test)
    examples, ensemble = examples_of(chosen, device), restored(entry.experiment)
    sources = {source.name: restored(source) for source in entry.sources}
    climb_arm(folder / arm.name, entry.ladder, ensemble, sources, examples, listener)
    (path,) = (folder / arm.name).glob("climb@*.safetensors")
    climb, _ = read_climb(path)
    checks = read_jsonl(folder / arm.name / "verdicts.jsonl")
    arena = Arena(model=ensemble, shown=ensemble, examples=examples, ladder=entry.ladder, sources=sources)
    clean = arena.judge(examples.images, torch.arange(len(chosen), device=device)).cpu()
    return {
        "title": entry.title,
        "seed": entry.experiment.seed,
        "entry": digest(entry),
        "members": arm.precision,
        "adversarial": entry.adversarial,
        "epsilon": climb.epsilon,
        "ladder": entry.ladder.name,
        "draws": entry.ladder.draws,
        "broken_by": {step.rung: step.broke for step in climb.steps if step.broke},
        "forward": sum(step.cost.forward * step.attacked for step in climb.steps),
        "backward": sum(step.cost.backward * step.attacked for step in climb.steps),
        "checks": len(checks),
        "failed_checks": [check["name"] for check in checks if check["passed"] is False],
        "detector": measure_detector(entry, ensemble, test, chosen, climb.images),
        **asdict(complexity(ensemble, tuple(chosen.shape))),
        "train_seconds": _train_seconds(stored),
        "milliseconds": measure_time(ensemble, examples.images),
        "device": device,
        "threads": torch.get_num_threads(),
        "seconds": round(time.monotonic() - started, 1),
        "examples": chosen.index.tolist(),
        "clean": _rates(clean),
        "claim": _rates(climb.claim),
        "worst": _rates(climb.correct),
    }


def _train_seconds(stored: Run) -> float | None:
    """Return what the sessions of a training took; `None` where one was killed, of which no time is known."""
    sessions = [row.get("seconds") for row in stored.environments() if row.get("work") == "train"]
    known = [seconds for seconds in sessions if seconds is not None]
    return round(sum(known), 1) if len(known) == len(sessions) else None


def _rates(correct: Bool[Tensor, "draws images"]) -> list[float]:
    """Return the share of draws in which each image is right."""
    return [round(rate, 4) for rate in correct.float().mean(0).tolist()]
