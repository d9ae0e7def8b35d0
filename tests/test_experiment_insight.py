"""Test that the plane and the detectors of a stored run are read from what its attacks left, resume, and refuse."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bitquorum import experiment
from bitquorum.attacks import FGSM, PGD
from bitquorum.config import Experiment, parse
from bitquorum.detect import Detection, Evasive, MaxSoftmax, PointwiseMI, PredictionMI
from bitquorum.evaluate import Ladder, SequentialTest
from bitquorum.experiment import detect as detect_module
from bitquorum.experiment import plane as plane_module
from bitquorum.experiment import threats
from bitquorum.experiment.ladder import ladder_folder
from bitquorum.files import load_tensors, read_jsonl, save_tensors
from bitquorum.interface import DataError, Listener
from bitquorum.plane import Plane
from bitquorum.registry import digest, encode, to_toml
from bitquorum.report import (
    correlation_table,
    detection_table,
    detectors,
    plane_table,
    profiles,
    rejection_table,
    rejections,
)
from bitquorum.store import Run

pytestmark = pytest.mark.long

TABLE: dict[str, Any] = {
    "name": "tiny",
    "data": {"train": 300},
    "trainer": {"epochs": 4, "batch_size": 20, "lr": 0.05, "calibration": 10},
    "evaluation": {
        "epsilons": ["16/255", "48/255"],
        "examples": 40,
        "draws": 2,
        "attacks": [{"type": "fgsm"}, {"type": "pgd", "steps": 4, "eot": 2}],
    },
    "arms": [
        {"name": "plain", "network": {"type": "linear"}},
        {
            "name": "sq",
            "network": {"type": "linear"},
            "members": [{"weight_bits": 4, "activation_bits": 2}, {"weight_bits": 2, "activation_bits": 4}],
        },
    ],
}
PLANE = Plane(corruptions=("blur", "contrast"), severities=(2, 5), draws=4, permutations=50)
DETECTION = Detection(
    statistics=(PredictionMI(), PointwiseMI(), MaxSoftmax()),
    passes=3,
    calibration=120,
    evaded=(PredictionMI(), MaxSoftmax()),
    aware=Evasive(steps=3, rounds=2, targets=1, looks=1),
    aware_images=20,
)
LADDER = Ladder(
    name="tiny",
    claim=PGD(steps=2),
    rungs=(FGSM(),),
    epsilons=(48 / 255,),
    examples=60,
    draws=4,
    tries=2,
    check_images=0,
    survivors=SequentialTest(least=2, most=4),
)


class StopError(Exception):
    """End the work in the middle."""


class StopAt(Listener):
    def __init__(self, count: int) -> None:
        self.count = count

    def advance(self, done: int, note: str = "") -> None:
        self.count -= 1
        if self.count == 0:
            raise StopError


@pytest.fixture(scope="module")
def config() -> Experiment:
    return parse(TABLE)


@pytest.fixture(scope="module")
def run(config: Experiment, tmp_path_factory: pytest.TempPathFactory) -> Run:
    stored = experiment.run(config, tmp_path_factory.mktemp("insight"))
    experiment.climb_run(stored, LADDER, arms=["sq"])
    return stored


@pytest.fixture(scope="module")
def laid(run: Run) -> tuple[Plane, list[dict[str, Any]]]:
    return experiment.plane_run(run, PLANE)


@pytest.fixture(scope="module")
def measured(run: Run) -> tuple[Detection, list[dict[str, Any]]]:
    return experiment.detect_run(run, DETECTION)


@pytest.fixture
def copied(run: Run, tmp_path: Path) -> Run:
    target = tmp_path / run.path.name
    shutil.copytree(run.path, target, ignore=shutil.ignore_patterns("planes", "detections"))
    return Run(path=target)


def test_every_threat_of_an_arm_is_a_point(laid: tuple[Plane, list[dict[str, Any]]], run: Run):
    _, rows = laid
    points = [(row["threat"], round(row["level"] * 255 if row["axis"] == "epsilon" else row["level"])) for row in rows]
    attack = ["FGSM", "EOT-PGD-4x2"]
    mine = [("clean", 0), *((name, level) for name in attack for level in (16, 48))]
    everyday = [("random corners", 16), ("random corners", 48)]
    everyday += [(name, level) for name in ("blur", "contrast") for level in (2, 5)]
    plain = [*mine, *(("from sq: EOT-PGD-4x2", level) for level in (16, 48)), *everyday]
    sq = [*mine, ("ladder tiny: worst", 48), *(("from plain: EOT-PGD-4x2", level) for level in (16, 48)), *everyday]
    assert points == plain + sq
    assert all(row["pair_mi"] is None for row in rows if row["arm"] == "plain")
    kinds = {row["threat"]: row["kind"] for row in rows}
    assert (kinds["FGSM"], kinds["from plain: EOT-PGD-4x2"], kinds["blur"]) == ("white-box", "transfer", "corruption")


def test_ladders_of_one_name_are_told_apart(copied: Run, config: Experiment):
    (ladder,) = experiment.ladders(copied)
    other = replace(ladder, seed=ladder.seed + 1)
    folder = ladder_folder(copied, other)
    shutil.copytree(ladder_folder(copied, ladder), folder)
    (folder / "ladder.toml").write_text(to_toml(encode(other)))
    test = threats.evaluated_images(copied, threats.chosen_evaluation(copied), None)
    found = threats.ladder_worst(copied, config.arms[-1], test, [digest(ladder), digest(other)])
    assert {threat.label for threat in found} == {f"ladder tiny {digest(kind)}: worst" for kind in (ladder, other)}
    assert len({threat.file for threat in found}) == len(found)
    (folder / "ladder.toml").write_text(to_toml(encode(replace(other, norm="l2"))))
    both = [digest(kind) for kind in experiment.ladders(copied)]
    assert len(both) == 2
    assert len(threats.ladder_worst(copied, config.arms[-1], test, both)) == len(found) // 2
    (folder / "ladder.toml").write_text(to_toml(encode(other)))
    alone = threats.ladder_worst(copied, config.arms[-1], test, [digest(other)])
    assert {threat.label for threat in alone} == {"ladder tiny: worst"}


def test_a_ladder_on_its_way_is_not_laid_into_the_plane(copied: Run, config: Experiment):
    (ladder,) = experiment.ladders(copied)
    test = threats.evaluated_images(copied, threats.chosen_evaluation(copied), None)
    folder = ladder_folder(copied, ladder)
    assert threats.pinned(copied, PLANE)[0].ladders == (digest(ladder),)
    (folder / "sq" / "verdicts.jsonl").unlink()
    assert threats.pinned(copied, PLANE)[0].ladders == ()
    assert threats.ladder_worst(copied, config.arms[-1], test, [digest(ladder)]) == []
    with pytest.raises(DataError, match=rf"climbed to the end among \(none\), got '{digest(ladder)}'"):
        threats.pinned(copied, replace(PLANE, ladders=(digest(ladder),)))


def test_an_arm_that_climbs_later_is_laid_into_the_plane_and_measured(copied: Run):
    small = replace(PLANE, corruptions=(), transfer=False, draws=2)
    fast = replace(DETECTION, evaded=(), statistics=(MaxSoftmax(),))

    def climbed() -> list[set[str]]:
        found = experiment.plane_run(copied, small)[1], experiment.detect_run(copied, fast)[1]
        return [{row["arm"] for row in rows if row.get("threat") == "ladder tiny: worst"} for rows in found]

    assert climbed() == [{"sq"}, {"sq"}]
    experiment.climb_run(copied, LADDER, arms=["plain"])
    assert climbed() == [{"plain", "sq"}] * 2
    for folder in (*copied.path.glob("planes/*"), *copied.path.glob("detections/*")):
        (folder / "ladders.jsonl").unlink()  # as an earlier version left them
    assert climbed() == [{"plain", "sq"}] * 2


def test_an_arm_that_climbs_while_a_detection_is_cut_is_measured(copied: Run):
    fast = replace(DETECTION, evaded=(), statistics=(MaxSoftmax(),))

    class Cut(Listener):
        def begin(self, task: str, total: int) -> None:
            if task == "detect sq":
                raise StopError

    with pytest.raises(StopError):
        experiment.detect_run(copied, fast, listener=Cut())
    experiment.climb_run(copied, LADDER, arms=["plain"])
    rows = experiment.detect_run(copied, fast)[1]
    assert {row["arm"] for row in rows if row.get("threat") == "ladder tiny: worst"} == {"plain", "sq"}
    (folder,) = copied.path.glob("detections/*")
    assert not list(folder.glob("*/*.jsonl"))


def test_points_agree_with_the_evaluation_that_made_the_images(
    laid: tuple[Plane, list[dict[str, Any]]], run: Run, config: Experiment
):
    stored = {(row["arm"], row["attack"], row["epsilon"]): row["value"] for row in experiment.results(run)}
    for row in laid[1]:
        if row["kind"] in ("clean", "white-box"):
            value = stored[row["arm"], row["threat"], row["level"]]
            assert abs(row["accuracy"] - value) < (1e-9 if row["arm"] == "plain" else 0.12), row["threat"]


def test_the_points_are_those_of_the_stored_logits(laid: tuple[Plane, list[dict[str, Any]]], run: Run):
    plane, rows = laid
    folder = plane_module.plane_folder(run, plane)
    tensors, facts = load_tensors(folder / "sq" / "FGSM@0.188235.safetensors")
    assert facts == {"threat": "FGSM", "kind": "white-box", "axis": "epsilon", "level": repr(48 / 255)}
    assert tensors["logits"].shape == (4, 2, 40, 10)
    assert tensors["images"].shape[0] == 12
    right = (tensors["logits"].softmax(-1).mean(1).argmax(-1) == tensors["labels"]).float().mean()
    row = next(r for r in rows if r["arm"] == "sq" and r["threat"] == "FGSM" and r["level"] > 0.1)
    assert row["accuracy"] == pytest.approx(float(right))
    layers = read_jsonl(folder / "layers.jsonl")
    assert {(row["arm"], row["member"], row["role"]) for row in layers} == {("sq", 0, "weight"), ("sq", 1, "weight")}


def test_a_plane_that_is_cut_ends_in_the_same_bytes(laid: tuple[Plane, list[dict[str, Any]]], run: Run, copied: Run):
    with pytest.raises(StopError):
        experiment.plane_run(copied, PLANE, listener=StopAt(17))
    again, _ = experiment.plane_run(copied, PLANE)
    assert again == laid[0]
    for name in ("metrics", "correlations", "layers"):
        first, second = (plane_module.plane_folder(stored, again) / f"{name}.jsonl" for stored in (run, copied))
        assert first.read_bytes() == second.read_bytes()
    assert experiment.plane_run(copied, PLANE, listener=StopAt(1))[1] == laid[1], "a complete plane is only read"


def test_detection_knows_plain_attacks_ladders_and_evasions(measured: tuple[Detection, list[dict[str, Any]]]):
    detection, rows = measured
    assert detection.ladders
    found = {(r["arm"], r["statistic"], r["threat"], r["aware"]) for r in rows if r["name"] == "detection"}
    assert ("sq", "prediction-mi", "ladder tiny: worst", False) in found
    assert ("sq", "prediction-mi", "Evasive-3x2 r2 t1", True) in found
    assert ("sq", "pointwise-mi", "Evasive-3x2 r2 t1", True) not in found, "nobody evaded this one"
    assert ("plain", "max-softmax", "Evasive-3x1 r2 t1", True) in found
    assert not [key for key in found if key[0] == "plain" and key[1] != "max-softmax"], "one view has no pairs"
    assert {row["calibration"] for row in rows} == {120}
    aware = [row for row in rows if row["name"] == "detection" and row["aware"]]
    assert {(round(row["level"] * 255), row["images"]) for row in aware} == {(48, 20)}


def test_evasions_stay_in_the_ball(measured: tuple[Detection, list[dict[str, Any]]], run: Run, config: Experiment):
    folder = detect_module.detection_folder(run, measured[0])
    tensors, _ = load_tensors(folder / "sq" / "evade-max-softmax@0.188235.safetensors")
    test = config.evaluation.choose(experiment.evaluated_images(run, config.evaluation, None))
    clean = test.batch(torch.arange(0, 40, 2)).images
    moved = (tensors["images"] - clean).abs()
    assert 0 < float(moved.max()) <= 48 / 255 + 1e-6


def test_a_detection_that_is_cut_ends_in_the_same_bytes(
    measured: tuple[Detection, list[dict[str, Any]]], run: Run, copied: Run
):
    with pytest.raises(StopError):
        experiment.detect_run(copied, DETECTION, listener=StopAt(10))
    again, _ = experiment.detect_run(copied, DETECTION)
    for name in ("metrics", "curves"):
        first, second = (detect_module.detection_folder(stored, again) / f"{name}.jsonl" for stored in (run, copied))
        assert first.read_bytes() == second.read_bytes()


def test_tables_show_what_was_stored(
    laid: tuple[Plane, list[dict[str, Any]]], measured: tuple[Detection, list[dict[str, Any]]], run: Run
):
    assert len(plane_table(laid[1], "sq").rows) == sum(row["arm"] == "sq" for row in laid[1])
    assert {row[0] for row in profiles(laid[1]).rows} == {"plain", "sq"}
    assert {row[1] for row in correlation_table(experiment.correlations_of(run, laid[0])).rows} >= {"pooled", "FGSM"}
    rows = measured[1]
    few = experiment.last_attack(run, measured[0], rows)
    assert {row[1] for row in detection_table(few, "plain").rows} == {
        "EOT-PGD-4x2",
        "Evasive-3x1 r2 t1 (knows the detector)",
    }
    assert {row[2] for row in rejection_table(rows, "sq").rows} == {"plain", "all"}
    assert {row[3] for row in rejections(rows).rows} == {"plain", "all"}
    assert {row[0] for row in detectors(rows).rows} == {"plain", "sq"}


def test_what_is_missing_is_said(copied: Run, tmp_path: Path, config: Experiment):
    with pytest.raises(DataError, match="expected a stored evaluation among"):
        experiment.plane_run(copied, replace(PLANE, evaluation="abc"))
    folder = next((copied.path / "evaluations").iterdir())
    path = next((folder / "sq").glob("FGSM*"))
    tensors, facts = load_tensors(path)
    save_tensors(path, {name: value for name, value in tensors.items() if name != "images"}, facts)
    with pytest.raises(DataError, match="an earlier version did not keep them"):
        experiment.plane_run(copied, PLANE)
    (folder / "metrics.jsonl").unlink()
    with pytest.raises(DataError, match="run `bitquorum evaluate"):
        experiment.detect_run(copied, DETECTION)


def test_a_detection_needs_images_that_the_evaluation_left_out(copied: Run, monkeypatch: pytest.MonkeyPatch):
    everything = experiment.evaluated_images(copied, experiment.experiment_of(copied).evaluation, None)
    monkeypatch.setattr(detect_module, "load", lambda *_, **__: everything)
    with pytest.raises(DataError, match="expected at least 100 test images that the evaluation left out, got 0"):
        experiment.detect_run(copied, DETECTION)


def test_rows_are_plain_json(
    laid: tuple[Plane, list[dict[str, Any]]], measured: tuple[Detection, list[dict[str, Any]]]
):
    for row in (*laid[1], *measured[1]):
        json.dumps(row, allow_nan=False)
