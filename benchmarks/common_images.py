r"""Compare two arms on the test images that ladders of different size have in common.

    python benchmarks/common_images.py results/NAME ARM results/OTHER REFERENCE

Both runs are published, with ladders that differ in the number of images alone (`examples`, `skip`, `check_images`).
The paired differences lie beside the ladder of the first, as `bitquorum compare` stores those of ladders that are equal
altogether. The data set of the runs is needed: it says which images a ladder took.
"""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitquorum.data import ImageSet, load
from bitquorum.evaluate import Ladder
from bitquorum.evaluate.compare import difference
from bitquorum.experiment import experiment_of
from bitquorum.experiment.ladder import read_ladder
from bitquorum.files import read_jsonl, write_jsonl
from bitquorum.store import Run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="published run")
    parser.add_argument("arm")
    parser.add_argument("other", type=Path, help="published run that it is compared to")
    parser.add_argument("reference", help="arm of that run")
    arguments = parser.parse_args()
    test = load(experiment_of(Run.open(arguments.run)).data.name, "test")
    theirs = {_settings(path): path.parent for path in sorted(arguments.other.glob("ladders/*/ladder.toml"))}
    for path in sorted(arguments.run.glob("ladders/*/ladder.toml")):
        if _settings(path) in theirs:
            folders = path.parent, theirs[_settings(path)]
            name = f"{arguments.reference} of {arguments.other.resolve().name}"
            rows = _differences(folders, (arguments.arm, arguments.reference), name, test)
            write_jsonl(path.parent / "differences.jsonl", rows)
            for row in rows:
                print(row["attack"], *(f"{100 * row[key]:+.1f}" for key in ("value", "low", "high")), row["images"])


def _settings(path: Path) -> Ladder:
    return replace(read_ladder(path), examples=0, skip=None, check_images=0)


def _differences(folders: tuple[Path, Path], arms: tuple[str, str], name: str, test: ImageSet) -> list[dict[str, Any]]:
    chosen = [read_ladder(folder / "ladder.toml").choose(test).index for folder in folders]
    ours, theirs = (
        {
            row["attack"]: _common(row, index, other)
            for row in read_jsonl(folder / "outcomes.jsonl")
            if row["arm"] == arm
        }
        for folder, arm, index, other in zip(folders, arms, chosen, chosen[::-1], strict=True)
    )
    epsilon = read_ladder(folders[0] / "ladder.toml").epsilons[0]
    rows = []
    for attack, rates in ours.items():
        found = difference(rates[None], theirs[attack][None])
        facts = {"arm": arms[0], "reference": name, "split": "test", "attack": attack, "epsilon": epsilon}
        numbers = {"value": found.value, "low": found.low, "high": found.high, "p": found.p, "adjusted_p": found.p}
        rows.append({**facts, "name": "difference", **numbers, "images": len(rates)})
    return rows


def _common(row: dict[str, Any], index: Tensor, other: Tensor) -> Tensor:
    """Return the rate of each image of a ladder that the other one has too, both in the order of the data set."""
    return (torch.tensor(row["right"]) / row["draws"])[torch.isin(index, other)]


if __name__ == "__main__":
    main()
