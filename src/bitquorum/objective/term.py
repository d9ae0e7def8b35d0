"""Define what a term of the objective sees and what it returns."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

from jaxtyping import Float, Int
from torch import Tensor

from bitquorum import kernels, rng
from bitquorum.ensemble import Ensemble, Outputs
from bitquorum.interface import InputError, Method


@dataclass(frozen=True, kw_only=True, eq=False)
class Step:
    """Hold one training step: the batch, the network and what it said, computed once and on demand.

    Attributes:
        ensemble: In training mode.
        images: In [0, 1]; they carry a gradient when a term asks for one.
        labels: True classes.
        examples: Identity of each example, for its noise.
        progress: Share of the training that is done, in [0, 1].
        seed: Of this step's draws.
        memory: Tensors that terms keep from step to step (moving joints); part of the checkpoint.
        reduce: Average of a tensor over the processes.
        mixed: Where images hold a part of another one (`Augment.mix`): the label of that, and the share that is the
            image's own. The terms that fit labels know of it; attacks and mutual information take `labels` alone.
        classes: Number of classes of the data, where it is known: members must have a logit for each.
    """

    ensemble: Ensemble
    images: Float[Tensor, "batch *image"]
    labels: Int[Tensor, "batch"]
    examples: Int[Tensor, "batch"]
    progress: float
    seed: int
    memory: MutableMapping[str, Tensor]
    reduce: "Reduce"
    mixed: tuple[Int[Tensor, "batch"], Float[Tensor, "batch"]] | None = None
    classes: int = 0

    @cached_property
    def outputs(self) -> Outputs:
        """The ensemble's answer to the batch, under one draw keyed by the step.

        Raises:
            InputError: if a member has fewer logits than there are classes.
        """
        with rng.draw(self.seed, self.examples):
            outputs = self.ensemble.outputs(self.images)
        known = outputs.parts[0].shape[-1]
        if known < self.classes:
            raise InputError(f"expected logits of {self.classes} classes from every member, got {known}")
        return outputs

    @property
    def logits(self) -> Float[Tensor, "draw member batch classes"]:
        """The logits of `outputs`, in float32 or wider."""
        return kernels.wide(self.outputs.logits)

    @cached_property
    def member_losses(self) -> list[Float[Tensor, "batch"]]:
        """Cross-entropy of each member on each example, in nats, averaged over draws; see `Outputs.parts`."""
        return [self.cross_entropy(kernels.wide(part)[:, None]).mean((0, 1)) for part in self.outputs.parts]

    def cross_entropy(
        self, logits: Float[Tensor, "draw member batch classes"], smoothing: float = 0.0
    ) -> Float[Tensor, "draw member batch"]:
        """Return the cross-entropy with the labels of the batch, where images are mixed with those of both parts."""
        return self.over_labels(lambda labels: cross_entropy(logits, labels, smoothing))

    def over_labels(
        self, loss: Callable[[Int[Tensor, "batch"]], Float[Tensor, "*views batch"]]
    ) -> Float[Tensor, "*views batch"]:
        """Return a loss with the labels of the batch; where images are mixed, its mean over both by their share."""
        own = loss(self.labels)
        if self.mixed is None:
            return own
        others, share = self.mixed
        return share * own + (1 - share) * loss(others)

    def respond(self, images: Float[Tensor, "batch *image"]) -> Float[Tensor, "draw member batch classes"]:
        """Return the logits of other images under the draw of this step."""
        with rng.draw(self.seed, self.examples):
            return kernels.wide(self.ensemble(images))

    @contextmanager
    def attacked(self) -> Iterator[Ensemble]:
        """Yield the ensemble in evaluation mode without parameter gradients, as an attack wants it.

        Every module's mode and every parameter's `requires_grad` are as before afterwards.
        """
        modes = {module: module.training for module in self.ensemble.modules()}
        parameters = [parameter for parameter in self.ensemble.parameters() if parameter.requires_grad]
        self.ensemble.eval()
        for parameter in parameters:
            parameter.requires_grad_(False)
        try:
            yield self.ensemble
        finally:
            for parameter in parameters:
                parameter.requires_grad_(True)
            for module, mode in modes.items():
                module.training = mode


class Reduce:
    """Average tensors over processes; with one process, return them as they are."""

    def __call__(self, x: Tensor) -> Tensor:
        """Return the average of a detached tensor."""
        return x


@dataclass(frozen=True, kw_only=True)
class Term(Method, ABC):
    """Add one named number to the loss.

    Attributes:
        weight: Factor on the term; its sign may be turned for an ablation.
        warmup: Share of the training over which the weight grows from zero, linearly.
        after: Share of the training before that, in which the term has no weight and, unless the step is recorded
            (`capture`), costs nothing; `None` for none.
    """

    weight: float = 1.0
    warmup: float = 0.0
    after: float | None = None
    needs_image_gradient: ClassVar[bool] = False

    @property
    def capturable(self) -> bool:
        """Whether its kernels are the same at every step, whatever seed and progress; see `capture`."""
        return False

    def __post_init__(self) -> None:
        if not math.isfinite(self.weight):
            raise InputError(f"expected a finite weight, got {self.weight}")
        if not 0 <= self.warmup <= 1:
            raise InputError(f"expected warmup, a share of the training, in [0, 1], got {self.warmup}")
        if self.after is not None and not 0 <= self.after < 1:
            raise InputError(f"expected after, a share of the training, in [0, 1), or none, got {self.after}")

    def weight_at(self, progress: float) -> float:
        """Return the weight at a share of the training."""
        since = progress - (self.after or 0.0)
        if since < 0:
            return 0.0
        return float(self.weight) * (min(1.0, since / self.warmup) if self.warmup else 1.0)

    @abstractmethod
    def __call__(self, step: Step) -> Float[Tensor, ""]:
        """Return the unweighted value."""


def cross_entropy(
    logits: Float[Tensor, "draw member batch classes"], labels: Int[Tensor, "batch"], smoothing: float = 0.0
) -> Float[Tensor, "draw member batch"]:
    """Return the cross-entropy of every draw, member and example in nats, with label smoothing."""
    logp = logits.log_softmax(-1)
    true = logp.gather(-1, labels.expand(logits.shape[:-1])[..., None])[..., 0]
    return -(1 - smoothing) * true - smoothing * logp.mean(-1)
