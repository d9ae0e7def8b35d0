"""Read from a run the images that its attacks made, and make those that need no attack."""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from bitquorum import rng
from bitquorum.config import Arm, Experiment
from bitquorum.data import ImageSet, load
from bitquorum.data.corrupt import corrupt
from bitquorum.detect import Detection
from bitquorum.evaluate import Evaluation
from bitquorum.evaluate.climbs import read_climb
from bitquorum.experiment.ladder import climbed, ladder_folder, ladders
from bitquorum.experiment.runs import evaluation_folder, experiment_of, read_cell, results
from bitquorum.files import load_tensors, read_jsonl
from bitquorum.interface import DataError
from bitquorum.plane import Plane
from bitquorum.registry import decode, digest, nearest
from bitquorum.store import Run
from bitquorum.toml import read_toml

P = TypeVar("P", Plane, Detection)
Axis = Literal["", "epsilon", "severity"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Threat:
    """Hold what is done to the test images: its name for tables, its strength, and the images themselves.

    Attributes:
        label: Name of the attack or corruption.
        kind: `clean`, an attack's kind, `ladder`, `transfer`, `noise` or `corruption`.
        axis: What `level` counts.
        level: Epsilon or severity; 0 for clean images.
        images: Returns the images, read when they are needed.
    """

    label: str
    kind: str
    axis: Axis
    level: float
    images: Callable[[], Float[Tensor, "images *image"]]

    @property
    def file(self) -> str:
        """Name of the file that holds an outcome under this threat."""
        return f"{re.sub(r'[^A-Za-z0-9._-]+', '-', self.label).strip('-')}@{self.level:.6f}.safetensors"


def chosen_evaluation(stored: Run, query: str = "") -> Evaluation:
    """Return a stored evaluation by its digest, by default the run's own.

    Raises:
        DataError: if it is not there, is not complete, or has no attack.
    """
    own = experiment_of(stored).evaluation
    known = {digest(own): own}
    for path in sorted(stored.path.glob("evaluations/*/evaluation.toml")):
        known.setdefault(path.parent.name, decode(Evaluation, read_toml(path)))
    if query and query not in known:
        raise DataError(
            f"expected a stored evaluation among {', '.join(known)}, got {query!r}; {nearest(query, known)}"
        )
    chosen = known[query or digest(own)]
    if not results(stored, chosen) or not chosen.attacks:
        raise DataError(
            f"expected a complete evaluation with attacks in {stored.path}, got none; run "
            f"`bitquorum evaluate {stored.path.name}` first"
        )
    return chosen


def pinned(stored: Run, chosen: P) -> tuple[P, Evaluation]:
    """Return a plane or a detection that names the evaluation and the ladders that it reads, and the evaluation.

    Ladders that no arm has climbed to the end, or that one is climbing still, are none to read.

    Raises:
        DataError: as `chosen_evaluation` does; and if a named ladder is not there to read.
    """
    evaluation = chosen_evaluation(stored, chosen.evaluation)
    known = tuple(digest(ladder) for ladder in ladders(stored) if climbed(stored, ladder))
    for name in chosen.ladders or ():
        if name not in known:
            raise DataError(
                f"expected a ladder that is climbed to the end among {', '.join(known) or '(none)'}, got {name!r}; "
                f"{nearest(name, known)}, or climb it on by `bitquorum evaluate {stored.path.name} --ladder NAME`"
            )
    found = known if chosen.ladders is None else chosen.ladders
    return replace(chosen, evaluation=evaluation_folder(stored, evaluation).name, ladders=found), evaluation


def climbers(stored: Run, chosen: Plane | Detection) -> list[dict[str, Any]]:
    """Return which arms have climbed each of the ladders that a plane or a detection reads, to the end.

    One that was stored before an arm climbed is not complete any more.
    """
    named = chosen.ladders or ()
    return [
        {"ladder": digest(ladder), "arms": climbed(stored, ladder)}
        for ladder in ladders(stored)
        if digest(ladder) in named
    ]


def is_complete(folder: Path, climbers: list[dict[str, Any]]) -> bool:
    """Return whether a plane or a detection is stored in a folder and read what these have climbed."""
    known = read_jsonl(folder / "ladders.jsonl")
    return (folder / "metrics.jsonl").exists() and known in (climbers, [])  # none: an earlier version kept none


def evaluated_images(stored: Run, evaluation: Evaluation, data_root: Path | None) -> ImageSet:
    """Return the test images of an evaluation."""
    return evaluation.choose(load(experiment_of(stored).data.name, "test", root=data_root))


def clean(test: ImageSet) -> Threat:
    """Return no threat at all."""
    return Threat(label="clean", kind="clean", axis="", level=0.0, images=partial(_all, test))


def attacks(stored: Run, evaluation: Evaluation, arm: Arm) -> list[Threat]:
    """Return the attacks of a stored evaluation on an arm, at every epsilon.

    Raises:
        DataError: if an attack's images are not stored; earlier versions did not keep them.
    """
    folder = evaluation_folder(stored, evaluation) / arm.name
    kinds = {attack.label: attack.kind for attack in evaluation.attacks}
    found = []
    for path in sorted(folder.glob("*.safetensors")):
        facts = read_cell(path, images=False)
        if facts.attack in kinds:
            reader = partial(_stored_images, path)
            found.append(
                Threat(
                    label=facts.attack,
                    kind=kinds[facts.attack],
                    axis="epsilon",
                    level=facts.epsilon,
                    images=reader,
                )
            )
    order = list(kinds)
    missing = len(order) * len(evaluation.epsilons) - len(found)
    if missing:
        raise DataError(f"expected the outcomes of every attack in {folder}, got {missing} too few; evaluate again")
    return sorted(found, key=lambda threat: (order.index(threat.label), threat.level))


def ladder_worst(stored: Run, arm: Arm, test: ImageSet, digests: Sequence[str]) -> list[Threat]:
    """Return the worst versions of ladders in the maximum norm that the arm has climbed to the end.

    Those that lack a test image are left out.
    Ladders of one name, such as `standard` on two numbers of draws, have their digests in their labels.
    """
    found = []
    chosen = [ladder for ladder in ladders(stored) if ladder.norm == "linf" and digest(ladder) in digests]
    names = Counter(ladder.name for ladder in chosen)
    for ladder in chosen:
        if arm.name not in climbed(stored, ladder):
            continue
        name = ladder.name if names[ladder.name] == 1 else f"{ladder.name} {digest(ladder)}"
        for path in sorted((ladder_folder(stored, ladder) / arm.name).glob("climb@*.safetensors")):
            tensors, facts = load_tensors(path)
            if not bool(torch.isin(test.index, tensors["examples"]).all()):
                continue
            found.append(
                Threat(
                    label=f"ladder {name}: worst",
                    kind="ladder",
                    axis="epsilon",
                    level=float(facts["epsilon"]),
                    images=partial(_worst_versions, path, test),
                )
            )
    return found


def transfers(stored: Run, experiment: Experiment, evaluation: Evaluation, arm: Arm) -> list[Threat]:
    """Return what the evaluation's last attack made for every other arm."""
    last = evaluation.attacks[-1].label
    return [
        Threat(label=f"from {other.name}: {last}", kind="transfer", axis="epsilon", level=t.level, images=t.images)
        for other in experiment.arms
        if other.name != arm.name
        for t in attacks(stored, evaluation, other)
        if t.label == last
    ]


def everyday(test: ImageSet, plane: Plane, epsilons: Sequence[float]) -> Iterator[Threat]:
    """Yield random corners of the balls, and corruptions."""
    for epsilon in epsilons:
        images = partial(_corners, test, epsilon, plane.seed)
        yield Threat(label="random corners", kind="noise", axis="epsilon", level=epsilon, images=images)
    for name in plane.corruptions:
        for severity in plane.severities:
            images = partial(_corrupted, test, name, severity, plane.seed)
            yield Threat(label=name, kind="corruption", axis="severity", level=float(severity), images=images)


def _all(test: ImageSet) -> Tensor:
    return test.batch(torch.arange(len(test))).images


def _stored_images(path: Path) -> Tensor:
    images = read_cell(path).images
    if images is None:
        raise DataError(
            f"expected adversarial images in {path}, got none: an earlier version did not keep them; remove the "
            "folder and evaluate again"
        )
    return images


def _worst_versions(path: Path, test: ImageSet) -> Tensor:
    climb, index = read_climb(path)
    place = {int(example): row for row, example in enumerate(index)}
    return climb.images[torch.tensor([place[int(example)] for example in test.index])]


def _corners(test: ImageSet, epsilon: float, seed: int) -> Tensor:
    images = _all(test)
    u = rng.uniform(rng.derive(seed, "corners"), test.index, images.shape[1:].numel()).view_as(images)
    return (images + epsilon * (2 * (u > 0.5).to(images) - 1)).clamp(0, 1)


def _corrupted(test: ImageSet, name: Any, severity: int, seed: int) -> Tensor:
    return corrupt(_all(test), name, severity, examples=test.index, seed=rng.derive(seed, "corruptions"))
