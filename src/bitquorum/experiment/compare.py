"""Compare arms image by image, of one run or of two: what each has more than one of them, where both have a number."""

from pathlib import Path
from typing import Any, Final, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from bitquorum.evaluate import CLEAN, worst
from bitquorum.evaluate.climbs import read_climb
from bitquorum.evaluate.compare import difference, holm
from bitquorum.experiment.ladder import norm_named, read_ladder
from bitquorum.experiment.runs import choose_arms, experiment_of, read_cell
from bitquorum.files import read_jsonl, write_jsonl
from bitquorum.interface import DataError
from bitquorum.store import Run

_Rates: TypeAlias = dict[tuple[str, float], Float[Tensor, "images"]]

_OUTCOMES: Final = "outcomes.jsonl"


def compare_run(stored: Run, *, reference: str | None = None, other: Run | None = None) -> list[list[dict[str, Any]]]:
    """Return the paired differences to one arm, a list of rows for each evaluation and each ladder of a run.

    All arms of an evaluation or a ladder meet the same images, and each image has a rate of being right over its draws.
    The difference of these rates is averaged over images; its interval is one over images, of one seed of training.
    The rows are stored beside those of the evaluation, in place of earlier ones of the same reference.

    Args:
        stored: A run of which two arms at least were attacked to the end; one arm beside another run.
        reference: Name of the arm that the others are compared to; the first one by default.
        other: Run that the reference is an arm of, as it was made or published, with the same test images; `stored` by
            default. Evaluations and ladders are compared where both runs hold them with the same settings, and rows
            name the reference together with the folder of its run.

    Raises:
        BitquorumError: if the arm is unknown, no evaluation holds it and another, the runs are of different data sets,
            the run is locked or a stored file is corrupt.
    """
    home = other or stored
    experiment, theirs = experiment_of(stored), experiment_of(home)
    base = choose_arms(theirs, [reference] if reference else [])[0].name
    if theirs.data.name != experiment.data.name:
        raise DataError(
            f"expected two runs of one data set, got {experiment.data.name!r} and {theirs.data.name!r}; "
            "differences are paired by image"
        )
    name = f"{base} of {home.path.resolve().name}" if other else base
    arms = [arm.name for arm in experiment.arms if other or arm.name != base]
    found = []
    with stored.lock():
        for folder in _folders(stored):
            rows = _differences(folder, arms, _rates(home.path / folder.relative_to(stored.path), base), name)
            if rows:
                path = folder / "differences.jsonl"
                write_jsonl(path, [*(row for row in read_jsonl(path) if row["reference"] != name), *rows])
                found.append(rows)
    if not found:
        which = f"that {home.path} holds of {base!r}" if other else f"of {base!r} and of another arm"
        raise DataError(
            f"expected an evaluation or a ladder {which} in {stored.path}, got none that is complete; attack "
            f"{'both runs with the same settings by' if other else 'the run with'} `bitquorum evaluate`"
        )
    return found


def publish_run(stored: Run, target: Path) -> None:
    """Publish a run with the outcomes of each image, so that runs made later can be compared to it.

    Beside what `Run.publish` copies, every evaluation and ladder gets a file with a row for each arm, attack and
    epsilon: for each test image, how many of its draws are right.

    Raises:
        BitquorumError: as `Run.publish`; and if a stored file is corrupt.
    """
    stored.publish(target)
    for folder in _folders(stored):
        rows = [row for arm in sorted(folder.iterdir()) if arm.is_dir() for row in _outcomes(folder, arm.name)]
        if rows:
            write_jsonl(target / folder.relative_to(stored.path) / _OUTCOMES, rows)


def differences(stored: Run) -> list[list[dict[str, Any]]]:
    """Return the stored rows, a list for each evaluation and each ladder of a run that was compared."""
    return [rows for folder in _folders(stored) if (rows := read_jsonl(folder / "differences.jsonl"))]


def _folders(stored: Run) -> list[Path]:
    return sorted(stored.path.glob("evaluations/*")) + sorted(stored.path.glob("ladders/*"))


def _differences(folder: Path, arms: list[str], reference: _Rates, name: str) -> list[dict[str, Any]]:
    """Return the rows of one evaluation or ladder; p-values of one number are adjusted for the number of arms."""
    ours = {arm: _rates(folder, arm) for arm in arms}
    path = folder / "ladder.toml"
    norm = norm_named(read_ladder(path)) if path.exists() else {}
    rows: list[dict[str, Any]] = []
    for (attack, epsilon), rates in reference.items():
        found = {
            arm: difference(known[attack, epsilon][None], rates[None])
            for arm, known in ours.items()
            if (attack, epsilon) in known
        }
        adjusted = holm([item.p for item in found.values()])
        for (arm, item), p in zip(found.items(), adjusted, strict=True):
            rows.append(
                {
                    "arm": arm,
                    "reference": name,
                    "split": "test",
                    "attack": attack,
                    "epsilon": epsilon,
                    **norm,
                    "name": "difference",
                    "value": item.value,
                    "low": item.low,
                    "high": item.high,
                    "p": item.p,
                    "adjusted_p": p,
                    "images": len(rates),
                }
            )
    return rows


def _rates(folder: Path, arm: str) -> _Rates:
    """Return each image's rate of being right by attack and epsilon; none where the arm is not attacked to the end."""
    try:
        return {(row["attack"], row["epsilon"]): _rate(row["right"], row["draws"]) for row in _outcomes(folder, arm)}
    except DataError:
        raise
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        path = folder / _OUTCOMES
        raise DataError(
            f"expected how many draws of each image are right at {path}, got: {error}; restore it"
        ) from error


def _rate(right: Any, draws: Any) -> Float[Tensor, "images"]:
    rate = torch.tensor(right) / draws
    if rate.dim() != 1 or not bool(((rate >= 0) & (rate <= 1)).all()):
        raise ValueError(f"counts that are not all from 0 to {draws}")
    return rate


def _outcomes(folder: Path, arm: str) -> list[dict[str, Any]]:
    """Return a row for each attack and epsilon: how many draws of each image are right.

    Of a published run they are what it was published with.
    """
    if (folder / "ladder.toml").exists():
        done = (folder / arm / "verdicts.jsonl").exists()
        climbs = [read_climb(path)[0] for path in sorted((folder / arm).glob("climb@*.safetensors")) if done]
        claims = {("claim", climb.epsilon): climb.claim for climb in climbs}
        correct = claims | {("worst", climb.epsilon): climb.correct for climb in climbs}
    else:
        done = (folder / "metrics.jsonl").exists()
        cells = [read_cell(path, images=False) for path in sorted((folder / arm).glob("*.safetensors")) if done]
        epsilons = sorted({cell.epsilon for cell in cells if cell.attack != CLEAN})
        cells += [worst(cells, epsilon) for epsilon in epsilons]
        correct = {(cell.attack, cell.epsilon): cell.correct for cell in cells}
    rows = [
        {"arm": arm, "attack": attack, "epsilon": epsilon, "draws": len(right), "right": right.sum(0).tolist()}
        for (attack, epsilon), right in correct.items()
    ]
    return rows or [dict(row) for row in read_jsonl(folder / _OUTCOMES) if row.get("arm") == arm]
