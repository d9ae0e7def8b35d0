r"""Measure how much of an image's gradient a training step sees, that takes it through the statistics of its batch.

    python benchmarks/held_statistics.py runs/RUN --to results/NAME

For each arm of a trained run, on training images in batches of the trainer's size and under one draw: the mean of
$\epsilon \|\nabla_x m\|_1$ of the log-odds m, in nats, with norm layers as in evaluation (which an attacker meets), in
training, and in training with their statistics held; and the mean cosine of each with the first.
"""

import argparse
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bitquorum import kernels, rng
from bitquorum.data import ImageSet
from bitquorum.environment import environment
from bitquorum.experiment import experiment_of, restore_ensemble, training_images
from bitquorum.files import atomic_write, json_row, write_jsonl
from bitquorum.objective.robustness import log_odds
from bitquorum.store import Run

WAYS = ("evaluation", "batch", "held")


def gradients(member: nn.Module, images: Tensor, labels: Tensor, examples: Tensor, way: str) -> Tensor:
    """Return the gradient of the log-odds of the true class, summed over the batch."""
    x = images.clone().requires_grad_()
    with rng.draw([0], examples):
        logits = member.train(way != "evaluation")(x)
    with kernels.statistics_held() if way == "held" else nullcontext():
        return torch.autograd.grad(log_odds(logits[None], labels).sum(), x)[0].flatten(1)


def measure(member: nn.Module, data: ImageSet, size: int, epsilon: float) -> list[dict[str, Any]]:
    """Return one row for each way of taking the gradient."""
    batches = [data.batch(positions, "cpu") for positions in torch.arange(len(data)).split(size)]
    whole = {
        way: torch.cat([gradients(member, batch.images, batch.labels, batch.examples, way) for batch in batches])
        for way in WAYS  # evaluation first: a pass in training moves the running statistics
    }
    return [
        {
            "statistics": way,
            "images": len(data),
            "epsilon": epsilon,
            "linear_drop": float(epsilon * gradient.abs().sum(1).mean()),
            "cosine": float(torch.cosine_similarity(gradient, whole["evaluation"]).mean()),
        }
        for way, gradient in whole.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a trained run")
    parser.add_argument("--to", type=Path, required=True, help="folder of rows and environment")
    parser.add_argument("--images", type=int, default=512, help="of the training images, the first")
    parser.add_argument("--epsilon", type=float, default=8 / 255)
    arguments = parser.parse_args()
    stored = Run.open(arguments.run)
    experiment = experiment_of(stored)
    data = training_images(experiment, None)
    chosen, rows = data.take(arguments.images), []
    for arm in experiment.arms:
        ensemble = restore_ensemble(experiment, arm, stored).requires_grad_(False)
        size = (arm.trainer or experiment.trainer).batch_size
        for index, member in enumerate(ensemble.members):
            found = measure(member, chosen, size, arguments.epsilon)
            rows += [{"run": experiment.name, "arm": arm.name, "member": index, **row} for row in found]
    write_jsonl(arguments.to / "metrics.jsonl", rows)
    atomic_write(arguments.to / "environment.json", json_row(environment()))
    for row in rows:
        print(
            f"{row['arm']:12} member {row['member']}  {row['statistics']:10}  {row['linear_drop']:.3f} nats"
            f"  cosine {row['cosine']:.2f}"
        )


if __name__ == "__main__":
    main()
