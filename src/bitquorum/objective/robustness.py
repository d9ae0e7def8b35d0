"""Keep a small change of the image small at the output: input gradients and, as references, adversarial training."""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar, Literal, final, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import softplus
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from bitquorum import kernels, rng
from bitquorum.attacks import PGD, Attack
from bitquorum.attacks.base import view_loss
from bitquorum.interface import InputError
from bitquorum.objective.term import Step, Term

Norm = Literal["l1", "l2"]
Of = Literal["member", "ensemble"]


@final
@dataclass(frozen=True, kw_only=True)
class InputGradient(Term):
    r"""Penalize the gradient of a loss with respect to the image: $E \|\nabla_x CE\|$.

    The L1 norm times epsilon is the first-order rise of the loss under an L-infinity attack of that radius, hence the
    default weight 5/255. It needs second derivatives, which the mean of a stochastic quantizer has. Reference:
    Rodríguez-Muñoz, Wang, Torralba, 2024, https://arxiv.org/abs/2409.20139. Deviation: low-bit members, per member.

    With `difference` h the norm is the quotient $(L(x + h v) - L(x)) / h$ along $v = \mathrm{sign}\,\nabla_x L$ (L1) or
    $\nabla_x L / \|\nabla_x L\|$ (L2), which needs no second derivative (Finlay and Oberman, 2021,
    https://arxiv.org/abs/1905.11468, for L2). The quotient sees the codes that were drawn, not their mean, so that an h
    far below the steps of the quantizers is noisy; and at an h as large as epsilon $x + h v$ is an adversarial example.

    A quantizer without noise lends the gradient of something else, and a long training may make that small in place of
    its own: behind a norm layer a signal of less than a step still passes, as a staircase (`docs/research/noise.md`).

    Attributes:
        norm: `l1`, or `l2` (Fisher information is the square of the latter).
        of: `member`, each member's own loss, averaged; `ensemble`, the loss of the mean probability.
        loss: `margin`, the largest other logit less the true one (of the ensemble: log-probabilities); cross-entropy
            where it is `None`.
        draws: Number of draws, apart from that of the step, over whose mean loss the gradient is taken; `None` takes
            the step's one, at no cost.
        difference: Step of the quotient in units of the image; `None` for the exact gradient.
        share: Share of the steps, chosen by their seeds, on which the penalty is computed and divided by the share; on
            the others it is zero and costs nothing. `None` computes it on each.
        statistics: `held` takes the gradient with the statistics of norm layers as constants, as an attacker of the
            trained network does; `None`, which does not tell how far an image moves its own loss, through the batch's.
    """

    weight: float = 5 / 255
    warmup: float = 0.5
    norm: Norm = "l1"
    of: Of = "member"
    loss: Literal["margin"] | None = None
    draws: int | None = None
    difference: float | None = None
    share: float | None = None
    statistics: Literal["held"] | None = None
    needs_image_gradient: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.norm not in get_args(Norm) or self.of not in get_args(Of):
            raise InputError(f"expected norm l1 or l2 and of member or ensemble, got {self.norm!r} and {self.of!r}")
        if self.loss not in (None, "margin"):
            raise InputError(f"expected loss margin, or none for cross-entropy, got {self.loss!r}")
        reach = 1.0 if self.difference is None else self.difference
        if (self.draws is not None and self.draws < 1) or not 0 < reach < math.inf:
            raise InputError(
                "expected at least one draw and a finite difference above 0, or none of either, got "
                f"{self.draws} and {self.difference}"
            )
        if self.difference is not None and self.statistics is not None:
            raise InputError(
                f"expected either a difference or held statistics, got difference={self.difference} and "
                f"statistics={self.statistics!r}: a second pass moves the statistics of its batch; leave one out"
            )
        _check_statistics(self.statistics)
        _check_share(self.share)

    @property
    def capturable(self) -> bool:
        """Unless it chooses steps."""
        return self.share is None

    def __call__(self, step: Step) -> Float[Tensor, ""]:
        """Return the mean norm over examples (and members), in nats (or logits) per unit of the image."""
        return _on_share(self._penalty, step, self.share)

    def _penalty(self, step: Step) -> Float[Tensor, ""]:
        if self.difference is not None and any(
            isinstance(module, _DropoutNd) and module.training and module.p > 0 for module in step.ensemble.modules()
        ):
            raise InputError(
                "expected a network without dropout for a penalty by finite differences, got one with: each pass drops "
                "others, and the quotient divides that by `difference`; leave out `difference`"
            )
        images = [step.images] * len(step.ensemble.members)
        losses = self._losses(step.outputs.parts if self.draws is None else self._respond(step, images), step)
        exact = self.difference is None
        gradients = [_slope(loss, step, self.statistics, create_graph=exact).flatten(1) for loss in losses]
        if self.difference is None:
            return torch.stack([self._size(gradient) for gradient in gradients]).mean()
        h = self.difference
        ways = [g.sign() if self.norm == "l1" else g / (g.norm(dim=1, keepdim=True) + 1e-12) for g in gradients]
        moved = [(step.images.detach() + h * way.view_as(step.images)) for way in ways]
        far = self._losses(self._respond(step, moved * (len(images) // len(moved))), step)
        return torch.stack([(b - a).mean() / h for a, b in zip(losses, far, strict=True)]).mean()

    def _respond(self, step: Step, images: list[Tensor]) -> Sequence[Float[Tensor, "draw batch classes"]]:
        """Return what the members say of images of their own, under the draws of the penalty."""
        seeds = [step.seed] if self.draws is None else rng.derive_many(step.seed, self.draws, "penalty")
        with rng.draw(seeds, step.examples):
            return step.ensemble.each(images)

    def _losses(self, parts: Sequence[Float[Tensor, "draw batch classes"]], step: Step) -> list[Float[Tensor, "batch"]]:
        logits = [kernels.wide(part) for part in parts]
        if self.of == "ensemble":
            logp = torch.stack(logits).log_softmax(-1).logsumexp(0) - math.log(len(logits))
            logits = [logp]
        if self.loss is None:
            return [step.cross_entropy(z[:, None])[:, 0].mean(0) for z in logits]
        return [step.over_labels(partial(view_loss, z, loss="margin")).mean(0) for z in logits]

    def _size(self, flat: Float[Tensor, "batch pixels"]) -> Float[Tensor, ""]:
        if self.norm == "l1":
            return flat.abs().sum(1).mean()
        return (flat.square().sum(1) + 1e-12).sqrt().mean()


@final
@dataclass(frozen=True, kw_only=True)
class LinearizedLoss(Term):
    r"""Add what a loss rises by under the worst attack on a linear model of the network: no adversarial image is made.

    Cross-entropy is $\mathrm{softplus}(-m)$ of the log-odds $m = \log p_y - \log (1 - p_y)$. An attack of radius
    epsilon in the maximum norm takes at most $\epsilon \|\nabla_x m\|_1$ from log-odds that are linear in the image;
    the term is $E[\mathrm{softplus}(\epsilon \|\nabla_x m\|_1 - m) - \mathrm{softplus}(-m)]$, so that with
    `MemberCrossEntropy` it sums to the loss under that attack, for mixed images with either label, at the cost of a
    second gradient. To first order in epsilon it is `InputGradient` of equal weight. Beyond, it differs where the
    network is sure: the gradient of cross-entropy vanishes with $1 - p_y$, the rise does so only where the log-odds
    exceed what the attack can take. It needs second derivatives. What `InputGradient` says of quantizers without noise
    holds here too: trainings with them ended at a constant answer.

    Reference for margins of a network made linear at the image: Elsayed et al., 2018, Large margin deep networks for
    classification, https://arxiv.org/abs/1803.05598, section 3. Deviation: log-odds in place of a margin for each other
    class, cross-entropy in place of a hinge, per low-bit member.

    Attributes:
        epsilon: Radius in the maximum norm, in units of the image.
        statistics: As in `InputGradient`.
        share: As in `InputGradient`.
    """

    warmup: float = 0.5
    epsilon: float = 5 / 255
    statistics: Literal["held"] | None = None
    share: float | None = None
    needs_image_gradient: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.epsilon < math.inf:
            raise InputError(f"expected an epsilon above 0, got {self.epsilon}")
        _check_statistics(self.statistics)
        _check_share(self.share)

    @property
    def capturable(self) -> bool:
        """Unless it chooses steps."""
        return self.share is None

    def __call__(self, step: Step) -> Float[Tensor, ""]:
        """Return the mean rise over members and examples, in nats."""
        return _on_share(self._rise, step, self.share)

    def _rise(self, step: Step) -> Float[Tensor, ""]:
        rises = [step.over_labels(partial(self._rise_of, part, step)) for part in step.outputs.parts]
        return torch.stack([rise.mean() for rise in rises]).mean()

    def _rise_of(
        self, part: Float[Tensor, "draw batch classes"], step: Step, labels: Int[Tensor, "batch"]
    ) -> Float[Tensor, "batch"]:
        odds = log_odds(kernels.wide(part), labels).mean(0)
        lost = self.epsilon * _slope(odds, step, self.statistics).flatten(1).abs().sum(1)
        return softplus(lost - odds) - softplus(-odds)


def _check_statistics(statistics: str | None) -> None:
    if statistics not in (None, "held"):
        raise InputError(f"expected statistics held, or none for those of the batch, got {statistics!r}")


def _check_share(share: float | None) -> None:
    if share is not None and not 0 < share <= 1:
        raise InputError(f"expected a share of the steps in (0, 1], or none for all, got {share}")


def _on_share(term: Callable[[Step], Tensor], step: Step, share: float | None) -> Float[Tensor, ""]:
    """Return the term on a share of the steps, chosen by their seeds, divided by the share; zero on the others."""
    if share is None:
        return term(step)
    chosen = rng.derive(step.seed, "share") % 2**32 < share * 2**32
    return term(step) / share if chosen else step.images.new_zeros(())


def _slope(
    losses: Float[Tensor, "batch"], step: Step, statistics: Literal["held"] | None, *, create_graph: bool = True
) -> Float[Tensor, "batch *image"]:
    """Return the gradient of the sum of the images' losses."""
    for module in step.ensemble.modules() if statistics else ():
        if isinstance(module, _BatchNorm) and module.training and not getattr(module, "holds_statistics", False):
            raise InputError(
                f"expected norm layers whose statistics can be held (bitquorum.zoo.BatchNorm), got {module}; replace "
                "it, or leave `statistics` out"
            )
    with kernels.statistics_held() if statistics else nullcontext():
        return torch.autograd.grad(losses.sum(), step.images, create_graph=create_graph, retain_graph=True)[0]


def log_odds(logits: Float[Tensor, "draw batch classes"], labels: Int[Tensor, "batch"]) -> Float[Tensor, "draw batch"]:
    """Return the logit of the true class less the logsumexp of all others."""
    true = labels.expand(logits.shape[:-1])[..., None]
    return logits.gather(-1, true)[..., 0] - logits.scatter(-1, true, -math.inf).logsumexp(-1)


@final
@dataclass(frozen=True, kw_only=True)
class Adversarial(Term):
    """Fit the labels of adversarial images: PGD-AT when it stands alone (Madry et al., 2018, eq. 2.1).

    A reference, never part of the headline. The attack meets the ensemble in evaluation mode. Of mixed images it
    attacks the own label, and both are fitted.

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
        return step.cross_entropy(step.respond(found.images)).mean()


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
