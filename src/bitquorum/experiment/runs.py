"""Run an experiment into the store: build, train, attack; every part resumes where a kill left it."""

import json
import re
import time
import tomllib
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from textwrap import shorten
from typing import Any, final

import torch
import torch.distributed as dist
from torch import Tensor

from bitquorum import kernels, rng
from bitquorum.config import Arm, Experiment, parse
from bitquorum.data import ImageSet, load
from bitquorum.ensemble import Ensemble
from bitquorum.evaluate import CLEAN, Cell, Evaluation, Examples, worst
from bitquorum.evaluate.climbs import mark_of
from bitquorum.files import (
    append_jsonl,
    atomic_write,
    load_tensors,
    read_jsonl,
    save_tensors,
    truncate_jsonl,
    write_jsonl,
)
from bitquorum.interface import ConfigError, Cost, DataError, InputError, Listener, Method
from bitquorum.registry import decode, digest, encode, to_toml
from bitquorum.store import Run
from bitquorum.train import Progress


def create(experiment: Experiment, root: Path) -> Run:
    """Return the run of an experiment below `root`; the same experiment finds the same run again."""
    return Run.create(root, experiment.name, encode(experiment))


def experiment_of(run: Run) -> Experiment:
    """Return the experiment that a stored run holds.

    Raises:
        InputError: if it is a suite or a museum.
        DataError: if its config is missing, corrupt or not understood by this version.
    """
    config = run.config()
    if config.get("type") in ("suite", "museum"):
        raise InputError(
            f"expected a run of an experiment, got a {config['type']} at {run.path}; `bitquorum show` prints its table"
        )
    try:
        return parse(config)
    except ConfigError as error:
        raise DataError(
            f"expected a config of this version in {run.path}/config.toml, got: {error}; restore or remove it"
        ) from error


def run(
    experiment: Experiment,
    root: Path,
    *,
    device: str = "cpu",
    data_root: Path | None = None,
    listener: Listener | None = None,
) -> Run:
    """Train and evaluate every arm and return the run; finished parts are not repeated.

    Args:
        experiment: What to do.
        root: Folder of runs.
        device: Where to compute.
        data_root: Folder of data sets; see `data.data_root`.
        listener: Hears of progress.

    Raises:
        BitquorumError: if data are missing, the run is locked or a stored file is corrupt.
    """
    stored = create(experiment, root)
    if _is_trained(experiment, stored) and _is_complete(experiment, experiment.evaluation, results(stored)):
        return stored
    listener = listener or Listener()
    made_for = _made_for(training_images(experiment, data_root))
    _test_images(experiment, experiment.evaluation, made_for, data_root)  # better refused before the training
    with working(stored, experiment, "run"):
        train_arms(experiment, stored, experiment.arms, device=device, data_root=data_root, listener=listener)
        if _first():
            evaluate_arms(
                experiment,
                stored,
                experiment.evaluation,
                device=device,
                data_root=data_root,
                listener=listener,
            )
    return stored


def train(
    experiment: Experiment,
    root: Path,
    *,
    arms: Sequence[str] = (),
    device: str = "cpu",
    data_root: Path | None = None,
    listener: Listener | None = None,
) -> Run:
    """Train every arm, or the named ones, and return the run, without attacks.

    Raises:
        BitquorumError: as `run`; and if an arm is unknown.
    """
    stored, chosen = create(experiment, root), choose_arms(experiment, arms)
    if all(_weights(stored, arm).exists() for arm in chosen):
        return stored
    with working(stored, experiment, "train"):
        train_arms(experiment, stored, chosen, device=device, data_root=data_root, listener=listener or Listener())
    return stored


def evaluate(
    stored: Run,
    evaluation: Evaluation,
    *,
    device: str = "cpu",
    data_root: Path | None = None,
    listener: Listener | None = None,
) -> list[dict[str, Any]]:
    """Attack the trained arms of a stored run and return the rows of the result; stored rows are not computed again."""
    experiment = experiment_of(stored)
    rows = results(stored, evaluation)
    if _is_complete(experiment, evaluation, rows):
        return rows
    with working(stored, experiment, "evaluate"):
        return evaluate_arms(
            experiment,
            stored,
            evaluation,
            device=device,
            data_root=data_root,
            listener=listener or Listener(),
        )


def results(stored: Run, evaluation: Method | None = None) -> list[dict[str, Any]]:
    """Return the stored rows of an evaluation, by default the experiment's own; none when it has not run."""
    chosen = evaluation or experiment_of(stored).evaluation
    keys = ("arm", "members", "epsilon", "attack", "value", "images", "draws")
    return read_jsonl(evaluation_folder(stored, chosen) / "metrics.jsonl", keys)


def progress_of(stored: Run) -> str:
    """Return `complete`, or how far a stored run has come."""
    experiment = experiment_of(stored)
    trained = sum(_weights(stored, arm).exists() for arm in experiment.arms)
    if trained in (0, len(experiment.arms)) and _is_complete(experiment, experiment.evaluation, results(stored)):
        return "complete"  # a published run has no weights at all
    return "trained" if trained == len(experiment.arms) else f"{trained} of {len(experiment.arms)} arms trained"


def choose_arms(experiment: Experiment, names: Sequence[str]) -> list[Arm]:
    """Return the named arms, all of them without a name.

    Raises:
        DataError: if an arm is unknown.
    """
    known = {arm.name: arm for arm in experiment.arms}
    for name in names:
        if name not in known:
            raise DataError(f"expected an arm among {', '.join(known)}, got {name!r}")
    return [known[name] for name in names] if names else list(experiment.arms)


def train_arms(
    experiment: Experiment,
    stored: Run,
    arms: Sequence[Arm],
    *,
    device: str,
    data_root: Path | None,
    listener: Listener,
) -> None:
    """Train those of the arms that are not trained yet, and what they start from; under torchrun in every process."""
    missing: set[str] = set()
    for arm in reversed(experiment.arms):  # what an arm starts from stands before it
        if (arm in arms or arm.name in missing) and not _weights(stored, arm).exists():
            missing |= {arm.name, arm.start or arm.name}
    waiting = [arm for arm in experiment.arms if arm.name in missing and not _weights(stored, arm).exists()]
    if not waiting:
        return
    images = training_images(experiment, data_root)
    for arm in waiting:  # what is wrong with the last is better known before the first is trained
        _check_arm(experiment, arm, images)
    for arm in waiting:
        _train_arm(experiment, arm, images, stored, device, listener)


def _check_arm(experiment: Experiment, arm: Arm, images: ImageSet) -> None:
    """Refuse an arm that could not be built, begun or asked for a prediction."""
    (arm.trainer or experiment.trainer).check(images)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the training says it again
        ensemble = build(experiment, arm, images).eval()
        begun = [other for other in experiment.arms if other.name == arm.start]
        states = [build(experiment, other, images).state_dict() for other in begun]
    shapes = {name: value.shape for name, value in ensemble.state_dict().items()}
    for state in states:
        if {name: value.shape for name, value in state.items()} != shapes:
            raise InputError(
                f"arm {arm.name!r}: expected weights of arm {arm.start!r} that fit, got others; give both arms members "
                "that are made in the same way"
            )
    ensemble.looks(torch.zeros(1, *images.shape))
    ensemble.predict(torch.zeros(ensemble.passes, ensemble.answers, 1, len(images.classes)))


def evaluate_arms(
    experiment: Experiment,
    stored: Run,
    evaluation: Evaluation,
    *,
    device: str,
    data_root: Path | None,
    listener: Listener,
) -> list[dict[str, Any]]:
    """Attack every arm, cell by cell, and store outcomes and rows."""
    made_for, _ = _trained(experiment, experiment.arms[0], stored, data_root)
    test = _test_images(experiment, evaluation, made_for, data_root)
    ensembles = [restore_ensemble(experiment, arm, stored, data_root=data_root) for arm in experiment.arms]
    folder = evaluation_folder(stored, evaluation)
    atomic_write(folder / "evaluation.toml", to_toml(encode(evaluation)))
    rows: list[dict[str, Any]] = []
    batch = test.batch(torch.arange(len(test)))
    examples = Examples(images=batch.images, labels=batch.labels, index=batch.examples)
    for arm, ensemble in zip(experiment.arms, ensembles, strict=True):
        mark = mark_of([ensemble], examples, evaluation)
        done = [read_cell(path, mark=mark) for path in sorted((folder / arm.name).glob("*.safetensors"))]
        listener.begin(f"attack {arm.name}", 0)
        cells = evaluation(
            ensemble,
            test,
            done=done,
            on_cell=lambda cell, arm=arm, mark=mark: _write_cell(folder / arm.name, cell, test, mark),
            on_batch=lambda count, total: listener.advance(count, f"of {total} batches"),
            device=device,
        )
        listener.end()
        rows += _rows(arm, cells, ensemble)
    write_jsonl(folder / "metrics.jsonl", rows)
    return rows


def _test_images(
    experiment: Experiment, evaluation: Evaluation, made_for: "_MadeFor", data_root: Path | None
) -> ImageSet:
    """Return the images that an evaluation attacks.

    Raises:
        DataError: if they are not of the shape and classes of the training images.
    """
    test = load(experiment.data.name, "test", root=data_root)
    if _made_for(test) != made_for:
        shape, classes = made_for
        raise DataError(
            f"{test.name}: expected test images like the training images, of shape {shape} in {len(classes)} classes, "
            f"got {test.shape} in {len(test.classes)}; mend the data set"
        )
    return evaluation.choose(test)


def training_images(experiment: Experiment, data_root: Path | None) -> ImageSet:
    """Return the images that an experiment trains on."""
    images = load(experiment.data.name, "train", root=data_root)
    if experiment.data.train:
        images = images.take(experiment.data.train, seed=rng.derive(experiment.seed, "training images"))
    return images


def build(experiment: Experiment, arm: Arm, images: ImageSet) -> Ensemble:
    """Return an arm's ensemble before training; equal positions start from equal weights in every arm."""
    constants = _statistics(images) if experiment.data.normalize else None
    return _built(experiment, arm, _made_for(images), constants)


def _built(
    experiment: Experiment,
    arm: Arm,
    made_for: "_MadeFor",
    constants: tuple[tuple[float, ...], tuple[float, ...]] | None = None,
) -> Ensemble:
    shape, classes = made_for
    mean, std = constants or ((0.0,) * shape[0], (1.0,) * shape[0])
    networks = []
    for index in range(len(arm.members)):
        with rng.torch_seed(rng.derive(experiment.seed, "weights", index)):
            networks.append(arm.network(classes=len(classes), shape=shape, mean=mean, std=std))
    return Ensemble.build(
        networks,
        arm.members,
        shared=arm.shared,
        aggregation=arm.aggregation,
        passes=arm.passes,
        mirrored=bool(arm.mirrored),
        shift=arm.shift or 0,
    )


def restore_ensemble(experiment: Experiment, arm: Arm, stored: Run, *, data_root: Path | None = None) -> Ensemble:
    """Return an arm's trained ensemble.

    Its file holds all that it takes. Where an earlier version kept no shape and classes, the training images are read.

    Raises:
        DataError: if it is not trained or its file does not fit.
    """
    made_for, weights = _trained(experiment, arm, stored, data_root)
    return _filled(_built(experiment, arm, made_for), weights, _weights(stored, arm), arm)


def restored(
    experiment: Experiment, stored: Run, *, device: str, data_root: Path | None
) -> Iterator[tuple[Arm, Ensemble]]:
    """Yield every arm with its trained ensemble, in evaluation mode and without gradients of its parameters.

    Its convolutions lie in memory as in the training.

    Raises:
        DataError: if an arm is not trained or its file does not fit.
    """
    for arm in experiment.arms:
        ensemble = restore_ensemble(experiment, arm, stored, data_root=data_root)
        yield arm, judged(ensemble, experiment, arm, device)


def ensembles(stored: Run, *, device: str = "cpu", data_root: Path | None = None) -> dict[str, Ensemble]:
    """Return the trained ensembles of a run by the names of their arms, to be asked or attacked; see `restored`.

    The folder of the run is all that it takes (see `restore_ensemble`).

    Raises:
        DataError: if an arm is not trained or its file does not fit.
    """
    found = restored(experiment_of(stored), stored, device=device, data_root=data_root)
    return {arm.name: ensemble for arm, ensemble in found}


def judged(ensemble: Ensemble, experiment: Experiment, arm: Arm, device: str) -> Ensemble:
    """Return an arm's ensemble as it is attacked: see `restored`."""
    ensemble = ensemble.to(device).eval().requires_grad_(False)
    asked = (arm.trainer or experiment.trainer).channels_last
    layout = kernels.memory_format(ensemble, channels_last=asked)
    return ensemble.to(memory_format=layout)  # pyright: ignore[reportCallIssue]


_MadeFor = tuple[tuple[int, int, int], tuple[str, ...]]  # the shape of an image, and the classes


def _made_for(images: ImageSet) -> _MadeFor:
    return images.shape, tuple(images.classes)


def _trained(
    experiment: Experiment, arm: Arm, stored: Run, data_root: Path | None
) -> tuple[_MadeFor, dict[str, Tensor]]:
    """Return the images that an arm was trained for, and its weights."""
    path = _weights(stored, arm)
    weights, facts = _read_weights(path)
    if "shape" not in facts:  # written by an earlier version
        return _made_for(training_images(experiment, data_root)), weights
    try:
        (channels, height, width), classes = json.loads(facts["shape"]), json.loads(facts["classes"])
        return ((int(channels), int(height), int(width)), tuple(map(str, classes))), weights
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"expected the shape and classes of the images of arm {arm.name!r} in {path}, got {facts}; remove the file "
            "and train again"
        ) from error


def _read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    if not path.exists():
        raise DataError(f"expected trained weights at {path}, got none; train the run first with `bitquorum train`")
    return load_tensors(path)


def _filled(ensemble: Ensemble, weights: dict[str, Tensor], path: Path, arm: Arm) -> Ensemble:
    """Return an arm's ensemble with the trained weights of `path`, its own or those that it starts from."""
    try:
        ensemble.load_state_dict(weights)
    except RuntimeError as error:
        start = ", or give both arms the same members" if arm.start == path.parent.name else ""
        raise DataError(
            f"expected weights of arm {path.parent.name!r} at {path} that fit {arm.name!r}, got others: "
            f"{shorten(str(error), 200)}; remove the file and train again{start}"
        ) from error
    for name, value in ensemble.state_dict().items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise DataError(
                f"expected finite weights at {path}, got NaN or infinity in {name}; remove the file and train again"
            )
    return ensemble


@final
class _Log:
    """Append training rows, without those that a kill left behind the last checkpoint."""

    def __init__(self, path: Path, listener: Listener) -> None:
        self.path, self.listener, self.clean = path, listener, False

    def __call__(self, progress: Progress) -> None:
        if not self.clean:
            kept = [row for row in read_jsonl(self.path, ("step",)) if row["step"] < progress.step]
            truncate_jsonl(self.path, len(kept))
            self.clean = True
        values = dict(sorted(progress.values.items()))  # a checkpoint does not keep their order
        append_jsonl(self.path, [{"step": progress.step, "split": "train", **values}])
        minutes, seconds = divmod(round(progress.seconds_left), 60)
        left = f"{minutes // 60:02d}:{minutes % 60:02d}:{seconds:02d}"
        self.listener.advance(progress.step, f"loss {progress.values['loss']:.3f}, {left} left")


def _train_arm(
    experiment: Experiment, arm: Arm, images: ImageSet, stored: Run, device: str, listener: Listener
) -> None:
    trainer, folder = arm.trainer or experiment.trainer, _weights(stored, arm).parent
    ensemble, seed = build(experiment, arm, images), rng.derive(experiment.seed, "training")
    if arm.start is not None:
        path = folder.parent / arm.start / "weights.safetensors"
        ensemble = _filled(ensemble, _read_weights(path)[0], path, arm)
        trainer, seed = replace(trainer, calibration=0), rng.derive(experiment.seed, "training", arm.start)
    listener.begin(f"train {arm.name}", trainer.epochs * (len(images) // trainer.batch_size))
    checkpoint = folder / "checkpoint.safetensors"
    ensemble = trainer(
        ensemble,
        images,
        arm.objective,
        seed=seed,
        checkpoint=checkpoint,
        report=_Log(folder / "train.jsonl", listener),
        device=device,
    )
    listener.end()
    if dist.is_initialized():
        dist.barrier()  # every process has read the checkpoint before the first one removes it
    if _first():
        shape, classes = map(json.dumps, _made_for(images))
        save_tensors(folder / "weights.safetensors", ensemble.state_dict(), {"shape": shape, "classes": classes})
        checkpoint.unlink(missing_ok=True)
    if dist.is_initialized():
        dist.barrier()


@contextmanager
def working(stored: Run, experiment: Experiment, what: str) -> Iterator[None]:
    """Lock a run, choose the kernels and note versions, hardware and time."""
    if not _first():
        with kernels.use(experiment.kernels):
            yield
        return
    with stored.lock(), kernels.use(experiment.kernels):
        started = time.monotonic()
        ended = "interrupted"
        stored.write_environment({"work": what, "ended": "killed"})  # stands if nothing can be written any more
        try:
            yield
            ended = "done"
        finally:
            seconds = round(time.monotonic() - started, 1)
            stored.write_environment({"work": what, "seconds": seconds, "ended": ended}, replace=True)


def _first() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def _weights(stored: Run, arm: Arm) -> Path:
    return stored.path / "arms" / arm.name / "weights.safetensors"


def _is_trained(experiment: Experiment, stored: Run) -> bool:
    return all(_weights(stored, arm).exists() for arm in experiment.arms)


def _is_complete(experiment: Experiment, evaluation: Evaluation, rows: Sequence[dict[str, Any]]) -> bool:
    """Return whether stored rows hold every cell of every arm, and the worst cases."""
    per_arm = len(evaluation.cells()) + (len(evaluation.epsilons) if evaluation.attacks else 0)
    return len(rows) == per_arm * len(experiment.arms)


def _statistics(images: ImageSet) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and deviation of each channel, rounded to four digits as is usual."""
    channels = images.images.movedim(1, 0).flatten(1).double()
    channels = channels / 255 if images.images.dtype == torch.uint8 else channels
    mean = tuple(round(float(value), 4) for value in channels.mean(1))
    std = tuple(max(round(float(value), 4), 1e-4) for value in channels.std(1))
    return mean, std


def evaluation_folder(stored: Run, evaluation: Method) -> Path:
    """Return the folder of an evaluation: each has its own, named by its digest.

    An evaluation that an earlier version stored, before a field was there that now has its default, is found too.
    """
    path = stored.path / "evaluations" / digest(evaluation)
    for other in sorted(stored.path.glob("evaluations/*/evaluation.toml")):
        if path.exists():
            break
        with suppress(InputError, OSError, ValueError):
            if decode(type(evaluation), tomllib.loads(other.read_text(encoding="utf-8"))) == evaluation:
                return other.parent
    return path


def _write_cell(folder: Path, cell: Cell, data: ImageSet, mark: str) -> None:
    name = re.sub(r"[^A-Za-z0-9]+", "-", cell.attack)
    images = {} if cell.images is None else {"images": cell.images}
    save_tensors(
        folder / f"{name}@{cell.epsilon:.6f}.safetensors",
        {"correct": cell.correct.to(torch.uint8), "labels": data.labels, "examples": data.index, **images},
        {
            "attack": cell.attack,
            "epsilon": repr(cell.epsilon),
            "forward": str(cell.cost.forward),
            "backward": str(cell.cost.backward),
            "largest": repr(cell.largest),
            "mark": mark,
        },
    )


def read_cell(path: Path, *, images: bool = True, mark: str = "") -> Cell:
    """Return the stored outcome of an attack, with its adversarial images or without.

    Raises:
        DataError: if the file is corrupt, or has another mark than the given one (see `evaluate.climbs.mark_of`).
    """
    stored, facts = load_tensors(path, without=() if images else ("images",))
    if mark and facts.get("mark", mark) != mark:  # earlier versions wrote none
        raise DataError(
            f"expected the outcome of an attack on these weights and images at {path}, got that on others; remove it"
        )
    try:
        correct: Tensor = stored["correct"].bool()
        return Cell(
            attack=facts["attack"],
            epsilon=float(facts["epsilon"]),
            correct=correct,
            cost=Cost(forward=int(facts["forward"]), backward=int(facts["backward"])),
            largest=float(facts["largest"]),
            images=stored.get("images"),
        )
    except (KeyError, ValueError) as error:
        raise DataError(f"expected the outcome of an attack at {path}, got: {error}; remove it") from error


def _rows(arm: Arm, cells: Sequence[Cell], ensemble: Ensemble) -> list[dict[str, Any]]:
    epsilons = sorted({cell.epsilon for cell in cells if cell.attack != CLEAN})
    parameters = sum(parameter.numel() for parameter in ensemble.parameters())
    own = {"arm": arm.name, "members": arm.precision, "parameters": parameters, "split": "test"}
    return [own | cell_row(cell) for cell in [*cells, *(worst(cells, epsilon) for epsilon in epsilons)]]


def cell_row(cell: Cell) -> dict[str, Any]:
    """Return the accuracy that an attack leaves, as a row of a table without whose it is."""
    accuracy = cell.accuracy()
    return {
        "attack": cell.attack,
        "epsilon": cell.epsilon,
        "name": "accuracy",
        "value": accuracy.value,
        "low": accuracy.low,
        "high": accuracy.high,
        "images": accuracy.images,
        "draws": accuracy.draws,
        "forward": cell.cost.forward,
        "backward": cell.cost.backward,
        "largest_perturbation": cell.largest,
    }
