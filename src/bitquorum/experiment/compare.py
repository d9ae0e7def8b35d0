"""Compare the arms of a run image by image: what each has more than one of them, in every number that both have."""

from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from bitquorum.evaluate import CLEAN, worst
from bitquorum.evaluate.compare import difference, holm
from bitquorum.experiment.ladder import norm_named, read_climb, read_ladder
from bitquorum.experiment.runs import choose_arms, experiment_of, read_cell
from bitquorum.files import read_jsonl, write_jsonl
from bitquorum.interface import DataError
from bitquorum.store import Run


def compare_run(stored: Run, *, reference: str | None = None) -> list[list[dict[str, Any]]]:
    """Return the paired differences to one arm, a list of rows for each evaluation and each ladder of a run.

    All arms of an evaluation or a ladder meet the same images, and each image has a rate of being right over its draws.
    The difference of these rates is averaged over images; its interval is one over images, of one seed of training.
    The rows are stored beside those of the evaluation, in place of earlier ones of the same reference.

    Args:
        stored: A run of which two arms at least were attacked to the end.
        reference: Name of the arm that the others are compared to; the first one by default.

    Raises:
        BitquorumError: if the arm is unknown, no evaluation holds it and another, the run is locked or a stored file is
            corrupt.
    """
    experiment = experiment_of(stored)
    base = choose_arms(experiment, [reference] if reference else [])[0].name
    others = [arm.name for arm in experiment.arms if arm.name != base]
    found = []
    with stored.lock():
        for folder in _folders(stored):
            rows = _differences(folder, base, others)
            if rows:
                path = folder / "differences.jsonl"
                write_jsonl(path, [*(row for row in read_jsonl(path) if row["reference"] != base), *rows])
                found.append(rows)
    if not found:
        raise DataError(
            f"expected an evaluation or a ladder of {base!r} and of another arm in {stored.path}, got none that is "
            "complete; attack the run with `bitquorum evaluate`"
        )
    return found


def differences(stored: Run) -> list[list[dict[str, Any]]]:
    """Return the stored rows, a list for each evaluation and each ladder of a run that was compared."""
    return [rows for folder in _folders(stored) if (rows := read_jsonl(folder / "differences.jsonl"))]


def _folders(stored: Run) -> list[Path]:
    return sorted(stored.path.glob("evaluations/*")) + sorted(stored.path.glob("ladders/*"))


def _differences(folder: Path, base: str, others: list[str]) -> list[dict[str, Any]]:
    """Return the rows of one evaluation or ladder; p-values of one number are adjusted for the number of arms."""
    theirs = _rates(folder, base)
    ours = {arm: _rates(folder, arm) for arm in others}
    path = folder / "ladder.toml"
    norm = norm_named(read_ladder(path)) if path.exists() else {}
    rows: list[dict[str, Any]] = []
    for (attack, epsilon), rates in theirs.items():
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
                    "reference": base,
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


def _rates(folder: Path, arm: str) -> dict[tuple[str, float], Float[Tensor, "images"]]:
    """Return each image's rate of being right by attack and epsilon; none where the arm is not attacked to the end."""
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
    return {key: value.float().mean(0) for key, value in correct.items()}
