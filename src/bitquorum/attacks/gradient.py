"""Attack by the sign of the gradient: FGSM and PGD, over any number of draws."""

from dataclasses import dataclass, field
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bitquorum import rng
from bitquorum.attacks.base import (
    Attack,
    AttackResult,
    Criterion,
    Loss,
    Pooling,
    check_choices,
    loss_gradient,
    loss_value,
    pooled_loss,
)
from bitquorum.geometry import project_linf, random_linf
from bitquorum.interface import Cost, InputError, Model
from bitquorum.quantizers import Surrogate


@dataclass(frozen=True, kw_only=True)
class GradientAttack(Attack):
    """Share the choices of the attacks that follow a gradient.

    Attributes:
        eot: Number of fresh draws that each gradient averages over.
        loss: `cross-entropy`, or `margin`: the best wrong log-probability minus the true one.
        pooling: How draws and members enter the loss; see `pooled_loss`.
        surrogate: Backward pass that the quantizers show to the attack.
    """

    eot: int = 1
    loss: Loss = "cross-entropy"
    pooling: Pooling = "mean-loss"
    surrogate: Surrogate = field(default_factory=Surrogate)

    def __post_init__(self) -> None:
        check_choices(self.loss, self.pooling)
        if self.eot < 1:
            raise InputError(f"expected eot of at least one draw, got {self.eot}")

    def _options(self) -> str:
        """Return the choices that differ from the default, for the label."""
        loss = "" if self.loss == "cross-entropy" else self.loss
        pooling = "" if self.pooling == "mean-loss" else self.pooling
        return "".join(f" {option}" for option in (loss, pooling, self.surrogate.label) if option)

    def _criterion(self, labels: Int[Tensor, "batch"]) -> Criterion:
        return lambda logits: pooled_loss(logits, labels, loss=self.loss, pooling=self.pooling)


@final
@dataclass(frozen=True, kw_only=True)
class FGSM(GradientAttack):
    """Take one step of size epsilon along the sign of the gradient.

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

    def _run(
        self,
        model: Model,
        images: Float[Tensor, "batch *image"],
        epsilon: float,
        examples: Int[Tensor, "batch"],
        seed: int,
        criterion: Criterion,
    ) -> AttackResult:
        gradient, _ = loss_gradient(
            model,
            images,
            criterion,
            seeds=rng.derive_many(seed, self.eot, "step", 0),
            examples=examples,
            surrogate=self.surrogate,
        )
        found = project_linf(images + epsilon * gradient.sign(), images, epsilon)
        return AttackResult(images=found, cost=Cost(forward=self.eot, backward=self.eot))


@final
@dataclass(frozen=True, kw_only=True)
class PGD(GradientAttack):
    """Climb the loss by signed gradient steps, projected onto the ball; EOT when `eot` exceeds one.

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
        return name + restarts + step + momentum + self._options()

    def _run(
        self,
        model: Model,
        images: Float[Tensor, "batch *image"],
        epsilon: float,
        examples: Int[Tensor, "batch"],
        seed: int,
        criterion: Criterion,
    ) -> AttackResult:
        passes = self.restarts * self.steps * self.eot
        cost = Cost(forward=passes, backward=passes)
        found = self._climb(model, images, epsilon, examples, rng.derive(seed, "restart", 0), criterion)
        if self.restarts == 1:
            return AttackResult(images=found, cost=cost)
        judges = rng.derive_many(seed, self.selection, "selection")
        best = loss_value(model, found, criterion, seeds=judges, examples=examples)
        for restart in range(1, self.restarts):
            child = rng.derive(seed, "restart", restart)
            other = self._climb(model, images, epsilon, examples, child, criterion)
            value = loss_value(model, other, criterion, seeds=judges, examples=examples)
            better = value > best
            found[better] = other[better]
            best = torch.maximum(best, value)
        return AttackResult(images=found, cost=cost + Cost(forward=self.restarts * self.selection))

    def _climb(
        self,
        model: Model,
        images: Float[Tensor, "batch *image"],
        epsilon: float,
        examples: Int[Tensor, "batch"],
        seed: int,
        criterion: Criterion,
    ) -> Float[Tensor, "batch *image"]:
        step = epsilon * (self.step_size or 2.5 / self.steps)
        x = images
        if self.random_start:
            x = random_linf(images, epsilon, seed=rng.derive(seed, "start"), examples=examples)
        velocity = torch.zeros_like(images)
        for index in range(self.steps):
            seeds = rng.derive_many(seed, self.eot, "step", index)
            gradient, _ = loss_gradient(model, x, criterion, seeds=seeds, examples=examples, surrogate=self.surrogate)
            if self.momentum:
                norm = gradient.abs().flatten(1).mean(1).clamp(min=1e-30)
                gradient = gradient / norm.view(-1, *[1] * (images.dim() - 1))
            velocity = self.momentum * velocity + gradient
            x = project_linf(x + step * velocity.sign(), images, epsilon)
        return x
