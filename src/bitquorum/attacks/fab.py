"""Attack by FAB: walk along the decision boundary towards the image, for the least perturbation that fools."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from bitquorum.attacks.apgd import wrong_classes
from bitquorum.attacks.base import Criterion, Loss, Problem, Witness, exceeds
from bitquorum.attacks.gradient import GradientAttack
from bitquorum.geometry import Norm, norm_of, per_example
from bitquorum.interface import InputError


@final
@dataclass(frozen=True, kw_only=True)
class FAB(GradientAttack):
    r"""Project onto the linearized boundary to a wrong class, drawn back towards the image; keep the nearest point.

    With $f = z_t - z_y$ of the pooled log-probabilities, both the present point and the image are projected onto
    $f(x) + \nabla f \cdot (z - x) = 0$ within [0, 1], with the least norm, and the next point lies between both:

    $$x' = (1 - \alpha)(x + \eta \delta) + \alpha (x_0 + \eta \delta_0), \quad
      \alpha = \min(\lVert \delta \rVert / (\lVert \delta \rVert + \lVert \delta_0 \rVert), \alpha_{max})$$

    A point that fools is noted and drawn back by the factor $\beta$. Of the `targets` likeliest wrong classes the end
    of the largest margin is kept. The nearest point found may lie outside of the ball; then its projection is returned.
    Reference: Croce and Hein, 2020, https://arxiv.org/abs/1907.02044, algorithm 1, in the targeted form. Deviations: no
    final search on the line; under noise the mean over a step's draws decides, and of all points met the one of the
    largest margin is kept, since the nearest is one that few draws took for wrong by luck; a caller's `criterion` is
    taken as f.

    Attributes:
        steps: Number of steps for each target.
        targets: Number of wrong classes tried; 0 for all.
        alpha: Largest share $\alpha_{max}$ of the image's own projection.
        overshoot: Factor $\eta$ on projections.
        backward: Factor $\beta$ by which a point that fools is drawn back.
        selection: Draws on which classes are ranked and ends are compared.
    """

    loss: Loss = "margin"
    steps: int = 50
    targets: int = 9
    alpha: float = 0.1
    overshoot: float = 1.05
    backward: float = 0.9
    selection: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.steps, self.selection) < 1 or self.targets < 0:
            raise InputError(
                "expected at least one step and selection draw and a number of targets of at least 0, got "
                f"steps={self.steps}, selection={self.selection}, targets={self.targets}"
            )
        if not (0 <= self.alpha <= 1 and self.overshoot >= 1 and 0 < self.backward <= 1) or self.loss != "margin":
            raise InputError(
                "expected alpha in [0, 1], an overshoot of at least 1, backward in (0, 1] and the margin as loss, got "
                f"{self.alpha}, {self.overshoot}, {self.backward} and {self.loss}"
            )

    @property
    def label(self) -> str:
        """Return FAB-T-steps, with what differs from the default."""
        budget = f"{self.steps}" if self.eot == 1 else f"{self.steps}x{self.eot}"
        names = (("alpha", 0.1), ("overshoot", 1.05), ("backward", 0.9))
        choices = [f" {name}={getattr(self, name):g}" for name, usual in names if getattr(self, name) != usual]
        targets = f" t{self.targets}" if self.targets else ""
        return f"FAB-T-{budget}{targets}{''.join(choices)}{self._options('margin')}"

    def _run(self, problem: Problem) -> Float[Tensor, "batch *image"]:
        return problem.best(self._ends(problem), problem.goal, draws=self.selection)

    def _ends(self, problem: Problem) -> Iterator[Float[Tensor, "batch *image"]]:
        ranked = wrong_classes(problem, draws=self.selection)[: self.targets or None]
        found = problem.child("targets").towards(ranked, self.nearest, loss="margin", pooling=self.pooling)
        return map(problem.project, found)

    def nearest(self, problem: Problem, boundary: Criterion) -> Float[Tensor, "batch *image"]:
        """Return the nearest point found that the model errs on, into whatever class; the last one where none was.

        Under noise it is the point of the largest margin, whether the model errs on it or not.
        """
        images, witness = problem.images, Witness(boundary, problem.goal)
        noisy = getattr(problem.model, "stochastic", True)
        x, found = images, images.clone()
        best = torch.full_like(images.flatten(1)[:, 0], -torch.inf)
        for step in range(self.steps):
            gradient, value = self._gradient(problem, x, witness, step)
            length, fooled = norm_of(x - images, problem.norm), witness.value > 0
            worth = witness.value if noisy else torch.where(fooled, -length, -torch.inf)
            better = exceeds(worth, best)
            found[better], best = x[better], torch.where(better, worth, best)
            here = to_hyperplane(x, gradient, value, problem.norm)
            there = to_hyperplane(images, gradient, value + _along(gradient, images - x), problem.norm)
            lengths = norm_of(here, problem.norm), norm_of(there, problem.norm)
            share = (lengths[0] / (lengths[0] + lengths[1]).clamp(min=1e-30)).clamp(max=self.alpha)
            share = per_example(share, x)
            moved = (1 - share) * (x + self.overshoot * here) + share * (images + self.overshoot * there)
            drawn = images + self.backward * (x - images)
            x = torch.where(per_example(fooled, x), drawn, moved.clamp(0, 1))
        return torch.where(per_example(best.isneginf(), x), x, found)


def to_hyperplane(
    x: Float[Tensor, "batch *image"], gradient: Float[Tensor, "batch *image"], value: Float[Tensor, "batch"], norm: Norm
) -> Float[Tensor, "batch *image"]:
    r"""Return the least step $\delta$ with $\mathrm{value} + g \cdot \delta = 0$ and $0 \le x + \delta \le 1$.

    Every pixel moves towards the plane, by $\min(\tau, r)$ for `linf` and $\min(\tau |g|, r)$ for `l2`, with r its room
    up to the border and $\tau$ the smallest that reaches the plane: the root of a sum of ramps, found exactly from its
    sorted corners. Where the box does not reach the plane, every pixel goes as far as it can. Reference: Croce and
    Hein, 2020, https://arxiv.org/abs/1907.02044, section 2.1.

    Examples:
        >>> to_hyperplane(torch.tensor([[0.5, 0.9]]), torch.tensor([[1.0, 1.0]]), torch.tensor([-0.4]), "linf")
        tensor([[0.3000, 0.1000]])
    """
    g, start = gradient.flatten(1), x.flatten(1)
    direction = -value.sign()[:, None] * g.sign()
    room = torch.where(direction > 0, 1 - start, start)
    weight = g.abs()
    speed = torch.ones_like(weight) if norm == "linf" else weight
    corner, order = torch.where(weight > 0, room / speed.clamp(min=1e-30), torch.zeros_like(room)).sort(1)
    ramp, full = (weight * speed).gather(1, order), (weight * room).gather(1, order)
    done, rising = full.cumsum(1) - full, ramp.sum(1, keepdim=True) - (ramp.cumsum(1) - ramp)
    reached = done + corner * rising >= value.abs()[:, None]
    first = reached.long().argmax(1, keepdim=True)
    tau = ((value.abs()[:, None] - done.gather(1, first)) / rising.gather(1, first).clamp(min=1e-30)).clamp(min=0)
    tau = torch.where(reached.any(1, keepdim=True), tau, torch.inf)
    step = direction * torch.minimum((tau * speed).nan_to_num(nan=0.0, posinf=torch.inf), room)
    return step.view_as(x)


def _along(gradient: Float[Tensor, "batch *image"], step: Float[Tensor, "batch *image"]) -> Float[Tensor, "batch"]:
    return (gradient * step).flatten(1).sum(1)
