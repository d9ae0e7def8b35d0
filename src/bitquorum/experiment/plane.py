"""Lay the arms of a stored run into the adversarial information plane, and store what was seen."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import torch

from bitquorum import rng
from bitquorum.config import Arm, Experiment
from bitquorum.data import ImageSet
from bitquorum.ensemble import Ensemble
from bitquorum.evaluate import Evaluation, observe
from bitquorum.experiment.runs import experiment_of, restored, working
from bitquorum.experiment.threats import (
    Threat,
    attacks,
    clean,
    climbers,
    evaluated_images,
    everyday,
    is_complete,
    ladder_worst,
    pinned,
    transfers,
)
from bitquorum.files import atomic_write, load_tensors, read_jsonl, save_tensors, write_jsonl
from bitquorum.interface import Listener
from bitquorum.plane import Plane, correlation_rows, layer_rows, place
from bitquorum.registry import digest, encode, to_toml
from bitquorum.store import Run

_SHOWN: Final = 12  # images kept of each threat, for the page
_MEASURED: Final = 16  # images on which noise and rate of the layers are computed


def plane_run(
    stored: Run,
    plane: Plane,
    *,
    device: str = "cpu",
    data_root: Path | None = None,
    listener: Listener | None = None,
) -> tuple[Plane, list[dict[str, Any]]]:
    """Lay every arm into the plane and return the completed plane and its rows.

    Only predictions are computed: attacks are read from the store. A killed call resumes after the last threat.

    Args:
        stored: A run with a complete evaluation.
        plane: What to lay into it; an empty evaluation becomes the run's own, ladders of `None` all that are stored.
        device: Where to compute.
        data_root: Folder of data sets.
        listener: Hears of progress.

    Raises:
        BitquorumError: if the run is not evaluated, data are missing, or a stored file is corrupt.
    """
    experiment = experiment_of(stored)
    plane, evaluation = pinned(stored, plane)
    folder = plane_folder(stored, plane)
    climbed = climbers(stored, plane)
    if is_complete(folder, climbed):
        return plane, read_jsonl(folder / "metrics.jsonl")
    listener = listener or Listener()
    with working(stored, experiment, "plane"):
        atomic_write(folder / "plane.toml", to_toml(encode(plane)))
        test = evaluated_images(stored, evaluation, data_root)
        rows: list[dict[str, Any]] = []
        layers: list[dict[str, Any]] = []
        for arm, ensemble in restored(experiment, stored, device=device, data_root=data_root):
            common = {"arm": arm.name, "members": arm.precision, "split": "test"}
            threats = list(_threats(stored, experiment, evaluation, arm, plane, test))
            listener.begin(f"plane {arm.name}", len(threats))
            for count, threat in enumerate(threats, start=1):
                point = _point(folder / arm.name / threat.file, threat, ensemble, test, plane)
                facts = {"threat": threat.label, "kind": threat.kind, "axis": threat.axis, "level": threat.level}
                rows.append({**common, **facts, **point})
                listener.advance(count, threat.label)
            listener.end()
            few = test.batch(torch.arange(min(_MEASURED, len(test))), device=device)
            layers += [
                {"arm": arm.name, **row} for row in layer_rows(ensemble, few.images, few.examples, seed=plane.seed)
            ]
        correlations = correlation_rows(rows, permutations=plane.permutations, seed=plane.seed)
        parts = {"correlations": correlations, "layers": layers, "ladders": climbed, "metrics": rows}
        for name, found_rows in parts.items():  # metrics last: they say that all is done
            write_jsonl(folder / f"{name}.jsonl", found_rows)
    return plane, rows


def plane_folder(stored: Run, plane: Plane) -> Path:
    """Return the folder of a plane: each has its own, named by its digest."""
    return stored.path / "planes" / digest(plane)


def correlations_of(stored: Run, plane: Plane) -> list[dict[str, Any]]:
    """Return the stored correlations of a completed plane."""
    return read_jsonl(plane_folder(stored, plane) / "correlations.jsonl")


def _threats(
    stored: Run, experiment: Experiment, evaluation: Evaluation, arm: Arm, plane: Plane, test: ImageSet
) -> Iterator[Threat]:
    yield clean(test)
    yield from attacks(stored, evaluation, arm)
    yield from ladder_worst(stored, arm, test, plane.ladders or ())
    if plane.transfer:
        yield from transfers(stored, experiment, evaluation, arm)
    yield from everyday(test, plane, evaluation.epsilons)


def _point(path: Path, threat: Threat, ensemble: Ensemble, test: ImageSet, plane: Plane) -> dict[str, Any]:
    if not path.exists():
        images = threat.images()
        logits = observe(
            ensemble,
            images,
            test.index,
            draws=plane.draws * ensemble.passes,
            seed=rng.derive(plane.seed, "plane"),
        )
        facts = {"threat": threat.label, "kind": threat.kind, "axis": threat.axis, "level": repr(threat.level)}
        save_tensors(path, {"logits": logits, "labels": test.labels, "images": images[:_SHOWN]}, facts)
    return place(ensemble, load_tensors(path)[0]["logits"], test.labels)
