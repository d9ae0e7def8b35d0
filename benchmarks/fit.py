r"""Measure what an attack leaves of the training images beside what it leaves of the test images.

    python benchmarks/fit.py runs/RUN --to results/NAME

For each arm of a trained run: accuracy without attack, and under EOT-PGD by 20 steps of 4 draws, over fresh draws, on
equally many images of both sets. Where the training images are hardly better off, a network binds that fits too little,
not one that generalizes too little.
"""

import argparse
from pathlib import Path
from typing import Any

from bitquorum import kernels
from bitquorum.attacks import PGD
from bitquorum.data import load
from bitquorum.environment import environment
from bitquorum.evaluate import Evaluation
from bitquorum.experiment import experiment_of, training_images
from bitquorum.experiment.runs import cell_row, restored
from bitquorum.files import atomic_write, json_row, write_jsonl
from bitquorum.store import Run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a trained run")
    parser.add_argument("--to", type=Path, required=True, help="folder of rows and environment")
    parser.add_argument("--images", type=int, default=1000, help="of either set, balanced over classes")
    parser.add_argument("--epsilon", type=float, default=5 / 255)
    arguments = parser.parse_args()
    stored = Run.open(arguments.run)
    experiment = experiment_of(stored)
    attacks, epsilons = (PGD(steps=20, eot=4),), (arguments.epsilon,)
    evaluation = Evaluation(
        attacks=attacks, epsilons=epsilons, examples=arguments.images, batch_size=100, seed=experiment.evaluation.seed
    )
    sets = {"train": training_images(experiment, None), "test": load(experiment.data.name, "test")}
    rows: list[dict[str, Any]] = []
    with kernels.use(experiment.kernels):
        for arm, ensemble in restored(experiment, stored, device="cpu", data_root=None):
            for split, images in sets.items():
                for cell in evaluation(ensemble, evaluation.choose(images)):
                    row = cell_row(cell)
                    rows.append({"arm": f"{arm.name}, {split}", "members": arm.precision, "split": split} | row)
                    print(
                        f"{arm.name:12} {split:6} {cell.attack:16} {100 * row['value']:.1f} % "
                        f"[{100 * row['low']:.1f}, {100 * row['high']:.1f}]",
                        flush=True,
                    )
    write_jsonl(arguments.to / "evaluations" / "fit" / "metrics.jsonl", rows)
    atomic_write(arguments.to / "environment.json", json_row(environment()))


if __name__ == "__main__":
    main()
