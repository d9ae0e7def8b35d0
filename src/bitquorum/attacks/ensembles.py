"""Attack ensembles member by member: ARC and MORA."""

from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar, final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bitquorum.attacks.base import Attack, Criterion, Problem, pooled_loss, view_loss
from bitquorum.geometry import Norm, norm_of, per_example
from bitquorum.interface import InputError
from bitquorum.quantizers import Surrogate


@dataclass(frozen=True, kw_only=True)
class MemberAttack(Attack):
    """Share the choices of attacks that tell members apart.

    Attributes:
        steps: Number of rounds.
        eot: Draws that each gradient averages over.
        surrogate: Backward pass that the quantizers show.
    """

    norms: ClassVar[tuple[Norm, ...]] = ("linf", "l2")

    steps: int = 20
    eot: int = 1
    surrogate: Surrogate = field(default_factory=Surrogate)

    def __post_init__(self) -> None:
        if min(self.steps, self.eot) < 1:
            raise InputError(f"expected at least one step and draw, got steps={self.steps}, eot={self.eot}")

    def _label(self, name: str, **options: tuple[float | int, float | int]) -> str:
        """Return name-steps with the options that differ from their default; each option is (value, default)."""
        budget = f"{self.steps}" if self.eot == 1 else f"{self.steps}x{self.eot}"
        changed = [f"{key}={value:g}" for key, (value, default) in options.items() if value != default]
        return " ".join(part for part in (f"{name}-{budget}", *changed, self.surrogate.label) if part)


@final
@dataclass(frozen=True, kw_only=True)
class ARC(MemberAttack):
    r"""Gather local steps over the boundary of one member after the other; keep what does not lower the error.

    In each round members are linearized at the round's first point. Member m, with margin $v$ to a wrong class and
    the margin's gradient $w$, has its boundary at the distance $\zeta = -v / \lVert w \rVert_*$, with the dual norm
    below. For a local perturbation $\delta$ of radius $\eta$ the candidate is

    $$\eta \frac{\delta + \beta g}{\lVert \delta + \beta g \rVert}, \quad \beta = \frac{\eta}{\eta - \zeta}
    \left| \zeta - \frac{w \cdot \delta}{\lVert w \rVert_*} \right| + \rho$$

    where g is the direction of steepest ascent with norm one; $\beta = \eta$ where the member is fooled already or
    its boundary lies beyond $\eta$. This $\beta$ takes the candidate over the linearized boundary, whatever $\delta$.
    The candidate, projected into the ball and the box, is kept where the share of members and draws that err does not
    fall; among equal shares, where a bounded mean of the margins does not fall. Plain gradient steps on the mean loss
    can end where they fool no member at all, though one can be fooled.

    Reference: Dbouk and Shanbhag, 2022, *Adversarial Vulnerability of Randomized Ensembles*,
    https://arxiv.org/abs/2206.06737, the ARC algorithm for differentiable classifiers; with one step of size one it is
    theirs for linear classifiers. Deviations: members have equal weight and are visited in their order; margins are
    means over draws, and candidates are compared on common fresh draws; the boundary is the nearest among `classes`
    wrong classes instead of all; the paper lets ties pass without a look at margins; the box [0, 1]. A caller's
    `criterion` tells no members apart: each round takes one step of length $\eta$ along its gradient, kept where it
    does not fall.

    Attributes:
        steps: Number of rounds over all members.
        eot: Draws of each gradient and of each comparison.
        surrogate: Backward pass that the quantizers show.
        step_size: Radius $\eta$ of a round's local perturbation as a share of epsilon, in (0, 2].
        overshoot: Length $\rho$ beyond the boundary as a share of epsilon.
        classes: Number of likeliest wrong classes among which the nearest boundary is sought, a gradient for each.
    """

    step_size: float = 0.25
    overshoot: float = 0.05
    classes: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (0 < self.step_size <= 2 and self.overshoot >= 0 and self.classes >= 1):
            raise InputError(
                "expected a step_size in (0, 2], an overshoot of at least 0 and at least one class, got "
                f"step_size={self.step_size}, overshoot={self.overshoot}, classes={self.classes}"
            )

    @property
    def label(self) -> str:
        """Return ARC-steps, with what differs from the default."""
        return self._label(
            "ARC", step=(self.step_size, 0.25), overshoot=(self.overshoot, 0.05), classes=(self.classes, 1)
        )

    def _run(self, problem: Problem) -> Float[Tensor, "batch *image"]:
        goal = problem.criterion or partial(member_error, labels=problem.labels)
        if problem.criterion is None:
            _, members, _, classes = problem.logits(problem.images, seeds=problem.seeds(1, "members")).shape
            ranks = range(min(self.classes, classes - 1))
            margins = [
                [partial(member_margin, labels=problem.labels, member=member, rank=rank) for rank in ranks]
                for member in range(members)
            ]
        else:
            margins = [[problem.criterion]]
        x = problem.images
        for step in range(self.steps):
            x = self._round(problem.child("step", step), x, margins, goal)
        return x

    def _round(
        self, problem: Problem, centre: Float[Tensor, "batch *image"], margins: list[list[Criterion]], goal: Criterion
    ) -> Float[Tensor, "batch *image"]:
        """Return the point that a local perturbation gathers, with one candidate for each member."""
        radius, x, local = self.step_size * problem.epsilon, centre, torch.zeros_like(centre)
        for member, of_member in enumerate(margins):
            slope, distance = self._nearest(problem, centre, of_member)
            direction = _steepest(slope, problem.norm)
            done = (slope * local).flatten(1).sum(1) / _dual(slope, problem.norm)
            length = radius / (radius - distance).clamp(min=1e-12) * (distance - done).abs()
            length = length + self.overshoot * problem.epsilon
            near = (distance > 0) & (distance < radius) & (problem.criterion is None)
            moved = local + per_example(torch.where(near, length, radius), local) * direction
            moved = moved * per_example(radius / norm_of(moved, problem.norm).clamp(min=1e-30), moved)
            candidate = problem.project(centre + moved)
            seeds = problem.seeds(self.eot, "comparison", member)
            kept = problem.loss(candidate, goal, seeds=seeds) >= problem.loss(x, goal, seeds=seeds)
            kept = per_example(kept, x)
            x, local = torch.where(kept, candidate, x), torch.where(kept, moved, local)
        return x

    def _nearest(
        self, problem: Problem, x: Float[Tensor, "batch *image"], margins: list[Criterion]
    ) -> tuple[Float[Tensor, "batch *image"], Float[Tensor, "batch"]]:
        """Return the gradient of the margin whose linearized boundary is nearest, and the signed distance to it."""
        seeds = problem.seeds(self.eot, "gradient")
        nearest: Tensor | None = None
        shortest: Tensor | None = None
        for margin in margins:
            gradient, value = problem.gradient(x, margin, seeds=seeds, surrogate=self.surrogate)
            distance = -value / _dual(gradient, problem.norm)
            if nearest is None or shortest is None:
                nearest, shortest = gradient, distance
                continue
            nearest = torch.where(per_example(distance < shortest, x), gradient, nearest)
            shortest = torch.minimum(shortest, distance)
        if nearest is None or shortest is None:
            raise InputError("expected a model of at least two classes, got one")
        return nearest, shortest


@final
@dataclass(frozen=True, kw_only=True)
class MORA(MemberAttack):
    r"""Climb the members' margins, each weighted by how far it is from being fooled.

    $$L = \sum_m w_m v_m, \quad w_m = \frac{\sigma(-v_m / \tau)}{\sum_k \sigma(-v_k / \tau)}$$

    with $v_m$ the margin of member m under a draw, the best wrong logit minus the true one, and weights held constant
    in the gradient: members that are fooled already stop pulling. L is averaged over draws. Steps follow the gradient,
    to which the earlier ones are added with a decay, and shrink linearly from $2 \epsilon$.

    After Yu, Gao and Xu, 2022, *MORA: Improving Ensemble Robustness Evaluation with Model-Reweighing Attack*,
    https://arxiv.org/abs/2211.08008. Theirs is what the abstract says: the gradients of the members of a deterministic
    ensemble are re-weighted, because their plain sum can work against the attack. Our reconstruction is the rest: the
    sigmoid of the margin as weight, the temperature, the steps and their momentum, the draws, the choice among restarts
    by the margin of the mean probability. No result of ours is one of that paper's attack. For one member L is its
    margin.

    Attributes:
        steps: Number of steps of each restart.
        eot: Draws of each gradient.
        surrogate: Backward pass that the quantizers show.
        temperature: The $\tau$ of the weights, in units of a logit.
        momentum: Decay of the earlier gradients, each divided by its mean magnitude; 0 for none.
        restarts: Number of random starts.
        selection: Number of draws on which restarts are compared.
    """

    temperature: float = 1.0
    momentum: float = 0.75
    restarts: int = 1
    selection: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.temperature <= 0 or not 0 <= self.momentum < 10:
            raise InputError(
                f"expected a positive temperature and a momentum in [0, 10), got {self.temperature} and {self.momentum}"
            )
        if min(self.restarts, self.selection) < 1:
            raise InputError(
                f"expected at least one restart and selection draw, got {self.restarts} and {self.selection}"
            )

    @property
    def label(self) -> str:
        """Return MORA-steps, with what differs from the default."""
        return self._label(
            "MORA",
            restarts=(self.restarts, 1),
            temperature=(self.temperature, 1.0),
            momentum=(self.momentum, 0.75),
        )

    def _run(self, problem: Problem) -> Float[Tensor, "batch *image"]:
        criterion = problem.criterion or partial(reweighed_margin, labels=problem.labels, temperature=self.temperature)
        goal = problem.criterion or partial(
            pooled_loss, labels=problem.labels, loss="margin", pooling="mean-probability"
        )
        ends = (self._climb(problem.child("restart", index), criterion) for index in range(self.restarts))
        return problem.best(ends, goal, draws=self.selection)

    def _climb(self, problem: Problem, criterion: Criterion) -> Float[Tensor, "batch *image"]:
        x = problem.random_point("start")
        velocity = torch.zeros_like(x)
        for step in range(self.steps):
            seeds = problem.seeds(self.eot, "step", step)
            gradient, _ = problem.gradient(x, criterion, seeds=seeds, surrogate=self.surrogate)
            scale = gradient.abs().flatten(1).mean(1).clamp(min=1e-30)
            velocity = self.momentum * velocity + gradient / per_example(scale, gradient)
            x = problem.ascend(x, velocity, 2 * problem.epsilon * (1 - step / self.steps))
        return x


def reweighed_margin(
    logits: Float[Tensor, "draw member batch classes"], labels: Int[Tensor, "batch"], *, temperature: float
) -> Float[Tensor, "batch"]:
    """Return the loss of `MORA`, averaged over draws.

    Examples:
        >>> logits = torch.tensor([[[[0.0, 9.0]], [[2.0, 0.0]]]])  # the first of two members is fooled
        >>> reweighed_margin(logits, torch.tensor([0]), temperature=1.0)
        tensor([-1.9985])
    """
    margins = _margins(logits, labels)
    weights = (-margins.detach() / temperature).sigmoid()
    return (weights / weights.sum(1, keepdim=True).clamp(min=1e-30) * margins).sum(1).mean(0)


def member_margin(
    logits: Float[Tensor, "draw member batch classes"], labels: Int[Tensor, "batch"], *, member: int, rank: int
) -> Float[Tensor, "batch"]:
    """Return by how much a wrong class leads the true one in a member's log-probabilities, averaged over draws.

    The wrong class is that of the given rank by the same average; rank 0 is the likeliest.
    """
    score = logits[:, member].log_softmax(-1).mean(0)
    wrong = score.detach().scatter(-1, labels[:, None], -torch.inf)
    chosen = wrong.sort(dim=-1, descending=True, stable=True).indices[:, rank, None]
    return (score.gather(-1, chosen) - score.gather(-1, labels[:, None]))[:, 0]


def member_error(
    logits: Float[Tensor, "draw member batch classes"], labels: Int[Tensor, "batch"]
) -> Float[Tensor, "batch"]:
    """Return the share of members and draws that err, plus what orders equal shares: less than half an error.

    Examples:
        >>> logits = torch.tensor([[[[0.0, 9.0]], [[2.0, 0.0]]]])
        >>> member_error(logits, torch.tensor([0]))  # 1/2 + (sigmoid(9) + sigmoid(-2)) / 8
        tensor([0.6399])
    """
    margins = _margins(logits, labels)
    count = margins.shape[0] * margins.shape[1]
    return (margins > 0).to(margins.dtype).mean((0, 1)) + margins.sigmoid().mean((0, 1)) / (2 * count)


def _margins(
    logits: Float[Tensor, "draw member batch classes"], labels: Int[Tensor, "batch"]
) -> Float[Tensor, "draw member batch"]:
    views = logits.log_softmax(-1).flatten(0, 1)
    return view_loss(views, labels, "margin").unflatten(0, logits.shape[:2])


def _dual(gradient: Float[Tensor, "batch *image"], norm: Norm) -> Float[Tensor, "batch"]:
    """Return the dual norm of each gradient: the rise of the loss for a step of length one."""
    flat = gradient.flatten(1)
    return (flat.abs().sum(1) if norm == "linf" else norm_of(gradient, "l2")).clamp(min=1e-30)


def _steepest(gradient: Float[Tensor, "batch *image"], norm: Norm) -> Float[Tensor, "batch *image"]:
    """Return the direction of steepest ascent, of norm one."""
    return gradient.sign() if norm == "linf" else gradient / per_example(_dual(gradient, norm), gradient)
