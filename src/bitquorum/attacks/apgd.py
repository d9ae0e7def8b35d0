"""Attack by APGD: projected gradient steps whose length adapts to how the loss rises."""

import math
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bitquorum import rng
from bitquorum.attacks.base import AttackResult, Criterion, loss_gradient
from bitquorum.attacks.gradient import GradientAttack
from bitquorum.geometry import project_linf, random_linf
from bitquorum.interface import Cost, InputError, Model


@final
@dataclass(frozen=True, kw_only=True)
class APGD(GradientAttack):
    r"""Climb the loss with momentum 0.75, halving the step of an example whose loss has stopped rising.

    $$z = P(x_k + \eta \, \mathrm{sign}\, g_k), \quad x_{k+1} = P(x_k + 0.75 (z - x_k) + 0.25 (x_k - x_{k-1}))$$

    The step begins at $2 \epsilon$. At checkpoints it is halved, and the search goes back to the best point, where the
    loss rose in fewer than 75 % of the steps since the last checkpoint, or where neither step nor best loss has
    changed. The point of the largest loss is returned. Under noise the loss of a step is its mean over the step's own
    `eot` fresh draws. Reference: Croce and Hein, 2020, https://arxiv.org/abs/2003.01690, algorithm 1 and section 3.
    Deviation: draws, which the paper's algorithm does not have.

    Attributes:
        steps: Number of steps of each restart.
        restarts: Number of random starts; the largest loss is kept.
    """

    steps: int = 100
    restarts: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.steps, self.restarts) < 1:
            raise InputError(
                f"expected at least one step and restart, got steps={self.steps}, restarts={self.restarts}"
            )

    @property
    def label(self) -> str:
        """Return APGD-steps, with what differs from the default."""
        name = f"APGD-{self.steps}" if self.eot == 1 else f"EOT-APGD-{self.steps}x{self.eot}"
        return name + ("" if self.restarts == 1 else f" r{self.restarts}") + self._options()

    def _run(
        self,
        model: Model,
        images: Float[Tensor, "batch *image"],
        epsilon: float,
        examples: Int[Tensor, "batch"],
        seed: int,
        criterion: Criterion,
    ) -> AttackResult:
        found, best = images.clone(), torch.full((len(images),), -torch.inf, device=images.device)
        for restart in range(self.restarts):
            child = rng.derive(seed, "restart", restart)
            x, value = self._climb(model, images, epsilon, examples, child, criterion)
            better = value > best
            found[better], best = x[better], torch.maximum(best, value)
        passes = self.restarts * (self.steps + 1) * self.eot
        return AttackResult(images=found, cost=Cost(forward=passes, backward=passes))

    def _climb(
        self,
        model: Model,
        images: Float[Tensor, "batch *image"],
        epsilon: float,
        examples: Int[Tensor, "batch"],
        seed: int,
        criterion: Criterion,
    ) -> tuple[Float[Tensor, "batch *image"], Float[Tensor, "batch"]]:
        def gradient_at(x: Tensor, step: int) -> tuple[Tensor, Tensor]:
            seeds = rng.derive_many(seed, self.eot, "step", step)
            return loss_gradient(model, x, criterion, seeds=seeds, examples=examples, surrogate=self.surrogate)

        shape = (-1, *[1] * (images.dim() - 1))
        x = random_linf(images, epsilon, seed=rng.derive(seed, "start"), examples=examples)
        gradient, loss = gradient_at(x, 0)
        previous, best, best_loss, best_gradient = x, x.clone(), loss.clone(), gradient.clone()
        eta = torch.full_like(loss, 2 * epsilon)
        rises, halved, checkpoint_loss = torch.zeros_like(loss), torch.ones_like(loss, dtype=torch.bool), loss.clone()
        checkpoints, last = checkpoints_of(self.steps), 0
        for step in range(1, self.steps + 1):
            z = project_linf(x + eta.view(shape) * gradient.sign(), images, epsilon)
            inertia = 0.75 if step > 1 else 1.0
            moved = project_linf(x + inertia * (z - x) + (1 - inertia) * (x - previous), images, epsilon)
            previous, x, before = x, moved, loss
            gradient, loss = gradient_at(x, step)
            rises += loss > before
            better = loss > best_loss
            best[better], best_gradient[better] = x[better], gradient[better]
            best_loss = torch.maximum(best_loss, loss)
            if step in checkpoints:
                stuck: Bool[Tensor, "batch"] = (rises < 0.75 * (step - last)) | (
                    ~halved & (best_loss <= checkpoint_loss)
                )
                eta = torch.where(stuck, eta / 2, eta)
                x, gradient = (torch.where(stuck.view(shape), b, c) for b, c in ((best, x), (best_gradient, gradient)))
                loss = torch.where(stuck, best_loss, loss)
                halved, checkpoint_loss, last = stuck, best_loss.clone(), step
                rises = torch.zeros_like(rises)
        return best, best_loss


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
