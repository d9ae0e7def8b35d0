"""Test that an experiment is stored whole, resumes to the same bits and never computes a thing twice."""

import errno
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bitquorum.config import Arm, Experiment, parse
from bitquorum.data import load
from bitquorum.ensemble import Ensemble
from bitquorum.evaluate import Evaluation
from bitquorum.experiment import (
    build,
    create,
    ensembles,
    evaluate,
    experiment_of,
    progress_of,
    restore_ensemble,
    results,
    run,
    train,
    training_images,
)
from bitquorum.experiment import runs as module
from bitquorum.files import atomic_write, load_tensors, read_jsonl, save_tensors
from bitquorum.interface import DataError, InputError, Listener, MissingDataError
from bitquorum.registry import encode, to_toml
from bitquorum.store import Run
from bitquorum.train import Progress, Trainer
from bitquorum.zoo import DigitsNet, Linear

pytestmark = pytest.mark.long

TABLE: dict[str, Any] = {
    "name": "tiny",
    "data": {"name": "digits", "train": 60},
    "trainer": {
        "epochs": 1,
        "batch_size": 10,
        "lr": 0.05,
        "ema": 0.9,
        "augment": {"crop": 1},
        "log_every": 2,
        "calibration": 20,
        "checkpoint_seconds": 0,
    },
    "evaluation": {
        "epsilons": ["8/255", "32/255"],
        "examples": 20,
        "draws": 2,
        "batch_size": 20,
        "attacks": [{"type": "fgsm"}, {"type": "pgd", "steps": 2, "eot": 2}],
    },
    "arms": [
        {"name": "vanilla", "network": {"type": "linear"}},
        {
            "name": "sq",
            "network": {"type": "digitsnet", "width": 4},
            "members": [{"weight_bits": 4, "activation_bits": 4}, {"weight_bits": 3, "activation_bits": 2}],
            "objective": {"terms": [{"type": "member-cross-entropy"}, {"type": "conditional-mi", "weight": 0.1}]},
        },
    ],
}
TINY = parse(TABLE)
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


class StopError(Exception):
    """End a work from its listener."""


class Stopper(Listener):
    """Raise at a chosen moment of a chosen task."""

    def __init__(self, task: str, at: int) -> None:
        self.task, self.at, self.now = task, at, ""

    def begin(self, task: str, total: int) -> None:
        self.now = task

    def advance(self, done: int, note: str = "") -> None:
        if self.now == self.task and done == self.at:
            raise StopError


class Steps(Listener):
    """Remember the first step of a training that is reported."""

    first = 0

    def advance(self, done: int, note: str = "") -> None:
        self.first = self.first or done


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run(TINY, tmp_path_factory.mktemp("finished"))


@pytest.fixture
def copied(finished: Run, tmp_path: Path) -> Run:
    target = tmp_path / "copied" / finished.path.name
    shutil.copytree(finished.path, target)
    return Run.open(target)


def contents(stored: Run) -> dict[str, bytes]:
    """Return all that a run computed; its environment also holds times."""
    paths = sorted(path for path in stored.path.rglob("*") if path.is_file())
    kept = {str(path.relative_to(stored.path)): path.read_bytes() for path in paths if path.suffix != ".json"}
    return {name: content for name, content in kept.items() if not name.endswith((".lock", ".part"))}


def fail(*_: Any, **__: Any) -> Any:
    raise AssertionError("nothing was to be computed")


def test_a_run_holds_config_weights_progress_outcomes_and_environment(finished: Run, tmp_path: Path):
    assert experiment_of(finished) == TINY
    assert progress_of(finished) == "complete"
    finished.publish(tmp_path / "published")
    assert progress_of(Run.open(tmp_path / "published")) == "complete"
    for arm in TINY.arms:
        folder = finished.path / "arms" / arm.name
        assert [row["step"] for row in read_jsonl(folder / "train.jsonl")] == [2, 4, 6]
        assert {path.name for path in folder.iterdir()} == {"train.jsonl", "weights.safetensors"}
    (row,) = finished.environments()
    assert (row["work"], row["ended"]) == ("run", "done")


def test_rows_state_the_accuracy_with_all_that_belongs_to_it(finished: Run):
    rows = results(finished)
    cells = [(row["attack"], round(row["epsilon"] * 255)) for row in rows if row["arm"] == "sq"]
    names = ("FGSM", "EOT-PGD-2x2", "worst")
    assert sorted(cells) == sorted([("clean", 0), *((name, epsilon) for name in names for epsilon in (8, 32))])
    assert [row["arm"] for row in rows] == ["vanilla"] * 7 + ["sq"] * 7
    passes = {"clean": 0, "FGSM": 1, "EOT-PGD-2x2": 4, "worst": 5}
    for row in rows:
        assert 0 <= row["low"] <= row["value"] <= row["high"] <= 1
        assert (row["images"], row["draws"], row["split"]) == (20, 2, "test")
        assert row["forward"] == row["backward"] == passes[row["attack"]]
        assert row["largest_perturbation"] <= row["epsilon"] + 1e-6
    found = {(row["arm"], row["attack"], row["epsilon"]): row["value"] for row in rows}
    for (arm, attack, epsilon), value in found.items():
        if attack == "worst":
            assert value <= min(found[arm, name, epsilon] for name in names[:2])


def test_stored_outcomes_give_the_stored_rows(finished: Run):
    for path in finished.path.glob("evaluations/*/*/*.safetensors"):
        tensors, facts = load_tensors(path)
        (value,) = [
            row["value"]
            for row in results(finished)
            if (row["arm"], row["attack"], row["epsilon"])
            == (path.parent.name, facts["attack"], float(facts["epsilon"]))
        ]
        assert float(tensors["correct"].double().mean()) == pytest.approx(value, abs=1e-12)


def test_again_computes_nothing(copied: Run, monkeypatch: pytest.MonkeyPatch):
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in copied.path.rglob("*") if path.is_file()}
    monkeypatch.setattr(Trainer, "__call__", fail)
    monkeypatch.setattr(Evaluation, "__call__", fail)
    monkeypatch.setattr(module, "load", fail)
    root = copied.path.parent
    assert run(TINY, root) == train(TINY, root) == copied
    assert evaluate(copied, TINY.evaluation) == results(copied)
    after = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in copied.path.rglob("*") if path.is_file()}
    assert after == before


def test_an_evaluation_of_before_a_field_was_there_is_found(copied: Run, monkeypatch: pytest.MonkeyPatch):
    (folder,) = copied.path.glob("evaluations/*")
    text = (folder / "evaluation.toml").read_text()
    shorter = text.replace("momentum = 0.0\n", "")
    assert shorter != text
    (folder / "evaluation.toml").write_text(shorter)
    folder.rename(folder.parent / "0123456789ab")
    monkeypatch.setattr(Evaluation, "__call__", fail)
    assert evaluate(copied, TINY.evaluation) == results(copied)
    assert results(copied)
    assert progress_of(copied) == "complete"


def test_lost_rows_come_back_from_the_outcomes(copied: Run, finished: Run, monkeypatch: pytest.MonkeyPatch):
    (path,) = copied.path.glob("evaluations/*/metrics.jsonl")
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    monkeypatch.setattr(Trainer, "__call__", fail)
    monkeypatch.setattr("bitquorum.evaluate.evaluation.judge", fail)
    run(TINY, copied.path.parent)
    assert contents(copied) == contents(finished)


def test_the_same_seed_gives_the_same_bits_and_another_seed_others(finished: Run, tmp_path: Path):
    torch.manual_seed(123)  # the state of torch's generator is not the seed
    train(TINY, tmp_path)
    assert contents(run(TINY, tmp_path)) == contents(finished)
    other = train(replace(TINY, seed=1), tmp_path)
    assert other.path.name != finished.path.name
    for arm in ("vanilla", "sq"):
        name = f"arms/{arm}/weights.safetensors"
        assert contents(other)[name] != contents(finished)[name]


@pytest.mark.parametrize(
    ("task", "at"),
    [("train vanilla", 2), ("train sq", 2), ("train sq", 4), ("train sq", 6), ("attack vanilla", 2), ("attack sq", 5)],
)
def test_interrupted_work_resumes_to_the_same_bits(task: str, at: int, finished: Run, tmp_path: Path):
    with pytest.raises(StopError):
        run(TINY, tmp_path, listener=Stopper(task, at))
    stored = create(TINY, tmp_path)
    assert contents(stored) != contents(finished)
    assert progress_of(stored) != "complete"
    assert stored.environments()[-1]["ended"] == "interrupted"
    run(TINY, tmp_path)
    assert contents(stored) == contents(finished)


def test_finished_cells_are_not_attacked_again(copied: Run, finished: Run, monkeypatch: pytest.MonkeyPatch):
    (lost,) = copied.path.glob("evaluations/*/sq/FGSM@0.031373.safetensors")
    lost.unlink()
    (copied.path / lost.parent.parent / "metrics.jsonl").unlink()
    attacked: list[str] = []
    attack = Evaluation._attack

    def spy(self: Evaluation, *arguments: Any) -> Any:
        attacked.append(arguments[2].label)
        return attack(self, *arguments)

    monkeypatch.setattr(Evaluation, "_attack", spy)
    run(TINY, copied.path.parent)
    assert attacked == ["FGSM"]
    assert contents(copied) == contents(finished)


def test_trained_ensembles_come_back_by_name(finished: Run):
    found = ensembles(finished)
    assert list(found) == [arm.name for arm in TINY.arms]
    for arm in TINY.arms:
        assert not found[arm.name].training
        state = restore_ensemble(TINY, arm, finished).state_dict()
        assert all(torch.equal(value, state[name]) for name, value in found[arm.name].state_dict().items())


def without_data(stored: Run) -> Run:
    """Return a run with the name of a data set that is not here."""
    config = stored.path / "config.toml"
    config.write_text(config.read_text().replace('name = "digits"', 'name = "cifar10"'))
    return stored


def same_state(one: Ensemble, other: Ensemble) -> bool:
    mine, theirs = one.state_dict(), other.state_dict()
    return list(mine) == list(theirs) and all(torch.equal(value, theirs[name]) for name, value in mine.items())


def test_a_trained_run_is_all_that_its_ensembles_take(finished: Run, copied: Run, tmp_path: Path):
    images = training_images(TINY, None)
    found = ensembles(without_data(copied), data_root=tmp_path)
    for arm in TINY.arms:
        assert same_state(found[arm.name], ensembles(finished)[arm.name])
        begun = build(TINY, arm, images).state_dict()
        constants = [name for name in begun if name.endswith(("normalize.mean", "normalize.std"))]
        assert constants
        assert all(torch.equal(found[arm.name].state_dict()[name], begun[name]) for name in constants)


def test_weights_without_shape_and_classes_take_the_training_images(finished: Run, copied: Run, tmp_path: Path):
    for path in copied.path.glob("arms/*/weights.safetensors"):
        save_tensors(path, load_tensors(path)[0])
    found = ensembles(copied)
    assert all(same_state(found[name], ensemble) for name, ensemble in ensembles(finished).items())
    with pytest.raises(MissingDataError, match="bitquorum data get cifar10"):
        ensembles(without_data(copied), data_root=tmp_path)


@pytest.mark.parametrize("shape", ["[1, 8]", "eight", '["a", 8, 8]', "8"])
def test_weights_for_images_of_no_shape_are_refused(copied: Run, shape: str):
    for path in copied.path.glob("arms/*/weights.safetensors"):
        tensors, facts = load_tensors(path)
        save_tensors(path, tensors, {**facts, "shape": shape})
    with pytest.raises(DataError, match="expected the shape and classes of the images of arm 'vanilla'"):
        ensembles(copied)


def test_cells_of_other_weights_are_refused(copied: Run):
    weights = copied.path / "arms" / "sq" / "weights.safetensors"
    tensors, facts = load_tensors(weights)
    save_tensors(weights, {name: value + value.is_floating_point() for name, value in tensors.items()}, facts)
    for rows in copied.path.glob("evaluations/*/metrics.jsonl"):
        rows.unlink()
    with pytest.raises(DataError, match="expected the outcome of an attack on these weights and images"):
        run(TINY, copied.path.parent)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"members": [{"overrides": [{"pattern": "nosuch"}]}]}, "no match for 'nosuch'"),
        ({"trainer": {**TABLE["trainer"], "batch_size": 61}}, "at least one batch of 61 images, got 60"),
        ({"aggregation": {"type": "empir-vote", "full_precision": 1}}, "the place of one of 1 members, got 1"),
        ({"start": "sq", "members": [{"learned": False}]}, "expected weights of arm 'sq' that fit"),
        ({"shift": 8}, "larger than its shift of 8"),
    ],
)
def test_no_arm_is_trained_before_all_could_be(change: dict[str, Any], message: str, tmp_path: Path):
    first = {"name": "sq", "network": {"type": "digitsnet", "width": 4}, "members": [{}]}
    broken = parse({**TABLE, "arms": [first, {**first, "name": "broken", **change}]})
    with pytest.raises(InputError, match=message):
        train(broken, tmp_path, listener=Stopper("train sq", 2))


def start(arguments: list[str]) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, *arguments], env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def wait_for(condition: Callable[[], bool], process: "subprocess.Popen[str]") -> None:
    for _ in range(6000):
        if condition():
            return
        if process.poll() is not None:
            pytest.fail(f"the process ended too early: {process.communicate()[0]}")
        time.sleep(0.01)
    pytest.fail("the process did not come that far")


def test_a_killed_process_resumes_to_the_same_bits(tmp_path: Path):
    longer = replace(TINY, trainer=replace(TINY.trainer, epochs=4))
    whole = run(longer, tmp_path / "whole")
    file = tmp_path / "longer.toml"
    file.write_text(to_toml(encode(longer)))
    command = ["-m", "bitquorum", "run", str(file), "--runs", str(tmp_path / "killed"), "--device", "cpu"]
    process = start(command)
    stored = Run(path=tmp_path / "killed" / whole.path.name)
    log = stored.path / "arms" / "sq" / "train.jsonl"
    wait_for(lambda: len(read_jsonl(log)) >= 3, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert (log.parent / "checkpoint.safetensors").exists()
    assert not (log.parent / "weights.safetensors").exists()
    assert [row["ended"] for row in stored.environments()] == ["killed"]
    step = read_jsonl(log)[-1]["step"]
    trained = (stored.path / "arms" / "vanilla" / "weights.safetensors").stat().st_mtime_ns
    heard = Steps()
    run(longer, tmp_path / "killed", listener=heard)
    assert 2 < heard.first <= step + 2
    assert (stored.path / "arms" / "vanilla" / "weights.safetensors").stat().st_mtime_ns == trained
    assert contents(stored) == contents(whole)


def test_the_batch_size_of_an_evaluation_changes_nothing_but_rounding(copied: Run):
    by_batch = [evaluate(copied, replace(TINY.evaluation, batch_size=size)) for size in (20, 7)]
    for rows in zip(*by_batch, strict=True):
        assert len({(row["arm"], row["attack"], row["epsilon"]) for row in rows}) == 1
        limit = 0.0 if rows[0]["attack"] == "clean" else 1 / 20  # an ulp may turn the sign of a gradient near zero
        assert max(row["value"] for row in rows) - min(row["value"] for row in rows) <= limit + 1e-12


@pytest.mark.slow  # the trainer's own test of two processes is in the unit suite
def test_two_processes_train_what_one_does(tmp_path: Path):
    arms = [arm | {"network": {"type": "digitsnet", "width": 4, "norm": "none"}} for arm in TABLE["arms"]]
    chosen = parse(TABLE | {"arms": arms})
    one = train(chosen, tmp_path / "one")
    file = tmp_path / "two.toml"
    file.write_text(to_toml(encode(chosen)))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "bitquorum"]
    process = start([*launcher, "train", str(file), "--runs", str(tmp_path / "two"), "--device", "cpu"])
    output = process.communicate()[0]
    assert process.returncode == 0, output
    two = create(chosen, tmp_path / "two")
    assert len(two.environments()) == 1
    for arm in chosen.arms:
        file = f"arms/{arm.name}/weights.safetensors"
        ours, theirs = load_tensors(one.path / file)[0], load_tensors(two.path / file)[0]
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            torch.testing.assert_close(
                theirs[name], value, rtol=1e-3, atol=1e-4, msg=lambda text, n=name: f"{n}: {text}"
            )
        assert len(read_jsonl(two.path / "arms" / arm.name / "train.jsonl")) == 3


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_corrupt_weights_are_named(copied: Run):
    path = copied.path / "arms" / "sq" / "weights.safetensors"
    whole = shutil.copy(path, copied.path / "whole")
    cut(path)
    other = replace(TINY.evaluation, draws=1)
    with pytest.raises(DataError, match=r"corrupt.*restore or remove") as caught:
        evaluate(copied, other)
    assert str(path) in str(caught.value)
    save_tensors(path, {"weight": torch.zeros(2)})
    with pytest.raises(DataError, match=r"weights of arm 'sq'.*train again"):
        evaluate(copied, other)
    shutil.copy(whole, path)
    state, facts = load_tensors(path)
    name = next(name for name, value in state.items() if value.dim() > 1)
    state[name][0, 0] = math.nan
    save_tensors(path, state, facts)
    with pytest.raises(DataError, match=rf"expected finite weights at .*, got NaN or infinity in {name}"):
        evaluate(copied, other)
    path.unlink()
    with pytest.raises(DataError, match=r"expected trained weights.*got none"):
        evaluate(copied, other)
    assert progress_of(copied) == "1 of 2 arms trained"
    assert not module.evaluation_folder(copied, other).exists(), "no arm was attacked before that was known"


def test_removed_weights_are_trained_again_to_the_same_bits(copied: Run, finished: Run):
    (copied.path / "arms" / "sq" / "weights.safetensors").unlink()
    run(TINY, copied.path.parent)
    assert contents(copied) == contents(finished)


def test_a_corrupt_checkpoint_is_named_and_its_removal_begins_anew(finished: Run, tmp_path: Path):
    with pytest.raises(StopError):
        run(TINY, tmp_path, listener=Stopper("train sq", 4))
    stored = create(TINY, tmp_path)
    path = stored.path / "arms" / "sq" / "checkpoint.safetensors"
    cut(path)
    with pytest.raises(DataError, match=r"corrupt.*restore or remove") as caught:
        run(TINY, tmp_path)
    assert str(path) in str(caught.value)
    path.unlink()
    run(TINY, tmp_path)
    assert contents(stored) == contents(finished)


@pytest.mark.parametrize("pattern", ["evaluations/*/metrics.jsonl", "evaluations/*/sq/*PGD*.safetensors"])
def test_corrupt_results_are_named(pattern: str, copied: Run):
    path = sorted(copied.path.glob(pattern))[0]
    if path.suffix == ".jsonl":
        path.write_text("{]\n" + path.read_text())
    else:
        (path.parent.parent / "metrics.jsonl").unlink()
        cut(path)
    with pytest.raises(DataError, match="remove") as caught:
        run(TINY, copied.path.parent)
    assert str(path) in str(caught.value)


def test_a_foreign_outcome_is_named(copied: Run):
    path = sorted(copied.path.glob("evaluations/*/sq/FGSM*.safetensors"))[0]
    (path.parent.parent / "metrics.jsonl").unlink()
    save_tensors(path, {"other": torch.zeros(1)})
    with pytest.raises(DataError, match="expected the outcome of an attack") as caught:
        run(TINY, copied.path.parent)
    assert str(path) in str(caught.value)


def test_a_config_of_another_version_is_named(copied: Run):
    path = copied.path / "config.toml"
    path.write_text("novelty = 1\n" + path.read_text())
    with pytest.raises(DataError, match=r"config of this version.*novelty") as caught:
        experiment_of(copied)
    assert str(path) in str(caught.value)


def test_another_evaluation_is_stored_apart(copied: Run, finished: Run):
    other = replace(TINY.evaluation, draws=3, attacks=())
    rows = evaluate(copied, other)
    assert [(row["arm"], row["attack"], row["draws"]) for row in rows] == [("vanilla", "clean", 3), ("sq", "clean", 3)]
    assert results(copied, other) == rows
    assert results(copied) == results(finished)
    assert len(list(copied.path.glob("evaluations/*/evaluation.toml"))) == 2
    assert contents(finished).items() <= contents(copied).items()
    assert copied.environments()[-1]["work"] == "evaluate"


def test_training_and_then_evaluating_equals_a_run(finished: Run, tmp_path: Path):
    stored = train(TINY, tmp_path)
    assert progress_of(stored) == "trained"
    assert results(stored) == []
    assert evaluate(stored, TINY.evaluation) == results(finished)
    assert contents(stored) == contents(finished)


def test_a_published_run_holds_neither_weights_nor_outcomes(finished: Run, tmp_path: Path):
    finished.publish(tmp_path / "results")
    published = Run.open(tmp_path / "results")
    assert {path.suffix for path in published.path.rglob("*") if path.is_file()} == {".toml", ".json", ".jsonl"}
    assert results(published) == results(finished)
    assert experiment_of(published) == TINY
    assert published.environments() == finished.environments()


@pytest.mark.parametrize("names", [("notes.txt",), ("config.toml", "model.py"), ("config.toml", "a/weights.bin")])
def test_publishing_never_removes_files_of_another_kind(names: tuple[str, ...], finished: Run, tmp_path: Path):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    with pytest.raises(InputError, match="expected a new folder or a published run"):
        finished.publish(tmp_path)
    assert all((tmp_path / name).read_text() == "mine" for name in names)


def test_publishing_never_removes_a_folder_that_only_looks_like_a_run(finished: Run, tmp_path: Path):
    for name, text in (("config.toml", 'title = "my site"'), ("posts/one.md", "mine")):
        atomic_write(tmp_path / "site" / name, text)
    with pytest.raises(InputError, match="expected a new folder or a published run"):
        finished.publish(tmp_path / "site")
    assert (tmp_path / "site" / "posts" / "one.md").read_text() == "mine"


def test_a_publication_that_fails_leaves_the_earlier_one(
    finished: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    target = tmp_path / "results"
    finished.publish(target)
    (target / "table.md").write_text("of an earlier publication")
    before = contents(Run(path=target))
    written = []

    def full(path: Path, content: bytes) -> None:
        written.append(path)
        if len(written) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        atomic_write(path, content)

    with monkeypatch.context() as patch:
        patch.setattr("bitquorum.store.atomic_write", full)
        with pytest.raises(OSError, match="No space left"):
            finished.publish(target)
    assert contents(Run(path=target)) == before
    finished.publish(target)
    assert not (target / "table.md").exists(), "the new one takes its place"
    assert [path.name for path in tmp_path.iterdir()] == ["results"]


def test_test_images_of_another_kind_are_refused_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    images = load("digits", "test")
    larger = replace(images, images=images.images.repeat(1, 1, 2, 2))
    monkeypatch.setattr(
        "bitquorum.experiment.runs.load", lambda name, split, root: larger if split == "test" else load(name, split)
    )
    with pytest.raises(DataError, match=r"test images like the training images, of shape \(1, 8, 8\) .*, got \(1, 16"):
        run(TINY, tmp_path)
    assert progress_of(create(TINY, tmp_path)) == "0 of 2 arms trained"


def test_a_suite_is_not_called_corrupt(tmp_path: Path):
    stored = Run.create(tmp_path, "bench-digits", {"type": "suite"})
    with pytest.raises(InputError, match=r"expected a run of an experiment, got a suite at .*bitquorum show"):
        evaluate(stored, TINY.evaluation)


def test_a_day_and_more_is_counted_in_hours(tmp_path: Path):
    heard: list[str] = []

    class Hears(Listener):
        def advance(self, done: int, note: str = "") -> None:
            heard.append(note)

    module._Log(tmp_path / "train.jsonl", Hears())(
        Progress(step=1, steps=2, values={"loss": 0.5}, seconds_left=90_061.2)
    )
    assert heard == ["loss 0.500, 25:01:01 left"]


def test_publishing_onto_the_run_itself_is_refused(finished: Run, tmp_path: Path):
    finished.publish(tmp_path / "results" / "tiny")
    published = Run(path=tmp_path / "results" / "tiny")
    for target in (published.path, tmp_path / "results" / ".." / "results" / "tiny", tmp_path / "results"):
        with pytest.raises(InputError, match="expected a folder outside of the run"):
            published.publish(target)
    assert results(published) == results(finished)


def test_a_locked_run_is_left_alone(copied: Run):
    (copied.path / "arms" / "sq" / "weights.safetensors").unlink()
    before = contents(copied)
    with copied.lock(), pytest.raises(InputError, match="another process works in"):
        run(TINY, copied.path.parent)
    assert contents(copied) == before


def test_missing_data_are_said_to_be_missing(tmp_path: Path):
    absent = replace(TINY, data=replace(TINY.data, name="cifar10"))
    with pytest.raises(MissingDataError, match="bitquorum data get cifar10"):
        run(absent, tmp_path / "runs", data_root=tmp_path / "data")
    assert progress_of(create(absent, tmp_path / "runs")) == "0 of 2 arms trained"


def test_arms_differ_in_nothing_but_what_they_name():
    images = training_images(TINY, None)
    assert torch.bincount(images.labels).tolist() == [6] * 10
    arms = [
        Arm(name=str(bits), network=DigitsNet(width=4), members=(policy,)) for bits, policy in enumerate(policies())
    ]
    built = [dict(build(TINY, arm, images).named_parameters()) for arm in arms]
    weights = [[value for value in ensemble.values() if value.dim() == 4] for ensemble in built]
    assert len(weights[0]) == 3
    for others in weights[1:]:
        assert all(torch.equal(mine, other) for mine, other in zip(weights[0], others, strict=True))
    two = build(TINY, replace(arms[0], members=arms[0].members * 2), images)
    first, second = (dict(member.named_parameters()) for member in two.members)
    assert not torch.equal(first["conv1.weight"], second["conv1.weight"])


def policies() -> list[Any]:
    return [member for arm in TINY.arms for member in arm.members]


def test_arms_that_were_trained_apart_make_one_run(finished: Run, tmp_path: Path):
    apart = [train(TINY, tmp_path / name, arms=[name]) for name in ("vanilla", "sq")]
    assert [progress_of(stored) for stored in apart] == ["1 of 2 arms trained"] * 2
    shutil.copytree(apart[1].path / "arms" / "sq", apart[0].path / "arms" / "sq")
    for arm in ("vanilla", "sq"):
        weights = [
            load_tensors(stored.path / "arms" / arm / "weights.safetensors")[0] for stored in (apart[0], finished)
        ]
        assert all(bool((weights[0][name] == weights[1][name]).all()) for name in weights[1])
    with pytest.raises(DataError, match="expected an arm among vanilla, sq, got 'other'"):
        train(TINY, tmp_path / "vanilla", arms=["other"])


def test_networks_normalize_by_the_training_images_if_asked():
    images = training_images(TINY, None)
    arm = Arm(name="a", network=Linear())
    pixels = images.images[:3]

    def first(experiment: Experiment) -> torch.Tensor:
        ensemble = build(experiment, arm, images)
        return ensemble(pixels)[0, 0]

    def bare(ensemble: Ensemble, inputs: torch.Tensor) -> torch.Tensor:
        (weight,) = (value for value in ensemble.parameters() if value.dim() == 2)
        (bias,) = (value for value in ensemble.parameters() if value.dim() == 1)
        return inputs.flatten(1) @ weight.T + bias

    raw = replace(TINY, data=replace(TINY.data, normalize=False))
    torch.testing.assert_close(first(raw), bare(build(raw, arm, images), pixels))
    mean, std = images.images.mean(), images.images.std()
    torch.testing.assert_close(first(TINY), bare(build(TINY, arm, images), (pixels - mean) / std), rtol=1e-3, atol=1e-3)


def test_an_arm_may_bring_its_own_trainer(tmp_path: Path):
    short = replace(TINY.trainer, batch_size=30)
    chosen = replace(TINY, arms=(replace(TINY.arms[0], trainer=short), replace(TINY.arms[0], name="other")))
    stored = train(chosen, tmp_path)
    assert [len(read_jsonl(stored.path / "arms" / arm.name / "train.jsonl")) for arm in chosen.arms] == [1, 3]


def test_restored_ensembles_predict_as_the_trained_ones(finished: Run):
    images = training_images(TINY, None)
    ensembles = [restore_ensemble(TINY, TINY.arms[0], finished) for _ in range(2)]
    assert torch.equal(*(ensemble.eval()(images.images) for ensemble in ensembles))
    assert not torch.equal(ensembles[0](images.images), build(TINY, TINY.arms[0], images)(images.images))


def continued(**changes: Any) -> Experiment:
    first = TABLE["arms"][1]
    trainer = {"epochs": 1, "batch_size": 10, "log_every": 2, "checkpoint_seconds": 0, **changes}
    return parse({**TABLE, "arms": [first, {**first, "trainer": trainer, "name": "longer", "start": "sq"}]})


def test_an_arm_begins_from_the_weights_and_ranges_of_another(tmp_path: Path):
    stored = train(continued(lr=1e-30), tmp_path)  # steps that move nothing
    first, longer = (load_tensors(stored.path / "arms" / name / "weights.safetensors")[0] for name in ("sq", "longer"))
    learned = [name for name in first if "running" not in name and "tracked" not in name]
    assert any(name.endswith("log_step") for name in learned)
    for name in learned:
        torch.testing.assert_close(longer[name], first[name], rtol=1e-6, atol=0)


def test_an_arm_sees_the_images_in_another_order_than_its_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    seeds: list[int] = []
    taken = Trainer.__call__

    def spied(self: Trainer, *args: Any, seed: int, **more: Any) -> Ensemble:
        seeds.append(seed)
        return taken(self, *args, seed=seed, **more)

    monkeypatch.setattr(Trainer, "__call__", spied)
    train(TINY, tmp_path)
    train(continued(lr=0.01), tmp_path)
    assert seeds[0] == seeds[1] == seeds[2] != seeds[3]


def test_an_arm_alone_is_trained_with_its_start_and_resumes_to_the_same_end(tmp_path: Path):
    experiment = continued(lr=0.01)
    whole = train(experiment, tmp_path / "whole")
    with pytest.raises(StopError):
        train(experiment, tmp_path / "alone", arms=["longer"], listener=Stopper("train longer", 4))
    alone = train(experiment, tmp_path / "alone", arms=["longer"])
    assert contents(alone) == contents(whole)
    assert progress_of(alone) == "trained"


def test_an_arm_without_epochs_is_its_start_and_may_look_more_often(tmp_path: Path):
    first = TABLE["arms"][1]
    same = {**first, "trainer": {"epochs": 0, "batch_size": 10}, "start": "sq"}
    arms = [first, {**same, "name": "again"}, {**same, "name": "twice", "mirrored": True}]
    arms.append({**same, "name": "often", "mirrored": True, "shift": 1})
    experiment = parse({**TABLE, "arms": arms})
    stored = run(experiment, tmp_path)
    weights = [(stored.path / "arms" / arm["name"] / "weights.safetensors").read_bytes() for arm in arms]
    assert len(set(weights)) == 1
    rows = {name: [row for row in results(stored) if row["arm"] == name] for name in ("sq", "again", "twice", "often")}
    assert [row["value"] for row in rows["sq"]] == [row["value"] for row in rows["again"]]
    assert [row["value"] for row in rows["sq"]] != [row["value"] for row in rows["twice"]]
    assert [row["value"] for row in rows["twice"]] != [row["value"] for row in rows["often"]]
    shown = ["w4a4 w3a2", "w4a4 w3a2 mirrored", "w4a4 w3a2 mirrored shifted"]
    assert [rows[name][0]["members"] for name in ("sq", "twice", "often")] == shown


def test_weights_that_do_not_fit_the_start_are_refused(tmp_path: Path):
    experiment = continued(lr=0.01)
    stored = train(experiment, tmp_path, arms=["sq"])
    path = stored.path / "arms" / "sq" / "weights.safetensors"
    save_tensors(path, {name: value for name, value in load_tensors(path)[0].items() if "conv1" not in name})
    with pytest.raises(DataError, match=r"weights of arm 'sq' at .* that fit 'longer', got others.*same members"):
        train(experiment, tmp_path, arms=["longer"])
