"""Attack by APGD: projected gradient steps whose length adapts to how the loss rises."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bitquorum.attacks.base import Criterion, Loss, Problem, Witness, exceeds
from bitquorum.attacks.gradient import GradientAttack
from bitquorum.geometry import per_example
from bitquorum.interface import InputError


@dataclass(frozen=True, kw_only=True)
class _AdaptiveSteps(GradientAttack):
    """Share the search of APGD.

    Attributes:
        steps: Number of steps of each restart.
        restarts: Number of random starts; the best end on `selection` fresh draws is kept.
        selection: Number of draws on which ends are compared.
    """

    steps: int = 100
    restarts: int = 1
    selection: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.steps, self.restarts, self.selection) < 1:
            raise InputError(
                f"expected at least one step, restart and selection draw, got steps={self.steps}, "
                f"restarts={self.restarts}, selection={self.selection}"
            )

    def _budget(self) -> str:
        budget = f"{self.steps}" if self.eot == 1 else f"{self.steps}x{self.eot}"
        return budget + ("" if self.restarts == 1 else f" r{self.restarts}")

    def _climb(self, problem: Problem, criterion: Criterion) -> Float[Tensor, "batch *image"]:
        x, witness = problem.random_point("start"), Witness(criterion, problem.goal)
        gradient, loss = self._gradient(problem, x, witness, 0)
        found, nearest = x.clone(), witness.value
        previous, best, best_loss, best_gradient = x, x.clone(), loss.clone(), gradient.clone()
        length = torch.full_like(loss, 2 * problem.epsilon)
        rises, halved, checkpoint_loss = torch.zeros_like(loss), torch.ones_like(loss, dtype=torch.bool), loss.clone()
        checkpoints, last = checkpoints_of(self.steps), 0
        for step in range(1, self.steps + 1):
            z = problem.ascend(x, gradient, length)
            inertia = 0.75 if step > 1 else 1.0
            moved = problem.project(x + inertia * (z - x) + (1 - inertia) * (x - previous))
            previous, x, before = x, moved, loss
            gradient, loss = self._gradient(problem, x, witness, step)
            nearer, better = exceeds(witness.value, nearest), exceeds(loss, best_loss)
            found[nearer], nearest = x[nearer], torch.where(nearer, witness.value, nearest)
            rises += loss > before
            best[better], best_gradient[better] = x[better], gradient[better]
            best_loss = torch.where(better, loss, best_loss)
            if step in checkpoints:
                stuck: Bool[Tensor, "batch"] = (rises < 0.75 * (step - last)) | (
                    ~halved & (best_loss <= checkpoint_loss)
                )
                length = torch.where(stuck, length / 2, length)
                back = per_example(stuck, x)
                x, gradient = torch.where(back, best, x), torch.where(back, best_gradient, gradient)
                loss = torch.where(stuck, best_loss, loss)
                halved, checkpoint_loss, last = stuck, best_loss.clone(), step
                rises = torch.zeros_like(rises)
        return found


@final
@dataclass(frozen=True, kw_only=True)
class APGD(_AdaptiveSteps):
    r"""Climb the loss with momentum 0.75, halving the step of an example whose loss has stopped rising.

    $$z = P(x_k + \eta \, \mathrm{sign}\, g_k), \quad x_{k+1} = P(x_k + 0.75 (z - x_k) + 0.25 (x_k - x_{k-1}))$$

    The step begins at $2 \epsilon$. At checkpoints it is halved, and the search goes back to the best point, where the
    loss rose in fewer than 75 % of the steps since the last checkpoint, or where neither step nor best loss has
    changed. The point of the largest margin that was met is returned, whatever the loss. Under noise the loss of a step
    is its mean over the step's own `eot` draws. With `loss="cross-entropy"` it is APGD-CE, with `dlr` APGD-DLR.
    Reference: Croce and Hein, 2020, https://arxiv.org/abs/2003.01690, algorithm 1 and section 3. Deviations: draws,
    which the paper does not have; the margin decides what is returned, in the paper the loss.

    Attributes:
        steps: Number of steps of each restart.
        restarts: Number of random starts; the best end on `selection` fresh draws is kept.
        selection: Number of draws on which ends are compared.
    """

    @property
    def label(self) -> str:
        """Return APGD-steps, with what differs from the default."""
        return ("APGD-" if self.eot == 1 else "EOT-APGD-") + self._budget() + self._options()

    def _run(self, problem: Problem) -> Float[Tensor, "batch *image"]:
        criterion = problem.criterion or self._criterion(problem.labels)
        ends = (self._climb(problem.child("restart", index), criterion) for index in range(self.restarts))
        return problem.best(ends, problem.goal, draws=self.selection)


@final
@dataclass(frozen=True, kw_only=True)
class APGDTargeted(_AdaptiveSteps):
    r"""Climb towards one wrong class after the other, by the steps of `APGD`; keep the end of the largest margin.

    $$\frac{z_t - z_y}{z_{(1)} - (z_{(3)} + z_{(4)}) / 2}$$

    is the loss `dlr` for target t on the log-probabilities z of a view; `pooling` makes the views. Targets are the
    wrong classes of the largest mean probability on the clean image over `selection` draws. Reference: Croce and Hein,
    2020, https://arxiv.org/abs/2003.01690, eq. 7. Deviations: ends of all targets are compared by their margin on
    `selection` fresh draws; with less than four classes the order statistics that are missing are left out of the
    denominator; targets share their start and their draws; other losses stand beside the paper's; a caller's
    `criterion` is climbed as it is, once a target, from other starts.

    Attributes:
        steps: Number of steps of each restart.
        restarts: Number of random starts for each target.
        selection: Number of draws on which classes are ranked and ends are compared.
        loss: `dlr`; `margin`, its numerator; or a cross-entropy to the target, to be lowered.
        targets: Number of wrong classes tried; 0 for all.
    """

    loss: Loss = "dlr"
    targets: int = 9

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.targets < 0:
            raise InputError(f"expected a number of targets of at least 0, got {self.targets}")

    @property
    def label(self) -> str:
        """Return APGD-T-steps, with what differs from the default."""
        budget = self._budget() + (f" t{self.targets}" if self.targets else "")
        return ("APGD-T-" if self.eot == 1 else "EOT-APGD-T-") + budget + self._options("dlr")

    def _run(self, problem: Problem) -> Float[Tensor, "batch *image"]:
        return problem.best(self._ends(problem), problem.goal, draws=self.selection)

    def _ends(self, problem: Problem) -> Iterator[Float[Tensor, "batch *image"]]:
        ranked = wrong_classes(problem, draws=self.selection)[: self.targets or None]
        for index in range(self.restarts):
            restart = problem.child("restart", index)
            yield from restart.towards(ranked, self._climb, loss=self.loss, pooling=self.pooling)


def wrong_classes(problem: Problem, *, draws: int) -> Int[Tensor, "rank batch"]:
    """Return the wrong classes of each clean image, the likeliest over fresh draws first."""
    probability = problem.logits(problem.images, seeds=problem.seeds(draws, "classes")).softmax(-1).mean((0, 1))
    without_true = probability.scatter(1, problem.labels[:, None], -1.0)
    order = torch.sort(without_true, dim=1, descending=True, stable=True).indices
    return order[:, :-1].T


def checkpoints_of(steps: int) -> set[int]:
    r"""Return the steps at which APGD looks back: $\lceil p_j N \rceil$, $p_1 = 0.22$, gaps shrinking by 0.03 to 0.06.

    Examples:
        >>> sorted(checkpoints_of(100))
        [22, 41, 57, 70, 80, 87, 93, 99]
    """
    found, before, now = set(), 0.0, 0.22
    while now < 1:
        found.add(math.ceil(round(now * steps, 9)))
        before, now = now, now + max(now - before - 0.03, 0.06)
    return found
