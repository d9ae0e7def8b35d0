r"""Measure robust accuracy: the expected accuracy over fresh draws of what an attack leaves.

An attack meets some draws; its images are then judged on others, which it never saw. Each image gets a probability
of being classified correctly, and the accuracy is the mean of these. Its interval covers both the choice of images and
the choice of draws.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import final

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from bitquorum import rng
from bitquorum.attacks import FGSM, PGD, Attack
from bitquorum.attacks.transfer import TWINS
from bitquorum.data import Batch, ImageSet
from bitquorum.ensemble import Ensemble
from bitquorum.evaluate.accuracy import Accuracy, interval
from bitquorum.geometry import increasing
from bitquorum.interface import Cost, InputError, Method

CLEAN = "clean"
WORST = "worst"


@dataclass(frozen=True, kw_only=True, eq=False)
class Cell:
    """Hold the outcome of one attack at one epsilon.

    Attributes:
        attack: Label of the attack, or `clean`.
        epsilon: Radius.
        correct: Whether each fresh prediction of each image was right.
        cost: Passes spent by the attack on each image.
        largest: Largest perturbation found, in the maximum norm.
        images: The adversarial images, on the CPU; none for clean images and for worst cases.
    """

    attack: str
    epsilon: float
    correct: Bool[Tensor, "draws images"]
    cost: Cost
    largest: float
    images: Float[Tensor, "images *image"] | None = None

    def accuracy(self) -> Accuracy:
        """Return the expected accuracy with its interval."""
        return interval(self.correct)


@final
@dataclass(frozen=True, kw_only=True)
class Evaluation(Method):
    """Attack an ensemble and measure what is left.

    Attributes:
        attacks: Each is run at every epsilon.
        epsilons: Radii in the maximum norm, in units of the image; positive and increasing.
        examples: Number of test images, balanced over classes; 0 for all.
        draws: Fresh predictions of each image that judge an attack.
        batch_size: Images attacked at once; it changes results by rounding alone.
        seed: Of the choice of images, of attacks and of judging draws.
    """

    attacks: tuple[Attack, ...] = field(default_factory=lambda: (FGSM(), PGD(steps=20), PGD(steps=20, eot=10)))
    epsilons: tuple[float, ...] = (1 / 255, 2 / 255, 5 / 255, 8 / 255)
    examples: int = 0
    draws: int = 20
    batch_size: int = 250
    seed: int = 0

    def __post_init__(self) -> None:
        if not increasing(self.epsilons) or not all(0 < e <= 1 for e in self.epsilons):
            raise InputError(f"expected increasing epsilons in (0, 1], a millionth apart, got {self.epsilons}")
        if min(self.draws, self.batch_size) < 1 or self.examples < 0:
            raise InputError(
                "expected at least one draw and one image per batch and examples of at least 0, got "
                f"{self.draws}, {self.batch_size} and {self.examples}"
            )
        labels = [attack.label for attack in self.attacks]
        if len(set(labels)) != len(labels):
            raise InputError(f"expected attacks with different labels, got {labels}")
        for attack in self.attacks:
            if (source := getattr(attack, "source", TWINS[0])) not in TWINS:
                raise InputError(
                    f"expected attacks from {', '.join(TWINS)}, copies of the ensemble, got {attack.label!r} from "
                    f"{source!r}; only a ladder has other sources"
                )

    def cells(self) -> list[tuple[str, float]]:
        """Return the (attack label, epsilon) of every cell in order, clean first."""
        return [(CLEAN, 0.0)] + [(attack.label, epsilon) for attack in self.attacks for epsilon in self.epsilons]

    def choose(self, data: ImageSet) -> ImageSet:
        """Return the images to evaluate on."""
        if not self.examples or self.examples >= len(data):
            return data
        return data.take(self.examples, seed=rng.derive(self.seed, "examples"))

    def __call__(
        self,
        ensemble: Ensemble,
        data: ImageSet,
        *,
        done: Sequence[Cell] = (),
        on_cell: Callable[[Cell], None] | None = None,
        on_batch: Callable[[int, int], None] | None = None,
        device: torch.device | str = "cpu",
    ) -> list[Cell]:
        """Return all cells, computing those that are not in `done`.

        Args:
            ensemble: Put into evaluation mode; its parameters are left without gradients.
            data: Images and labels, as `choose` returns them.
            done: Cells of an earlier, interrupted call.
            on_cell: Called with each new cell.
            on_batch: Called with batches done and batches in all.
            device: Where to compute.
        """
        if not hasattr(ensemble, "predict"):
            raise InputError(
                f"expected an ensemble, got {type(ensemble).__name__}; use `bitquorum.Ensemble([network])`, or "
                "`evaluate_model` for a module of your own"
            )
        ensemble = ensemble.to(device).eval().requires_grad_(False)
        known = {(cell.attack, cell.epsilon): cell for cell in done}
        attacks = {attack.label: attack for attack in self.attacks}
        missing = [key for key in self.cells() if key not in known]
        total = len(missing) * math.ceil(len(data) / self.batch_size)
        count = 0
        for label, epsilon in missing:
            parts: list[tuple[Tensor, Cost, float, Tensor]] = []
            for batch in data.batches(self.batch_size, device=device):
                parts.append(self._attack(ensemble, batch, attacks.get(label), epsilon))
                count += 1
                if on_batch:
                    on_batch(count, total)
            correct = torch.cat([part[0] for part in parts], 1)
            cell = Cell(
                attack=label,
                epsilon=epsilon,
                correct=correct,
                cost=parts[0][1],
                largest=max(part[2] for part in parts),
                images=torch.cat([part[3] for part in parts]) if label in attacks else None,
            )
            known[label, epsilon] = cell
            if on_cell:
                on_cell(cell)
        return [known[key] for key in self.cells()]

    def _attack(
        self, ensemble: Ensemble, batch: Batch, attack: Attack | None, epsilon: float
    ) -> tuple[Tensor, Cost, float, Tensor]:
        images, cost = batch.images, Cost()
        if attack is not None:
            seed = rng.derive(self.seed, "attack", attack.label, repr(epsilon))
            result = attack(ensemble, images, batch.labels, epsilon=epsilon, examples=batch.examples, seed=seed)
            images, cost = result.images, result.cost
        correct = judge(ensemble, images, batch, draws=self.draws, seed=rng.derive(self.seed, "judge"))
        return correct.cpu(), cost, float((images - batch.images).abs().max()), images.cpu()


@torch.no_grad()
def judge(
    ensemble: Ensemble, images: Float[Tensor, "batch *image"], batch: Batch, *, draws: int, seed: int
) -> Bool[Tensor, "draws batch"]:
    """Return whether each of `draws` fresh predictions of each image is right.

    Raises:
        InputError: if a label is none of the ensemble's classes.
    """
    right = []
    for index in range(draws):
        with rng.draw(rng.derive_many(seed, ensemble.passes, "draw", index), batch.examples):
            logits = ensemble(images)
            right.append(ensemble.predict(logits)[0] == batch.labels)
        if index == 0 and int(batch.labels.max()) >= logits.shape[-1]:
            raise InputError(f"expected labels below the {logits.shape[-1]} classes, got {int(batch.labels.max())}")
    return torch.stack(right)


def worst(cells: Sequence[Cell], epsilon: float) -> Cell:
    """Return the per-image worst case over the attacks at one epsilon.

    For each image the attack is kept that leaves the least expected accuracy. Choosing by the same draws that then
    state the number makes it low rather than high: by less than the standard error of one image's probability.
    """
    rivals = [cell for cell in cells if cell.epsilon == epsilon and cell.attack != CLEAN]
    if not rivals:
        raise InputError(f"expected attacks at epsilon {epsilon}, got none")
    stack = torch.stack([cell.correct for cell in rivals])
    chosen = stack.float().mean(1).argmin(0)
    correct = stack[chosen, :, torch.arange(stack.shape[2])].T
    cost = Cost()
    for cell in rivals:
        cost = cost + cell.cost
    return Cell(
        attack=WORST,
        epsilon=epsilon,
        correct=correct.contiguous(),
        cost=cost,
        largest=max(cell.largest for cell in rivals),
    )
