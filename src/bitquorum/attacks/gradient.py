"""Attack by the gradient: FGSM and PGD, over any number of draws."""

from dataclasses import dataclass, field
from typing import ClassVar, final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bitquorum.attacks.base import (
    Attack,
    Criterion,
    Loss,
    Pooling,
    Problem,
    check_choices,
    pooled_loss,
)
from bitquorum.geometry import Norm, per_example
from bitquorum.interface import InputError
from bitquorum.quantizers import Surrogate


@dataclass(frozen=True, kw_only=True)
class GradientAttack(Attack):
    """Share the choices of the attacks that follow a gradient.

    Attributes:
        eot: Number of draws that each gradient averages over.
        loss: As `pooled_loss` has them; `margin` makes PGD the L-inf attack of Carlini and Wagner's loss.
        pooling: How draws and members enter the loss; see `pooled_loss`.
        surrogate: Backward pass that the quantizers show to the attack.
        common: Whether every step averages over the same draws (common random numbers) rather than over fresh ones.
    """

    norms: ClassVar[tuple[Norm, ...]] = ("linf", "l2")

    eot: int = 1
    loss: Loss = "cross-entropy"
    pooling: Pooling = "mean-loss"
    surrogate: Surrogate = field(default_factory=Surrogate)
    common: bool = False

    def __post_init__(self) -> None:
        check_choices(self.loss, self.pooling)
        if self.eot < 1:
            raise InputError(f"expected eot of at least one draw, got {self.eot}")

    def _options(self, loss: Loss = "cross-entropy") -> str:
        """Return the choices that differ from the default, for the label; `loss` is the attack's default loss."""
        loss_name = "" if self.loss == loss else self.loss
        pooling = "" if self.pooling == "mean-loss" else self.pooling
        common = "common draws" if self.common else ""
        return "".join(f" {option}" for option in (loss_name, pooling, self.surrogate.label, common) if option)

    def _criterion(self, labels: Int[Tensor, "batch"]) -> Criterion:
        return lambda logits: pooled_loss(logits, labels, loss=self.loss, pooling=self.pooling)

    def _gradient(
        self, problem: Problem, x: Float[Tensor, "batch *image"], criterion: Criterion, step: int
    ) -> tuple[Float[Tensor, "batch *image"], Float[Tensor, "batch"]]:
        """Return gradient and loss at a step, over the step's draws."""
        seeds = problem.seeds(self.eot, "step", 0 if self.common else step)
        return problem.gradient(x, criterion, seeds=seeds, surrogate=self.surrogate)


@final
@dataclass(frozen=True, kw_only=True)
class FGSM(GradientAttack):
    """Take one step of length epsilon along the sign of the gradient (for `l2`, along the gradient).

    Reference: Goodfellow, Shlens, Szegedy, 2015, https://arxiv.org/abs/1412.6572, section 4.

    Examples:
        >>> from bitquorum.ensemble import Ensemble
        >>> linear = torch.nn.Linear(2, 2)
        >>> _ = linear.weight.data.copy_(torch.eye(2))
        >>> found = FGSM()(Ensemble([linear]), torch.tensor([[0.6, 0.4]]), torch.tensor([0]), epsilon=0.25)
        >>> found.images
        tensor([[0.3500, 0.6500]])
    """

    @property
    def label(self) -> str:
        """Return FGSM, with what differs from the default."""
        return ("FGSM" if self.eot == 1 else f"EOT-FGSM x{self.eot}") + self._options()

    def _run(self, problem: Problem) -> Float[Tensor, "batch *image"]:
        criterion = problem.criterion or self._criterion(problem.labels)
        gradient, _ = self._gradient(problem, problem.images, criterion, 0)
        return problem.ascend(problem.images, gradient, problem.epsilon)


@final
@dataclass(frozen=True, kw_only=True)
class PGD(GradientAttack):
    """Climb the loss by gradient steps of fixed length, projected onto the ball; EOT when `eot` exceeds one.

    Each step draws afresh. The projection stands outside the differentiated graph, so that saturated pixels keep their
    gradient. With several restarts the image of the largest loss on `selection` further draws is kept, the same
    draws for every restart. References: Madry et al., 2018, https://arxiv.org/abs/1706.06083, section 2; Athalye et
    al., 2018, https://arxiv.org/abs/1802.00420, section 4.1 (EOT).

    Attributes:
        steps: Number of steps of each restart.
        restarts: Number of random starts.
        step_size: Length of a step as a share of epsilon; `None` takes 2.5 / steps.
        random_start: Whether to start at a random point of the ball.
        momentum: Decay of the accumulated L1-normalized gradient (Dong et al., 2018); 0 for none.
        selection: Number of draws on which restarts are compared.
    """

    steps: int = 20
    restarts: int = 1
    step_size: float | None = None
    random_start: bool = True
    momentum: float = 0.0
    selection: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.steps, self.restarts, self.selection) < 1:
            raise InputError(
                f"expected at least one step, restart and selection draw, got steps={self.steps}, "
                f"restarts={self.restarts}, selection={self.selection}"
            )
        if (self.step_size is not None and self.step_size <= 0) or not 0 <= self.momentum < 10:
            raise InputError(
                f"expected a positive step_size and a momentum in [0, 10), got {self.step_size} and {self.momentum}"
            )

    @property
    def label(self) -> str:
        """Return PGD-steps, with what differs from the default."""
        name = f"PGD-{self.steps}" if self.eot == 1 else f"EOT-PGD-{self.steps}x{self.eot}"
        restarts = "" if self.restarts == 1 else f" r{self.restarts}"
        momentum = f" momentum={self.momentum:g}" if self.momentum else ""
        step = "" if self.step_size is None else f" step={self.step_size:g}"
        start = "" if self.random_start else " clean start"
        return name + restarts + step + momentum + start + self._options()

    def _run(self, problem: Problem) -> Float[Tensor, "batch *image"]:
        criterion = problem.criterion or self._criterion(problem.labels)
        ends = (self._climb(problem.child("restart", index), criterion) for index in range(self.restarts))
        return problem.best(ends, criterion, draws=self.selection)

    def _climb(self, problem: Problem, criterion: Criterion) -> Float[Tensor, "batch *image"]:
        length = problem.epsilon * (self.step_size or 2.5 / self.steps)
        x = problem.random_point("start") if self.random_start else problem.images
        velocity = torch.zeros_like(x)
        for step in range(self.steps):
            gradient, _ = self._gradient(problem, x, criterion, step)
            if self.momentum:
                gradient = gradient / per_example(gradient.abs().flatten(1).mean(1).clamp(min=1e-30), gradient)
            velocity = self.momentum * velocity + gradient
            x = problem.ascend(x, velocity, length)
        return x
