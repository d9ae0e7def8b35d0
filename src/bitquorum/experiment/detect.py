"""Measure detectors on the arms of a stored run: calibrate, score attacked images, attack the detectors, store all."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from bitquorum import rng
from bitquorum.config import Arm
from bitquorum.data import ImageSet, load
from bitquorum.detect import Detection, Detector, Evasive, InputStatistic, Observed, detect
from bitquorum.detect.calibration import has_pairs
from bitquorum.detect.detection import LEAST_CALIBRATION
from bitquorum.ensemble import Ensemble
from bitquorum.evaluate import Evaluation, observe
from bitquorum.experiment.ladder import middle
from bitquorum.experiment.runs import experiment_of, restored, working
from bitquorum.experiment.threats import (
    Threat,
    attacks,
    chosen_evaluation,
    clean,
    climbers,
    evaluated_images,
    is_complete,
    ladder_worst,
    pinned,
)
from bitquorum.files import atomic_write, load_tensors, read_jsonl, save_tensors, write_jsonl
from bitquorum.interface import DataError, Listener
from bitquorum.registry import digest, encode, to_toml
from bitquorum.store import Run

_PARTS: Final = ("metrics", "curves")


def detect_run(
    stored: Run,
    detection: Detection,
    *,
    device: str = "cpu",
    data_root: Path | None = None,
    listener: Listener | None = None,
) -> tuple[Detection, list[dict[str, Any]]]:
    """Measure detectors on every arm and return the completed detection and its rows.

    Thresholds come from test images that the evaluation left out. Attacks that know of no detector are read from the
    store; those that evade one are run here. A killed call resumes after the last threat.

    Args:
        stored: A run with a complete evaluation.
        detection: What to measure; an empty evaluation becomes the run's own, ladders of `None` all that are stored.
        device: Where to compute.
        data_root: Folder of data sets.
        listener: Hears of progress.

    Raises:
        BitquorumError: if the run is not evaluated, too few images were left out, data are missing, or a stored file
            is corrupt.
    """
    experiment = experiment_of(stored)
    detection, evaluation = pinned(stored, detection)
    folder = detection_folder(stored, detection)
    climbed = climbers(stored, detection)
    if is_complete(folder, climbed):
        return detection, read_jsonl(folder / "metrics.jsonl")
    with working(stored, experiment, "detect"):
        atomic_write(folder / "detection.toml", to_toml(encode(detection)))
        test = evaluated_images(stored, evaluation, data_root)
        held_out = _held_out(stored, test, detection, data_root)
        for arm, ensemble in restored(experiment, stored, device=device, data_root=data_root):
            bench = _Bench(
                stored=stored,
                arm=arm,
                ensemble=ensemble,
                evaluation=evaluation,
                detection=detection,
                test=test,
                folder=folder / arm.name,
            )
            known = read_jsonl(bench.folder / "ladders.jsonl")
            if not (bench.folder / "curves.jsonl").exists() or known != climbed:
                bench.measure(held_out, listener or Listener())
                write_jsonl(bench.folder / "ladders.jsonl", climbed)
        arms = [folder / arm.name for arm in experiment.arms]
        write_jsonl(folder / "ladders.jsonl", climbed)
        for part in reversed(_PARTS):  # metrics last: they say that all is done
            rows = [row for arm in arms for row in read_jsonl(arm / f"{part}.jsonl")]
            write_jsonl(folder / f"{part}.jsonl", rows)
        for arm in arms:  # held by the whole now
            for name in (*_PARTS, "ladders"):
                (arm / f"{name}.jsonl").unlink(missing_ok=True)
    return detection, read_jsonl(folder / "metrics.jsonl")


def detection_folder(stored: Run, detection: Detection) -> Path:
    """Return the folder of a detection: each has its own, named by its digest."""
    return stored.path / "detections" / digest(detection)


def _held_out(stored: Run, test: ImageSet, detection: Detection, data_root: Path | None) -> ImageSet:
    """Return clean test images that the evaluation left out."""
    everything = load(experiment_of(stored).data.name, "test", root=data_root)
    left = (~torch.isin(everything.index, test.index)).nonzero()[:, 0]
    if len(left) < LEAST_CALIBRATION:
        raise DataError(
            f"expected at least {LEAST_CALIBRATION} test images that the evaluation left out, got {len(left)}; "
            "evaluate on fewer images: `bitquorum evaluate RUN examples=...`, then `--set evaluation=DIGEST`"
        )
    rest = everything.select(left)
    return rest.take(min(detection.calibration, len(rest)), seed=rng.derive(detection.seed, "held out"))


@dataclass(frozen=True, kw_only=True, eq=False)
class _Bench:
    """Bring together what is measured on one arm."""

    stored: Run
    arm: Arm
    ensemble: Ensemble
    evaluation: Evaluation
    detection: Detection
    test: ImageSet
    folder: Path

    def measure(self, held_out: ImageSet, listener: Listener) -> None:
        """Observe every threat, attack the detectors, and store the rows of the arm."""
        calibration = self._observed(clean(held_out), held_out, "calibration")
        before = self._observed(clean(self.test), self.test, "test")
        plain = [
            *attacks(self.stored, self.evaluation, self.arm),
            *ladder_worst(self.stored, self.arm, self.test, self.detection.ladders or ()),
        ]
        evasions = list(self._evasions(calibration))
        listener.begin(f"detect {self.arm.name}", len(plain) + len(evasions))
        attacked = []
        for threat in plain:
            attacked.append(self._observed(threat, self.test, "test"))
            listener.advance(len(attacked), threat.label)
        for statistic, attack, epsilon in evasions:
            attacked.append(self._evaded(calibration, statistic, attack, epsilon))
            listener.advance(len(attacked), f"{attack.label} against {statistic.name}")
        listener.end()
        found = detect(self.detection, self.ensemble.aggregation, calibration, before, attacked)
        common = {"arm": self.arm.name, "members": self.arm.precision, "split": "test"}
        for part, rows in zip(_PARTS, found, strict=True):  # curves last: they say that the arm is done
            write_jsonl(self.folder / f"{part}.jsonl", [{**common, **row} for row in rows])

    def _observed(self, threat: Threat, images: ImageSet, purpose: str) -> Observed:
        path = self.folder / f"{purpose}-{threat.file}"
        logits = self._logits(path, threat.images, images.index, purpose, keep=False)
        return Observed(logits=logits, labels=images.labels, threat=threat.label, kind=threat.kind, level=threat.level)

    def _logits(self, path: Path, images: Callable[[], Tensor], index: Tensor, purpose: str, *, keep: bool) -> Tensor:
        """Return what the ensemble says of images, stored once; images made here are kept beside it."""
        if not path.exists():
            shown, seed = images(), rng.derive(self.detection.seed, "detect", purpose)
            logits = observe(self.ensemble, shown, index, draws=self.detection.passes, seed=seed)
            save_tensors(path, {"logits": logits, "examples": index, **({"images": shown} if keep else {})})
        return load_tensors(path)[0]["logits"]

    def _evasions(self, calibration: Observed) -> Iterator[tuple[InputStatistic, Evasive, float]]:
        attack = self.detection.aware
        if attack is None:
            return
        if not self.ensemble.stochastic:
            attack = replace(attack, eot=1, looks=1)
        for statistic in self.detection.evasions:
            if has_pairs(statistic, calibration.logits):
                for epsilon in self.detection.aware_epsilons or middle(self.evaluation.epsilons):
                    yield statistic, attack, epsilon

    def _evaded(self, calibration: Observed, statistic: InputStatistic, attack: Evasive, epsilon: float) -> Observed:
        """Return what the arm says of images that evade one statistic, at the laxest rate of false positives."""
        rows = _spread(len(self.test), self.detection.aware_images)
        chosen = self.test.select(rows)

        def images() -> Tensor:
            device = next(self.ensemble.parameters()).device
            detector = Detector.fit(
                statistic,
                calibration.logits.to(device),
                false_positives=max(self.detection.false_positives),
                aggregation=self.ensemble.aggregation,
            )
            found = []
            for batch in chosen.batches(100, device=device):
                seed = rng.derive(self.detection.seed, "evade", statistic.name, repr(epsilon))
                result = attack(
                    self.ensemble,
                    batch.images,
                    batch.labels,
                    epsilon=epsilon,
                    detector=detector,
                    examples=batch.examples,
                    seed=seed,
                )
                found.append(result.images.cpu())
            return torch.cat(found)

        path = self.folder / f"evade-{statistic.name}@{epsilon:.6f}.safetensors"
        return Observed(
            logits=self._logits(path, images, chosen.index, "test", keep=True),
            labels=chosen.labels,
            threat=attack.label,
            kind=attack.kind,
            level=epsilon,
            against=statistic.name,
            rows=rows,
        )


def _spread(total: int, count: int) -> Tensor:
    """Return positions spread evenly, so that every class keeps about its share."""
    return torch.arange(min(total, count)) * total // min(total, count)


def last_attack(stored: Run, detection: Detection, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows without the threats other than the evaluation's last attack and those that know the detector."""
    last = chosen_evaluation(stored, detection.evaluation).attacks[-1].label
    return [row for row in rows if row["name"] != "detection" or row["aware"] or row["threat"] == last]
