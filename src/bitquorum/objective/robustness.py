"""Keep a small change of the image small at the output: input gradients and, as references, adversarial training."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal, final, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from bitquorum.attacks import PGD, Attack
from bitquorum.interface import InputError
from bitquorum.objective.term import Step, Term, cross_entropy, mean_probability_cross_entropy

Norm = Literal["l1", "l2"]
Of = Literal["member", "ensemble"]


@final
@dataclass(frozen=True, kw_only=True)
class InputGradient(Term):
    r"""Penalize the gradient of the cross-entropy with respect to the image: $E \|\nabla_x CE\|$.

    The L1 norm times epsilon is the first-order rise of the loss under an L-infinity attack of that radius, hence the
    default weight 5/255. It needs second derivatives, which the mean of a stochastic quantizer has. Reference:
    Rodríguez-Muñoz, Wang, Torralba, 2024, https://arxiv.org/abs/2409.20139. Deviation: low-bit members, per member.

    Attributes:
        norm: `l1`, or `l2` (Fisher information is the square of the latter).
        of: `member`, each member's own loss, averaged; `ensemble`, the loss of the mean probability.
    """

    weight: float = 5 / 255
    warmup: float = 0.5
    norm: Norm = "l1"
    of: Of = "member"
    needs_image_gradient: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.norm not in get_args(Norm) or self.of not in get_args(Of):
            raise InputError(f"expected norm l1 or l2 and of member or ensemble, got {self.norm!r} and {self.of!r}")

    def __call__(self, step: Step) -> Float[Tensor, ""]:
        """Return the mean norm over examples (and members), in nats per unit of the image."""
        if self.of == "ensemble":
            losses = [mean_probability_cross_entropy(step.logits, step.labels).mean(0)]
        else:
            losses = step.member_losses
        return torch.stack([self._norm(loss, step.images) for loss in losses]).mean()

    def _norm(self, loss: Float[Tensor, "batch"], images: Tensor) -> Float[Tensor, ""]:
        (gradient,) = torch.autograd.grad(loss.sum(), images, create_graph=True)
        flat = gradient.flatten(1)
        if self.norm == "l1":
            return flat.abs().sum(1).mean()
        return (flat.square().sum(1) + 1e-12).sqrt().mean()


@final
@dataclass(frozen=True, kw_only=True)
class Adversarial(Term):
    """Fit the labels of adversarial images: PGD-AT when it stands alone (Madry et al., 2018, eq. 2.1).

    A reference, never part of the headline. The attack meets the ensemble in evaluation mode.

    Attributes:
        attack: Any attack.
        epsilon: Radius in the maximum norm.
    """

    attack: Attack = field(default_factory=lambda: PGD(steps=7, step_size=0.25))
    epsilon: float = 8 / 255

    def __call__(self, step: Step) -> Float[Tensor, ""]:
        """Return the members' mean cross-entropy on the adversarial images."""
        with step.attacked() as ensemble:
            found = self.attack(
                ensemble,
                step.images.detach(),
                step.labels,
                epsilon=self.epsilon,
                examples=step.examples,
                seed=step.seed,
            )
        return cross_entropy(step.respond(found.images), step.labels).mean()


@final
@dataclass(frozen=True, kw_only=True)
class Trades(Term):
    r"""Keep the output near an image what it is at the image: $KL(p(x) \| p(x'))$, with x' the worst neighbour.

    Reference: Zhang et al., 2019, TRADES, https://arxiv.org/abs/1901.08573, eq. 5; `weight` is their beta (1/lambda).
    Deviation: the divergence is averaged over members.

    Attributes:
        attack: Any attack; its own loss is replaced by the divergence.
        epsilon: Radius in the maximum norm.
    """

    weight: float = 6.0
    attack: Attack = field(default_factory=lambda: PGD(steps=10, step_size=0.25))
    epsilon: float = 8 / 255

    def __call__(self, step: Step) -> Float[Tensor, ""]:
        """Return the mean divergence in nats."""
        with step.attacked() as ensemble:
            with torch.no_grad():
                clean = step.respond(step.images.detach()).softmax(-1)
            found = self.attack(
                ensemble,
                step.images.detach(),
                step.labels,
                epsilon=self.epsilon,
                examples=step.examples,
                seed=step.seed,
                criterion=lambda logits: divergence(clean, logits).mean((0, 1)),
            )
        return divergence(step.logits.softmax(-1), step.respond(found.images)).mean()


def divergence(
    p: Float[Tensor, "draw member batch classes"], logits: Float[Tensor, "draw member batch classes"]
) -> Float[Tensor, "draw member batch"]:
    """Return KL(p || softmax(logits)) in nats; several draws of `logits` meet the first draw of `p`."""
    return (torch.special.xlogy(p, p) - p * logits.log_softmax(-1)).sum(-1)
