"""Define what an attack is, and the loss that it climbs."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bitquorum import rng
from bitquorum.interface import Cost, InputError, Method, Model
from bitquorum.quantizers import Surrogate

Loss = Literal["cross-entropy", "margin"]
Pooling = Literal["mean-loss", "mean-probability", "mean-logits", "mean-member-loss"]
Criterion = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True, eq=False)
class AttackResult:
    """Hold adversarial images in [0, 1] and the passes spent on each image."""

    images: Float[Tensor, "batch *image"]
    cost: Cost


@dataclass(frozen=True, kw_only=True)
class Attack(Method, ABC):
    """Find images within `epsilon` of the given ones that a model gets wrong.

    An attack knows everything but the draws on which it will be judged. Equal seeds and examples
    give the same images, whatever the batch.
    """

    @property
    @abstractmethod
    def label(self) -> str:
        """Return the name for tables, with the budget."""

    def __call__(
        self,
        model: Model,
        images: Float[Tensor, "batch *image"],
        labels: Int[Tensor, "batch"],
        *,
        epsilon: float,
        examples: Int[Tensor, "batch"] | None = None,
        seed: int = 0,
        criterion: Criterion | None = None,
    ) -> AttackResult:
        """Attack a batch.

        Args:
            model: Callable from images to logits `[draw, member, batch, classes]`, random only through `rng.draw`.
            images: In [0, 1].
            labels: True classes.
            epsilon: Radius in the maximum norm, in units of the image (5/255 is 0.0196).
            examples: Identity of each example; its place in the batch by default.
            seed: Of the attack's own random numbers and of the draws it averages over.
            criterion: Loss per example `[batch]` of logits `[draw, member, batch, classes]`, to be raised, in place
                of the attack's own.

        Raises:
            InputError: for images outside [0, 1] or not finite, labels of the wrong shape, a negative epsilon.
        """
        check_inputs(images, labels, epsilon)
        if examples is None:
            examples = torch.arange(len(images), device=images.device)
        if epsilon == 0:
            return AttackResult(images=images.clone(), cost=Cost())
        objective = criterion or self._criterion(labels)
        return self._run(model, images.detach(), epsilon, examples, seed, objective)

    @abstractmethod
    def _criterion(self, labels: Int[Tensor, "batch"]) -> Criterion:
        """Return the attack's own loss."""

    @abstractmethod
    def _run(
        self,
        model: Model,
        images: Float[Tensor, "batch *image"],
        epsilon: float,
        examples: Int[Tensor, "batch"],
        seed: int,
        criterion: Criterion,
    ) -> AttackResult:
        """Attack checked inputs."""


def pooled_loss(
    logits: Float[Tensor, "draw member batch classes"],
    labels: Int[Tensor, "batch"],
    *,
    loss: Loss,
    pooling: Pooling,
) -> Float[Tensor, "batch"]:
    r"""Return the loss of each example, pooled over draws and members.

    - `mean-loss`: the mean over draws of the loss of the members' mean probability (EOT as the mean of loss gradients).
    - `mean-probability`: the loss of the probability averaged over draws and members.
    - `mean-logits`: the mean over draws of the loss of the members' mean logits.
    - `mean-member-loss`: the mean over draws and members of each one's own loss.
    """
    draws, members = logits.shape[:2]
    logp = logits.log_softmax(-1)
    if pooling == "mean-loss":
        views = logp.logsumexp(1) - math.log(members)
    elif pooling == "mean-probability":
        views = (logp.flatten(0, 1).logsumexp(0) - math.log(draws * members))[None]
    elif pooling == "mean-logits":
        views = logits.mean(1).log_softmax(-1)
    else:
        views = logp.flatten(0, 1)
    true = views.gather(-1, labels.expand(len(views), -1)[..., None])[..., 0]
    if loss == "cross-entropy":
        return -true.mean(0)
    others = views.scatter(-1, labels.expand(len(views), -1)[..., None], -torch.inf)
    return (others.amax(-1) - true).mean(0)


def loss_gradient(
    model: Model,
    images: Float[Tensor, "batch *image"],
    criterion: Criterion,
    *,
    seeds: Sequence[int],
    examples: Int[Tensor, "batch"],
    surrogate: Surrogate,
) -> tuple[Float[Tensor, "batch *image"], Float[Tensor, "batch"]]:
    """Return the gradient of each example's loss over the given draws, and the loss."""
    leaf = images.detach().requires_grad_()
    with torch.enable_grad(), rng.draw(seeds, examples), surrogate():
        loss = criterion(model(leaf))
        (gradient,) = torch.autograd.grad(loss.sum(), leaf)
    return gradient, loss.detach()


@torch.no_grad()
def loss_value(
    model: Model,
    images: Float[Tensor, "batch *image"],
    criterion: Criterion,
    *,
    seeds: Sequence[int],
    examples: Int[Tensor, "batch"],
) -> Float[Tensor, "batch"]:
    """Return each example's loss over the given draws."""
    with rng.draw(seeds, examples):
        return criterion(model(images))


def check_inputs(images: Tensor, labels: Tensor, epsilon: float) -> None:
    """Raise `InputError` for inputs that no attack can take."""
    if not images.is_floating_point() or images.dim() < 2:
        raise InputError(
            f"expected a float batch of images [batch, ...], got {images.dtype} of shape {tuple(images.shape)}"
        )
    if not bool(torch.isfinite(images).all()):
        raise InputError("expected finite images, got NaN or infinity; check the data and its preprocessing")
    if len(images) and (float(images.min()) < 0 or float(images.max()) > 1):
        raise InputError(
            f"expected images in [0, 1], got values from {float(images.min()):.4g} to {float(images.max()):.4g}; "
            "divide bytes by 255 and put any normalization into the model"
        )
    if labels.shape != images.shape[:1] or labels.dtype != torch.int64:
        raise InputError(
            f"expected int64 labels of shape ({len(images)},), got {labels.dtype} of shape {tuple(labels.shape)}"
        )
    if not 0 <= epsilon <= 1:
        raise InputError(f"expected epsilon in [0, 1], in units of the image, got {epsilon}")


def check_choices(loss: str, pooling: str) -> None:
    """Raise `InputError` for an unknown loss or pooling."""
    if loss not in get_args(Loss):
        raise InputError(f"expected a loss among {', '.join(get_args(Loss))}, got {loss!r}")
    if pooling not in get_args(Pooling):
        raise InputError(f"expected a pooling among {', '.join(get_args(Pooling))}, got {pooling!r}")
